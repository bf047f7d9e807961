// A chart of curves over steps, drawn as SVG. Its legend has the last values, or those at the step under the pointer or
// chosen by the arrow keys.

import { make, svg } from "../common/dom.js";
import { nearest, number, range, ticks } from "./scale.js";

const HEIGHT = 230;
const EDGE = { left: 52, right: 14, top: 10, bottom: 38 };

// A series: {label, color (1 to 6), dashed, points: [[step, value or null], ...] ordered by step}.
export class Chart {
  constructor(title, unit) {
    this.title = title;
    this.series = [];
    this.step = null; // that is pointed at
    this.legend = make("ul", { class: "legend" });
    this.drawing = svg("svg", { role: "img", tabindex: "0", height: HEIGHT });
    this.at = make("span", { class: "at" });
    const stage = make("div", { class: "stage" }, this.drawing);
    const caption = make("figcaption", {}, make("strong", {}, title), unit, this.at);
    this.element = make("figure", { class: "chart" }, caption, this.legend, stage);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.choose(null));
    this.drawing.addEventListener("blur", () => this.choose(null));
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(stage);
  }

  update(series) {
    this.series = series
      .map((each) => ({ ...each, known: each.points.filter(([, value]) => value !== null) }))
      .filter(({ known }) => known.length);
    this.steps = [...new Set(this.series.flatMap(({ known }) => known.map(([step]) => step)))].sort((one, other) => one - other);
    if (!this.steps.includes(this.step)) this.step = null;
    this.drawing.setAttribute("aria-label", `${this.title}: ${this.series.map(({ label, known }) =>
      `${label} ${number(known[0][1])} at step ${known[0][0]}, ${number(known.at(-1)[1])} at step ${known.at(-1)[0]}`).join("; ")}`);
    this.draw();
    this.mark();
  }

  draw() {
    const width = this.drawing.parentNode.clientWidth;
    if (!width || !this.series.length) return;
    this.drawing.setAttribute("width", width);
    const inner = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    const [left, right] = this.steps.length > 1 ? [this.steps[0], this.steps.at(-1)] : range(this.steps);
    const [low, high] = range(this.series.flatMap(({ known }) => known.map(([, value]) => value)));
    this.x = (step) => EDGE.left + ((step - left) / (right - left)) * inner.width;
    this.y = (value) => EDGE.top + ((high - value) / (high - low)) * inner.height;
    this.stepAt = (x) => left + ((x - EDGE.left) / inner.width) * (right - left);
    this.marks = svg("g");
    this.drawing.replaceChildren(this.axes(left, right, low, high, width), ...this.series.flatMap((each) => this.line(each)), this.marks);
    this.mark();
  }

  axes(left, right, low, high, width) {
    const group = svg("g", { class: "axes" });
    const bottom = HEIGHT - EDGE.bottom;
    for (const value of ticks(low, high, 5)) {
      const y = this.y(value);
      group.append(svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }),
        svg("text", { x: EDGE.left - 8, y: y + 4, "text-anchor": "end" }, number(value)));
    }
    for (const step of ticks(left, right, width < 300 ? 4 : 6).filter(Number.isInteger)) {
      group.append(svg("text", { x: this.x(step), y: bottom + 17, "text-anchor": "middle" }, step.toLocaleString("en")));
    }
    group.append(svg("line", { class: "base", x1: EDGE.left, x2: width - EDGE.right, y1: bottom, y2: bottom }),
      svg("text", { class: "name", x: EDGE.left + (width - EDGE.left - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step"));
    return group;
  }

  // Where values are not finite the line has a gap.
  line({ color, dashed, points, known }) {
    const attributes = { class: `series-${color}${dashed ? " dashed" : ""}` };
    const isGap = (place) => place < 0 || points[place][1] === null;
    const path = points.map(([step, value], place) =>
      (isGap(place) ? "" : `${isGap(place - 1) ? "M" : "L"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`)).join("");
    const dots = known.length > 20 ? [] : known.map(([step, value]) => svg("circle", { ...attributes, cx: this.x(step), cy: this.y(value), r: 2.5 }));
    return [svg("path", { ...attributes, d: path }), ...dots];
  }

  point(event) {
    const x = event.clientX - this.drawing.getBoundingClientRect().left;
    const points = this.steps.map((step) => [step]);
    this.choose(this.steps[nearest(points, this.stepAt(x))]);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.choose(null);
    if (!move) return;
    event.preventDefault();
    const place = this.step === null ? (move > 0 ? 0 : this.steps.length - 1) : this.steps.indexOf(this.step) + move;
    this.choose(this.steps[Math.max(0, Math.min(place, this.steps.length - 1))]);
  }

  choose(step) {
    this.step = step;
    this.mark();
  }

  // Marks the chosen step, and writes the values there into the legend.
  mark() {
    const { step } = this;
    this.at.textContent = step === null ? "last values" : `step ${step.toLocaleString("en")}`;
    this.legend.replaceChildren(...this.series.map(({ label, color, dashed, known }) => {
      const point = step === null ? known.at(-1) : this.near(known);
      return make("li", {}, swatch(color, dashed), make("span", { class: "label" }, label), make("span", { class: "value" }, point ? number(point[1]) : "–"));
    }));
    if (!this.marks) return;
    this.marks.replaceChildren();
    if (step === null) return;
    this.marks.append(svg("line", { x1: this.x(step), x2: this.x(step), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    for (const { color, known } of this.series) {
      const point = this.near(known);
      if (point) this.marks.append(svg("circle", { class: `series-${color}`, cx: this.x(point[0]), cy: this.y(point[1]), r: 4.5 }));
    }
  }

  // The point that is drawn at the chosen step, or so near that nobody sees a difference.
  near(known) {
    const point = known[nearest(known, this.step)];
    return !this.x || Math.abs(this.x(point[0]) - this.x(this.step)) < 8 ? point : null;
  }
}

const swatch = (color, dashed) => make("i", { class: `swatch series-${color}${dashed ? " dashed" : ""}`, "aria-hidden": "true" });
