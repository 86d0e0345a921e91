// A chart of a report as SVG: curves over steps, accuracy by cost, or calibration. No library is used.
//
// The page's tables contain the same figures. A chart can be read with the pointer, by touch and with the keyboard, which
// also announces the values to screen readers.

const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "8 4", "2 3", "10 3 2 3", "14 5", "5 2", "8 3 2 3 2 3"];
const MARKS = [
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
  "M-4 -4H4V4H-4Z",
  "M0 -5L5 4H-5Z",
  "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
  "M0 5L5 -4H-5Z",
  "M-2 -5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
];
const off = new Set(); // numbers of hidden runs
const charts = [];

// Helpers -------------------------------------------------------------------------------------------------------------

function colour(run) {
  return `run-${run % 8}`;
}

function mark(run, x, y, kind = "mark") {
  return svgNode("path", { d: MARKS[run % MARKS.length], class: kind, transform: `translate(${x} ${y})` });
}

function swatch(run) {
  const line = svgNode("path", { d: "M1 8H33", class: "curve", "stroke-dasharray": DASHES[run % DASHES.length] });
  const attributes = { width: 34, height: 16, viewBox: "0 0 34 16", class: colour(run), "aria-hidden": "true" };
  return svgNode("svg", attributes, line, mark(run, 17, 8));
}

function count(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function short(value) {
  const compact = { notation: "compact", maximumSignificantDigits: 3 };
  return value >= 1000 ? value.toLocaleString("en", compact) : count(value);
}

// About `most` round values from low to high.
function ticks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= raw);
  const found = [];
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  for (let n = first; n <= last; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

// Round values whose logarithms are from low to high; evenly spaced ones if these are close.
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const n of high - low < 2 ? [1, 2, 5] : [1]) found.push(n * 10 ** power);
  const shown = found.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
  return shown.length > 2 ? shown : ticks(10 ** low, 10 ** high, 5);
}

// The mean of each y and its `reach` neighbours on either side; fewer at the ends, so the curve is not delayed.
function movingAverage(points, reach) {
  const sums = [0];
  for (const [, y] of points) sums.push(sums.at(-1) + y);
  return points.map(([x], i) => {
    const near = Math.min(reach, i, points.length - 1 - i);
    return [x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)];
  });
}

// Charts --------------------------------------------------------------------------------------------------------------
//
// kind: lines (curves over steps or minutes, with a common zoom), costs (points with intervals), reliability (the
// diagonal is ideal). near: the maximum distance of a point from the cursor to be read. noisy: the curve is smoothed.
// logY: its axis may be logarithmic.

const LINES = { kind: "lines", y: count, near: Infinity };
const KINDS = {
  train_loss: { ...LINES, noisy: true, logY: true },
  val_loss: { ...LINES, logY: true },
  val_accuracy: { ...LINES, y: percent },
  lr: LINES,
  grad_norm: { ...LINES, noisy: true, logY: true },
  parameters: { kind: "costs", x: "trainable parameters", y: percent, near: 0, log: true },
  minutes: { kind: "costs", x: "minutes", y: percent, near: 0 },
  calibration: { kind: "reliability", x: "probability", y: percent, near: 0.05 },
};
// Of all curves. view: the zoom, as first and last x, or null for all; smoothing: the neighbours that are averaged on
// either side, in percent of the curve.
const shared = { view: null, x: "step", logY: false, smoothing: 2 };

class Chart {
  constructor(figure, spec, series) {
    Object.assign(this, { spec, series, curves: series, cursor: null, drag: null });
    this.zooms = spec.kind === "lines";
    this.title = figure.querySelector("h3").textContent;
    this.svg = svgNode("svg", { "aria-hidden": "true", focusable: "false" });
    this.tip = node("div", { class: "tip", "aria-hidden": "true", hidden: "" });
    const keys = this.zooms ? ", plus and minus zoom, 0 shows all" : "";
    const about = { role: "application", "aria-roledescription": "chart", tabindex: 0 };
    about["aria-label"] = `${this.title}: left and right arrow read the values${keys}`;
    this.plot = node("div", { class: "plot", ...about }, this.svg, this.tip);
    figure.querySelector("figcaption").after(this.plot, this.tools());
    this.width = this.plot.clientWidth;
    this.listen();
    this.draw();
  }

  get visible() {
    return this.series.filter((s) => !off.has(s.run));
  }

  get xs() {
    const all = this.visible.flatMap((s) => s.points.map((p) => p[0]));
    return [...new Set(all)].sort((a, b) => a - b);
  }

