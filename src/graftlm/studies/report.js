// Interaction of a report: charts (report_chart.js), files of them and of tables (report_export.js), the legend that shows
// and hides runs, the curves' axes, sorting, the filter, and printing. The tables are in the HTML already.

function drawCharts() {
  for (const figure of document.querySelectorAll("figure[data-chart]"))
    charts.push(new Chart(figure, KINDS[figure.dataset.chart], data.charts[figure.dataset.chart]));
}

// The axes of all curves ----------------------------------------------------------------------------------------------

function drawControls() {
  const controls = document.getElementById("controls");
  if (!controls) return;
  const redraw = () => charts.filter((chart) => chart.zooms).forEach((chart) => chart.draw());
  const add = (name, type, attributes, act) => {
    const input = node("input", { type, ...attributes });
    input.addEventListener("input", () => act(input));
    controls.append(node("label", {}, input, name));
  };
  const curves = Object.values(data.charts).flat().filter((series) => series.steps);
  add("Smoothing", "range", { min: 0, max: 20, value: shared.smoothing }, (input) => {
    shared.smoothing = +input.value;
    redraw();
  });
  add("Logarithmic loss and norm", "checkbox", {}, (input) => {
    shared.logY = input.checked;
    redraw();
  });
  if (!curves.every((curve) => curve.minutes)) return;
  add("Minutes instead of steps", "checkbox", {}, (input) => {
    Object.assign(shared, { x: input.checked ? "minutes" : "step", view: null });
    for (const chart of charts) if (chart.zooms) chart.cursor = null;
    redraw();
  });
}

// The legend ----------------------------------------------------------------------------------------------------------

function drawLegend() {
  const legend = document.getElementById("legend");
  if (!legend) return;
  const buttons = data.runs.map((name, run) => {
    const button = node("button", { type: "button", "aria-pressed": "true" }, swatch(run), name);
    button.addEventListener("click", () => toggle([run], off.has(run)));
    return button;
  });
  const toggle = (runs, on) => {
    for (const run of runs) {
      on ? off.delete(run) : off.add(run);
      buttons[run].setAttribute("aria-pressed", String(on));
    }
    for (const chart of charts) chart.draw();
  };
  legend.append(...buttons);
  if (buttons.length < 3) return;
  for (const [name, on] of [["Show all", true], ["Hide all", false]]) {
    const button = node("button", { type: "button", class: "all" }, name);
    button.addEventListener("click", () => toggle(buttons.keys(), on));
    legend.append(button);
  }
}

// Tables --------------------------------------------------------------------------------------------------------------

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = node("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sort(table.tBodies[0], column, up);
      announce(`sorted by ${button.textContent}, ${up ? "ascending" : "descending"}`);
    });
  });
}

// Numbers by value, names alphabetically; missing values stay at the end in both directions.
function sort(body, column, up) {
  const numbers = [...body.rows].some((row) => "value" in row.cells[column].dataset);
  const key = (row) => {
    const cell = row.cells[column];
    return numbers ? ("value" in cell.dataset ? +cell.dataset.value : null) : cell.textContent;
  };
  const order = (a, b) => (numbers ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...body.rows].sort((p, q) => {
    const [a, b] = [key(p), key(q)];
    if (a === null || b === null) return (a === null) - (b === null);
    return up ? order(a, b) : order(b, a);
  });
  body.append(...rows);
}

function makeFilter(table, number) {
  const id = `filter-${number}`;
  const input = node("input", { type: "search", id, autocomplete: "off" });
  const count = node("span", { class: "note" });
  const rows = [...table.tBodies[0].rows];
  const label = node("label", { for: id }, "Filter reviews by words");
  table.parentElement.before(node("div", { class: "filter" }, label, input, count));
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
    announce(count.textContent);
  });
}

// Open all <details> for printing, and close them afterwards.
function openForPrint() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
}

drawCharts();
drawLegend();
drawControls();
document.querySelectorAll("table.results").forEach(makeSortable);
document.querySelectorAll("table.reviews").forEach(makeFilter);
document.querySelectorAll("table").forEach(addExports);
openForPrint();
