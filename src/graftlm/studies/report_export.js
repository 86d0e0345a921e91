// Files of a report: a chart as SVG or PNG, in the light colours and with a legend; a table as csv or LaTeX. Made in the
// browser from what is shown; nothing is sent.

const STYLES = ["color", "fill", "font-family", "font-size", "opacity", "stroke", "stroke-dasharray", "stroke-width"];
const LEGEND_LINE = 20; // pixels
const PNG_SCALE = 3;

function download(title, ending, content) {
  const name = `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60).replace(/^-|-$/g, "")}.${ending}`;
  const link = node("a", { href: URL.createObjectURL(new Blob([content])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  announce(`saved ${name}`);
}

// Charts --------------------------------------------------------------------------------------------------------------

function saveChart(chart, format) {
  chart.setCursor(null, false);
  const { source, width, height } = standalone(chart);
  if (format === "SVG") {
    download(chart.title, "svg", source);
    return;
  }
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = node("canvas", { width: width * PNG_SCALE, height: height * PNG_SCALE });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(chart.title, "png", blob));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
}

// The chart as an SVG file that needs no style sheet.
function standalone(chart) {
  const copy = chart.svg.cloneNode(true);
  const [width, chartHeight] = [chart.width, chart.height + 48];
  const height = chartHeight + LEGEND_LINE * chart.visible.length;
  for (const name of ["aria-hidden", "focusable"]) copy.removeAttribute(name);
  fill(copy, { viewBox: `0 0 ${width} ${height}`, width, height }, []);
  copy.prepend(svgNode("title", {}, chart.title), svgNode("rect", { width, height, class: "paper" }));
  chart.visible.forEach((series, i) => {
    const place = { transform: `translate(${chart.margin} ${chartHeight + LEGEND_LINE * i})` };
    copy.append(svgNode("g", place, swatch(series.run), svgNode("text", { x: 42, y: 12 }, series.name)));
  });
  const root = document.documentElement;
  root.classList.add("light");
  chart.plot.append(copy);
  for (const element of copy.querySelectorAll("*")) {
    const style = getComputedStyle(element);
    for (const name of STYLES) element.setAttribute(name, style.getPropertyValue(name));
  }
  copy.remove();
  root.classList.remove("light");
  return { source: new XMLSerializer().serializeToString(copy), width, height };
}

// Tables --------------------------------------------------------------------------------------------------------------

function addExports(table) {
  const title = titleOf(table);
  const formats = { csv, tex: latex };
  const buttons = Object.entries(formats).map(([ending, write]) => {
    const button = node("button", { type: "button", "aria-label": `Save as ${ending}: ${title}` }, ending);
    button.addEventListener("click", () => download(title, ending, write(table)));
    return button;
  });
  const [region, tools] = [table.parentElement, node("div", { class: "tools" }, ...buttons)];
  if (region.closest(".tiles")) region.append(tools);
  else region.after(tools);
}

function titleOf(table) {
  return table.parentElement.getAttribute("aria-label").replace(/\s+/g, " ");
}

// The rows that the filter shows, as lists of cells.
function cellsOf(table) {
  return [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells]);
}

// Without notes and what is only for screen readers.
function textOf(cell) {
  const copy = cell.cloneNode(true);
  for (const part of copy.querySelectorAll(".unseen, .note, [aria-hidden]")) part.remove();
  return copy.textContent.trim();
}

// A cell that shows one number is written with all its digits.
function csv(table) {
  const field = (cell) => {
    const text = textOf(cell);
    const value = "value" in cell.dataset && /^[\d.,%-]+$/.test(text) ? cell.dataset.value : text;
    if (text === "–") return "";
    return /[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  };
  return cellsOf(table).map((row) => `${row.map(field).join(",")}\r\n`).join("");
}

function latex(table) {
  const accents = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" };
  const special = { ...accents, "–": "--", "…": "\\dots{}" };
  const escape = (text) => text.replace(/[\\~^–…&%$#_{}]/g, (c) => special[c] ?? `\\${c}`);
  const [head, ...body] = cellsOf(table).map((row) => `${row.map((cell) => escape(textOf(cell))).join(" & ")} \\\\\n`);
  const columns = `l${"r".repeat(table.rows[0].cells.length - 1)}`;
  const caption = `% ${titleOf(table)}\n`;
  return `${caption}\\begin{tabular}{${columns}}\n\\hline\n${head}\\hline\n${body.join("")}\\hline\n\\end{tabular}\n`;
}