  tools() {
    const button = (sign, name, act) => {
      const made = node("button", { type: "button", "aria-label": `${name}: ${this.title}` }, sign);
      made.addEventListener("click", act);
      return made;
    };
    const found = ["SVG", "PNG"].map((format) => button(format, `Save as ${format}`, () => saveChart(this, format)));
    if (this.zooms) {
      this.reset = button("Whole curve", "Whole curve", () => zoom(null));
      found.unshift(
        button("+", "Zoom in", () => this.scale(0.5)), button("−", "Zoom out", () => this.scale(2)), this.reset);
    }
    return node("div", { class: "tools" }, ...found);
  }

  // The points of curves, as the common settings say.
  setPoints() {
    this.series = this.curves.map((curve) => {
      const xs = shared.x === "step" ? curve.steps : curve.minutes;
      const raw = xs.map((x, i) => [x, curve.values[i]]).filter(([, y]) => y > 0 || !this.log);
      const reach = this.spec.noisy ? Math.floor((raw.length * shared.smoothing) / 100) : 0;
      return reach ? { ...curve, raw, points: movingAverage(raw, reach) } : { ...curve, points: raw };
    }).filter((curve) => curve.points.length);
  }

  get log() {
    return shared.logY && this.spec.logY;
  }

  get unit() {
    return this.zooms ? shared.x : this.spec.x;
  }

  // Scales. On a logarithmic axis 0 is placed left of the smallest value.

  scaled(x) {
    if (!this.spec.log) return x;
    return x > 0 ? Math.log10(x) : this.zero;
  }

  setScales() {
    const all = this.series.flatMap((s) => s.points.map((p) => p[0]));
    if (this.spec.log) {
      const positive = all.filter((x) => x > 0).map(Math.log10);
      const [low, high] = positive.length ? [Math.min(...positive), Math.max(...positive)] : [0, 1];
      this.zero = low - Math.max(0.5, 0.15 * (high - low));
    }
    let [low, high] = [Math.min(...all.map((x) => this.scaled(x))), Math.max(...all.map((x) => this.scaled(x)))];
    if (this.spec.kind === "reliability") [low, high] = [0, 1];
    this.full = [low, high];
    if (this.zooms && shared.view) [low, high] = shared.view;
    const room = this.spec.kind === "costs" ? 0.06 * (high - low) || 0.5 : 0.015 * (high - low) || 0.5;
    this.x = [low - room, high + room];
    this.y = this.spec.kind === "reliability" ? [-0.02, 1.02] : this.yRange(low, high);
  }

  yRange(low, high) {
    const seen = this.visible.flatMap((s) => [...s.points, ...(s.raw ?? [])]);
    const shown = seen.filter((p) => this.scaled(p[0]) >= low && this.scaled(p[0]) <= high);
    const values = (shown.length ? shown : seen).flatMap((p) => p.slice(1)).map((y) => this.scaledY(y));
    if (!values.length) return [0, 1];
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const room = 0.06 * (most - least) || 0.05 * Math.abs(most) || 0.05;
    return [least - room, most + room];
  }

  left(x) {
    return 1 + ((this.scaled(x) - this.x[0]) / (this.x[1] - this.x[0])) * (this.plotWidth - 2);
  }

  scaledY(y) {
    return this.log ? Math.log10(y) : y;
  }

  top(y) {
    return this.height - ((this.scaledY(y) - this.y[0]) / (this.y[1] - this.y[0])) * this.height;
  }

