// One chart of a report, drawn as SVG: lines over steps, costs, or how far answers can be trusted.
//
// What is unusual here: no library, and nothing is ever made from markup. Elements come from createElement, words go in
// as text, so that a run's name can do nothing. All figures stand in the page's tables already; a chart is one more way
// to read them, with the pointer, a finger or the keyboard, and it says aloud what the keyboard reads.

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
const off = new Set(); // the numbers of runs that are switched off
const charts = [];

// Small parts ---------------------------------------------------------------------------------------------------------

function colour(run) {
  return `run-${run % 8}`;
}

function mark(run, x, y, kind = "mark") {
  return shape("path", { d: MARKS[run % MARKS.length], class: kind, transform: `translate(${x} ${y})` });
}

function swatch(run) {
  const line = shape("path", { d: "M1 8H33", class: "curve", "stroke-dasharray": DASHES[run % DASHES.length] });
  const attributes = { width: 34, height: 16, viewBox: "0 0 34 16", class: colour(run), "aria-hidden": "true" };
  return shape("svg", attributes, line, mark(run, 17, 8));
}

function count(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function short(value) {
  const compact = { notation: "compact", maximumSignificantDigits: 3 };
  return value >= 1000 ? value.toLocaleString("en", compact) : count(value);
}

// Round values within a span, a few of them.
function ticks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= raw);
  const found = [];
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  for (let n = first; n <= last; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const n of high - low < 2 ? [1, 2, 5] : [1]) found.push(n * 10 ** power);
  return found.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
}

// Charts --------------------------------------------------------------------------------------------------------------
//
// kind: lines (curves over steps; they share what part of the run is shown), costs (points with intervals),
// reliability (lines that are best on the diagonal). near: how far from the cursor a point may lie to be read there.

const KINDS = {
  train_loss: { kind: "lines", x: "step", y: count, near: Infinity },
  val_loss: { kind: "lines", x: "step", y: count, near: Infinity },
  val_accuracy: { kind: "lines", x: "step", y: percent, near: Infinity },
  parameters: { kind: "costs", x: "trained parameters", y: percent, near: 0, log: true },
  minutes: { kind: "costs", x: "minutes", y: percent, near: 0 },
  calibration: { kind: "reliability", x: "probability", y: percent, near: 0.05 },
};
const shared = { view: null }; // [first, last] step shown by all curves; null: all

class Chart {
  constructor(figure, spec, series) {
    Object.assign(this, { spec, series, cursor: null, drag: null });
    this.zooms = spec.kind === "lines";
    this.title = figure.querySelector("h3").textContent;
    this.svg = shape("svg", { "aria-hidden": "true", focusable: "false" });
    this.tip = node("div", { class: "tip", "aria-hidden": "true", hidden: "" });
    const keys = this.zooms ? ", plus and minus zoom, 0 shows all" : "";
    const about = { role: "application", "aria-roledescription": "chart", tabindex: 0 };
    about["aria-label"] = `${this.title}: left and right arrow read the values${keys}`;
    this.plot = node("div", { class: "plot", ...about }, this.svg, this.tip);
    const parts = this.zooms ? [this.plot, this.tools()] : [this.plot];
    figure.querySelector("figcaption").after(...parts);
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
    this.reset = button("All steps", "All steps", () => zoom(null));
    const closer = button("+", "Zoom in", () => this.scale(0.5));
    return node("div", { class: "tools" }, closer, button("−", "Zoom out", () => this.scale(2)), this.reset);
  }

  // Scales: on a logarithmic axis 0 stands apart, left of the smallest value.

  along(x) {
    if (!this.spec.log) return x;
    return x > 0 ? Math.log10(x) : this.zero;
  }

  measure() {
    const all = this.series.flatMap((s) => s.points.map((p) => p[0]));
    if (this.spec.log) {
      const positive = all.filter((x) => x > 0).map(Math.log10);
      const [low, high] = positive.length ? [Math.min(...positive), Math.max(...positive)] : [0, 1];
      this.zero = low - Math.max(0.5, 0.15 * (high - low));
    }
    let [low, high] = [Math.min(...all.map((x) => this.along(x))), Math.max(...all.map((x) => this.along(x)))];
    if (this.spec.kind === "reliability") [low, high] = [0, 1];
    this.full = [low, high];
    if (this.zooms && shared.view) [low, high] = shared.view;
    const room = this.spec.kind === "costs" ? 0.06 * (high - low) || 0.5 : 0.015 * (high - low) || 0.5;
    this.x = [low - room, high + room];
    this.y = this.spec.kind === "reliability" ? [-0.02, 1.02] : this.heights(low, high);
  }