  xAt(event) {
    const box = this.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (this.width / box.width) - this.margin) / this.plotWidth;
    return this.x[0] + Math.min(1, Math.max(0, share)) * (this.x[1] - this.x[0]);
  }

  // Drawing

  draw() {
    if (this.zooms) this.setPoints();
    this.margin = 52;
    this.plotWidth = Math.max(60, this.width - this.margin - 12);
    this.height = this.spec.kind === "reliability" ? Math.min(360, this.plotWidth) : Math.min(280, 160 + this.width / 8);
    if (this.spec.kind === "reliability") this.plotWidth = Math.min(this.plotWidth, 480);
    this.setScales();
    const height = this.height + 48;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    const box = { x: this.margin, y: 8, width: this.plotWidth, height: this.height }; // a nested svg clips what exceeds it
    this.over = svgNode("g");
    const best = this.spec.kind === "reliability" ? [this.path("guide", [[0, 0], [1, 1]])] : [];
    const lines = svgNode("svg", box, ...best, ...this.visible.map((s) => this.drawSeries(s)), this.over);
    this.svg.replaceChildren(...this.axes(), lines);
    if (this.zooms) this.reset.disabled = shared.view === null;
    this.setCursor(this.cursor, false);
  }

  axes() {
    const made = [];
    const words = (x, y, anchor, text) => made.push(svgNode("text", { x, y, "text-anchor": anchor }, text));
    const [bottom, right] = [this.height + 8, this.margin + this.plotWidth];
    const form = this.spec.y === percent ? (v) => `${+(100 * v).toFixed(2)}%` : count;
    for (const y of this.log ? logTicks(...this.y) : ticks(...this.y, 5)) {
      const height = 8 + this.top(y);
      made.push(svgNode("line", { class: "grid", x1: this.margin, x2: right, y1: height, y2: height }));
      words(this.margin - 6, height + 4, "end", form(y));
    }
    const most = Math.max(2, Math.floor(this.plotWidth / 65));
    let across = this.spec.log ? logTicks(...this.x) : ticks(...this.x, most);
    if (this.spec.kind !== "costs" || !this.spec.log) across = across.filter((x) => x >= 0);
    if (this.unit === "step") across = across.filter(Number.isInteger);
    if (this.spec.log && this.full[0] === this.zero) {
      across = [0, ...across.filter((x) => this.scaled(x) > this.zero + 0.3)];
    }
    for (const x of across) words(this.margin + this.left(x), bottom + 16, "middle", short(x));
    made.push(svgNode("line", { class: "axis", x1: this.margin, x2: right, y1: bottom, y2: bottom }));
    words(this.margin + this.plotWidth / 2, bottom + 36, "middle", this.unit);
    return made;
  }

  path(kind, points, attributes = {}) {
    const places = points.map(([x, y]) => `${this.left(x).toFixed(1)} ${this.top(y).toFixed(1)}`);
    return svgNode("path", { class: kind, d: `M${places.join("L")}`, ...attributes });
  }

  drawSeries(series) {
    const group = svgNode("g", { class: colour(series.run) });
    const dashes = DASHES[series.run % DASHES.length];
    if (series.raw) group.append(this.path("raw", series.raw));
    if (this.spec.kind !== "costs") group.append(this.path("curve", series.points, { "stroke-dasharray": dashes }));
    const dense = this.spec.kind === "lines" && series.points.length > (this.spec.noisy ? 1 : this.plotWidth / 10);
    for (const [x, y, low, high] of dense ? [] : series.points) {
      const [across, down] = [this.left(x), this.top(y)];
      if (low !== undefined) {
        const ends = `M${across - 4} ${this.top(low)}h8m-4 0V${this.top(high)}m-4 0h8`;
        group.append(svgNode("path", { class: "whisker", d: ends }));
      }
      group.append(mark(series.run, across, down, series.last ? "hollow" : "mark"));
    }
    return group;
  }

  // The cursor is at one x; each run shows its nearest point.

  setCursor(x, aloud) {
    this.cursor = x;
    this.over.replaceChildren();
    const found = x === null ? [] : this.nearest(x);
    this.tip.hidden = !found.length;
    if (!found.length) return;
    const across = this.left(x);
    this.over.append(svgNode("line", { class: "cursor", x1: across, x2: across, y1: 0, y2: this.height }));
    const digits = { maximumFractionDigits: this.unit === "minutes" ? 2 : 1 };
    const said = this.spec.kind === "reliability" ? percent(x) : x.toLocaleString("en", digits);
    const title = `${this.unit} ${said}`;
    const rows = found.map(({ series, p }) => {
      const where = this.spec.kind === "lines" && p[0] !== x ? ` (at ${p[0]})` : "";
      const range = p.length > 2 ? `, ${percent(p[2])} to ${percent(p[3])}` : "";
      return { series, p, value: this.spec.y(p[1]) + range + where };
    });
    for (const { series, p } of rows) {
      const spot = svgNode("g", { class: colour(series.run) }, mark(series.run, this.left(p[0]), this.top(p[1])));
      this.over.append(spot);
    }
    const lines = rows.map(({ series, value }) =>
      node("div", {}, swatch(series.run), node("span", {}, series.name), node("strong", {}, value)));
    this.tip.replaceChildren(node("strong", {}, title), ...lines);
    this.placeTip(this.margin + across);
    if (aloud) announce(`${title}: ${rows.map(({ series, value }) => `${series.name} ${value}`).join("; ")}`);
  }

  nearest(x) {
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const found = this.visible.map((series) => ({ series, p: nearest(series.points) }));
    const close = found.filter(({ p }) => Math.abs(p[0] - x) <= this.spec.near);
    return close.sort((a, b) => b.p[1] - a.p[1]);
  }

  placeTip(across) {
    const share = this.plot.clientWidth / this.width;
    const [room, own] = [this.plot.clientWidth, this.tip.offsetWidth];
    const right = across * share + 14;
    const left = right + own <= room ? right : across * share - own - 14;
    this.tip.style.transform = `translate(${Math.max(0, Math.min(left, room - own))}px, 12px)`;
  }

  // Pointer and keyboard

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      if (this.drag !== null) this.drawSelection(event);
      else this.setCursor(this.closest(this.xAt(event)), false);
    });
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && this.zooms && event.pointerType !== "touch") {
        this.drag = event.clientX;
        this.plot.setPointerCapture(event.pointerId);
      }
      if (event.pointerType === "touch") this.setCursor(this.closest(this.xAt(event)), false);
    });
    this.plot.addEventListener("pointerup", (event) => this.endDrag(event));
    this.plot.addEventListener("pointercancel", () => (this.drag = null));
    this.plot.addEventListener("pointerleave", (event) => {
      if (this.drag === null && event.pointerType !== "touch") this.setCursor(null, false); // keep it visible after a touch
    });
    this.plot.addEventListener("blur", () => this.setCursor(null, false));
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => {
      if (this.plot.clientWidth && this.plot.clientWidth !== this.width) {
        this.width = this.plot.clientWidth;
        this.draw();
      }
    }).observe(this.plot);
  }

  closest(along) {
    const xs = this.xs;
    if (!xs.length) return null;
    return xs.reduce((a, b) => (Math.abs(this.scaled(b) - along) < Math.abs(this.scaled(a) - along) ? b : a));
  }

  drawSelection(event) {
    const [a, b] = [this.xAt({ clientX: this.drag }), this.xAt(event)].map((x) => this.left(x)).sort((p, q) => p - q);
    this.tip.hidden = true;
    this.over.replaceChildren(svgNode("rect", { class: "chosen", x: a, y: 0, width: b - a, height: this.height }));
  }

  endDrag(event) {
    const from = this.drag;
    this.drag = null;
    if (from !== null && Math.abs(event.clientX - from) > 8)
      zoom([this.xAt({ clientX: from }), this.xAt(event)].sort((a, b) => a - b), this.full);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const xs = this.xs;
    const here = xs.indexOf(this.cursor);
    const end = xs.length - 1;
    const to = { ArrowRight: here + 1, ArrowLeft: here < 0 ? end : here - 1, Home: 0, End: end }[event.key];
    const closer = () => this.scale(0.5);
    const act = { "+": closer, "=": closer, "-": () => this.scale(2), 0: () => zoom(null) };
    if (to !== undefined && xs.length) {
      this.move(xs[Math.min(end, Math.max(0, to))]);
    } else if (event.key === "Escape") {
      this.setCursor(null, false);
    } else if (this.zooms && act[event.key]) {
      act[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  }

  // Move the cursor; a zoomed view scrolls along.
  move(x) {
    const view = this.zooms ? shared.view : null;
    if (view && (x < view[0] || x > view[1])) {
      const by = x < view[0] ? x - view[0] : x - view[1];
      zoom([view[0] + by, view[1] + by], this.full, true);
    }
    this.setCursor(x, true);
  }

  scale(factor) {
    const [low, high] = shared.view ?? this.full;
    const middle = this.cursor ?? (low + high) / 2;
    const half = ((high - low) * factor) / 2;
    zoom([middle - half, middle + half], this.full);
  }
}

// Zoom all curves to this range of x; null, or a wider range than the data, shows all.
function zoom(view, full = null, silent = false) {
  if (view && full) {
    const least = (full[1] - full[0]) / 500;
    const [low, high] = [Math.max(full[0], view[0]), Math.min(full[1], view[1])];
    view = high - low >= full[1] - full[0] ? null : high - low < least ? shared.view : [low, high];
  }
  shared.view = view;
  for (const chart of charts) if (chart.zooms) chart.draw();
  const ends = view && (shared.x === "step" ? [Math.ceil(view[0]), Math.floor(view[1])] : view.map(short));
  if (!silent) announce(view ? `${shared.x} ${ends[0]} to ${ends[1]}` : "whole curve");
}