  heights(low, high) {
    const seen = this.visible.flatMap((s) => [...s.points, ...(s.raw ?? [])]);
    const shown = seen.filter((p) => this.along(p[0]) >= low && this.along(p[0]) <= high);
    const values = (shown.length ? shown : seen).flatMap((p) => p.slice(1));
    if (!values.length) return [0, 1];
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const room = 0.06 * (most - least) || 0.05 * Math.abs(most) || 0.05;
    return [least - room, most + room];
  }

  left(x) {
    return 1 + ((this.along(x) - this.x[0]) / (this.x[1] - this.x[0])) * (this.inner - 2);
  }

  top(y) {
    return this.tall - ((y - this.y[0]) / (this.y[1] - this.y[0])) * this.tall;
  }

  at(event) {
    const box = this.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * (this.width / box.width) - this.margin) / this.inner;
    return this.x[0] + Math.min(1, Math.max(0, share)) * (this.x[1] - this.x[0]);
  }

  // Drawing

  draw() {
    this.margin = 52;
    this.inner = Math.max(60, this.width - this.margin - 12);
    this.tall = this.spec.kind === "reliability" ? Math.min(360, this.inner) : Math.min(280, 160 + this.width / 8);
    if (this.spec.kind === "reliability") this.inner = Math.min(this.inner, 480);
    this.measure();
    const height = this.tall + 48;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    const box = { x: this.margin, y: 8, width: this.inner, height: this.tall }; // an svg in an svg cuts what is beyond
    this.over = shape("g");
    const best = this.spec.kind === "reliability" ? [this.path("guide", [[0, 0], [1, 1]])] : [];
    const lines = shape("svg", box, ...best, ...this.visible.map((s) => this.one(s)), this.over);
    this.svg.replaceChildren(...this.axes(), lines);
    if (this.zooms) this.reset.disabled = shared.view === null;
    this.point(this.cursor, false);
  }

  axes() {
    const made = [];
    const words = (x, y, anchor, text) => made.push(shape("text", { x, y, "text-anchor": anchor }, text));
    const [bottom, right] = [this.tall + 8, this.margin + this.inner];
    const form = this.spec.y === percent ? (v) => `${+(100 * v).toFixed(2)}%` : count;
    for (const y of ticks(...this.y, 5)) {
      const height = 8 + this.top(y);
      made.push(shape("line", { class: "grid", x1: this.margin, x2: right, y1: height, y2: height }));
      words(this.margin - 6, height + 4, "end", form(y));
    }
    const most = Math.max(2, Math.floor(this.inner / 65));
    let across = this.spec.log ? logTicks(...this.x) : ticks(...this.x, most);
    if (this.spec.kind !== "costs" || !this.spec.log) across = across.filter((x) => x >= 0);
    if (this.spec.log && this.full[0] === this.zero) {
      across = [0, ...across.filter((x) => this.along(x) > this.zero + 0.3)];
    }
    for (const x of across) words(this.margin + this.left(x), bottom + 16, "middle", short(x));
    made.push(shape("line", { class: "axis", x1: this.margin, x2: right, y1: bottom, y2: bottom }));
    words(this.margin + this.inner / 2, bottom + 36, "middle", this.spec.x);
    return made;
  }

  path(kind, points, attributes = {}) {
    const places = points.map(([x, y]) => `${this.left(x).toFixed(1)} ${this.top(y).toFixed(1)}`);
    return shape("path", { class: kind, d: `M${places.join("L")}`, ...attributes });
  }

  one(series) {
    const group = shape("g", { class: colour(series.run) });
    const dashes = DASHES[series.run % DASHES.length];
    if (series.raw) group.append(this.path("raw", series.raw));
    if (this.spec.kind !== "costs") group.append(this.path("curve", series.points, { "stroke-dasharray": dashes }));
    for (const [x, y, low, high] of series.points) {
      if (series.raw && series.points.length > 1) break; // every step is no place for a marker
      const [across, down] = [this.left(x), this.top(y)];
      if (low !== undefined) {
        const ends = `M${across - 4} ${this.top(low)}h8m-4 0V${this.top(high)}m-4 0h8`;
        group.append(shape("path", { class: "whisker", d: ends }));
      }
      group.append(mark(series.run, across, down, series.last ? "hollow" : "mark"));
    }
    return group;
  }

  // Reading: the cursor stands at one x; a run is read at its point that lies nearest.

  point(x, aloud) {
    this.cursor = x;
    this.over.replaceChildren();
    const found = x === null ? [] : this.readings(x);
    this.tip.hidden = !found.length;
    if (!found.length) return;
    const across = this.left(x);
    this.over.append(shape("line", { class: "cursor", x1: across, x2: across, y1: 0, y2: this.tall }));
    const said = this.spec.kind === "reliability" ? percent(x) : x.toLocaleString("en", { maximumFractionDigits: 1 });
    const title = `${this.spec.x} ${said}`;
    const rows = found.map(({ series, p }) => {
      const where = this.spec.kind === "lines" && p[0] !== x ? ` (at ${p[0]})` : "";
      const range = p.length > 2 ? `, ${percent(p[2])} to ${percent(p[3])}` : "";
      return { series, p, value: this.spec.y(p[1]) + range + where };
    });
    for (const { series, p } of rows) {
      const spot = shape("g", { class: colour(series.run) }, mark(series.run, this.left(p[0]), this.top(p[1])));
      this.over.append(spot);
    }
    const lines = rows.map(({ series, value }) =>
      node("div", {}, swatch(series.run), node("span", {}, series.name), node("strong", {}, value)));
    this.tip.replaceChildren(node("strong", {}, title), ...lines);
    this.place(this.margin + across);
    if (aloud) say(`${title}: ${rows.map(({ series, value }) => `${series.name} ${value}`).join("; ")}`);
  }

  readings(x) {
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const found = this.visible.map((series) => ({ series, p: nearest(series.points) }));
    const close = found.filter(({ p }) => Math.abs(p[0] - x) <= this.spec.near);
    return close.sort((a, b) => b.p[1] - a.p[1]);
  }

  place(across) {
    const share = this.plot.clientWidth / this.width;
    const [room, own] = [this.plot.clientWidth, this.tip.offsetWidth];
    const right = across * share + 14;
    const left = right + own <= room ? right : across * share - own - 14;
    this.tip.style.transform = `translate(${Math.max(0, Math.min(left, room - own))}px, 12px)`;
  }

  // The pointer and the keyboard

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      if (this.drag !== null) this.choose(event);
      else this.point(this.closest(this.at(event)), false);
    });
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && this.zooms && event.pointerType !== "touch") {
        this.drag = event.clientX;
        this.plot.setPointerCapture(event.pointerId);
      }
      if (event.pointerType === "touch") this.point(this.closest(this.at(event)), false);
    });
    this.plot.addEventListener("pointerup", (event) => this.chosen(event));
    this.plot.addEventListener("pointercancel", () => (this.drag = null));
    this.plot.addEventListener("pointerleave", (event) => {
      if (this.drag === null && event.pointerType !== "touch") this.point(null, false); // a finger has to leave to look
    });
    this.plot.addEventListener("blur", () => this.point(null, false));
    this.plot.addEventListener("keydown", (event) => this.key(event));
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
    return xs.reduce((a, b) => (Math.abs(this.along(b) - along) < Math.abs(this.along(a) - along) ? b : a));
  }

  choose(event) {
    const [a, b] = [this.at({ clientX: this.drag }), this.at(event)].map((x) => this.left(x)).sort((p, q) => p - q);
    this.tip.hidden = true;
    this.over.replaceChildren(shape("rect", { class: "chosen", x: a, y: 0, width: b - a, height: this.tall }));
  }

  chosen(event) {
    const from = this.drag;
    this.drag = null;
    if (from !== null && Math.abs(event.clientX - from) > 8)
      zoom([this.at({ clientX: from }), this.at(event)].sort((a, b) => a - b), this.full);
  }

  key(event) {
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
      this.point(null, false);
    } else if (this.zooms && act[event.key]) {
      act[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  }

  // To an x that may lie beyond what is shown: then what is shown moves along.
  move(x) {
    const view = this.zooms ? shared.view : null;
    if (view && (x < view[0] || x > view[1])) {
      const by = x < view[0] ? x - view[0] : x - view[1];
      zoom([view[0] + by, view[1] + by], this.full, true);
    }
    this.point(x, true);
  }

  scale(factor) {
    const [low, high] = shared.view ?? this.full;
    const middle = this.cursor ?? (low + high) / 2;
    const half = ((high - low) * factor) / 2;
    zoom([middle - half, middle + half], this.full);
  }
}

// Show these steps in all curves; null, or more than there are: all.
function zoom(view, full = null, silent = false) {
  if (view && full) {
    const least = (full[1] - full[0]) / 500;
    const [low, high] = [Math.max(full[0], view[0]), Math.min(full[1], view[1])];
    view = high - low >= full[1] - full[0] ? null : high - low < least ? shared.view : [low, high];
  }
  shared.view = view;
  for (const chart of charts) if (chart.zooms) chart.draw();
  if (!silent) say(view ? `steps ${Math.ceil(view[0])} to ${Math.floor(view[1])}` : "all steps");
}
