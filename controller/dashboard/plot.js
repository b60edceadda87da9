// Small SVG plots over time: axes, lines, bands, and a cursor for pointer and arrow keys.

import { Details, clock, h, s, setText } from "./dom.js";

const RIGHT = 10, TOP = 8, BOTTOM = 22;
const STEPS_S = [5, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400];

/** Top of an axis from 0, and its step. */
export function niceTop(max) {
  if (!(max > 0)) return { top: 1, step: 0.5 };
  const unit = 10 ** Math.floor(Math.log10(max));
  const step = [0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5].map((f) => f * unit).find((f) => 4 * f >= max);
  return { top: step * Math.ceil(max / step - 1e-9), step };
}

export function timeTicks(t0, t1, most) {
  const step = STEPS_S.find((f) => (t1 - t0) / f <= most) ?? 28800;
  const offset = new Date(t0 * 1000).getTimezoneOffset() * 60;
  const first = Math.ceil((t0 - offset) / step) * step + offset;
  const ticks = [];
  for (let t = first; t <= t1; t += step) ticks.push(t);
  return { ticks, withSeconds: step < 60 };
}

/** `keys` are [class, text]. */
export const legend = (keys) => h("ul", { class: "legend" },
  keys.map(([cls, text]) => h("li", {}, h("i", { class: `key ${cls}` }), text)));

/** Shared frame: subclasses give `drawInside(g, area)` and `tableOf()`. */
export class Plot {
  /** `label` names the plot; `height` in px; `keys` are [class, text] of the legend. */
  constructor(host, { label, height, left = 40, keys = [], title = "" }) {
    Object.assign(this, { label, height, left, times: [], cursor: null });
    this.svg = s("svg", {
      tabindex: "0", role: "slider", "aria-label": label, "aria-valuemin": "0",
      "aria-orientation": "horizontal",
      onkeydown: (e) => this.onKey(e), onpointermove: (e) => this.onPointer(e),
      onpointerleave: () => this.point(null), onblur: () => this.point(null),
    });
    this.readout = h("p", { class: "readout", "aria-hidden": "true" });
    this.legend = legend(keys);
    this.table = new Details("Table", () => this.tableOf());
    this.heading = title ? h("h3", {}, title) : null;
    this.element = h("figure", { class: "plot" },
      h("figcaption", {}, this.heading, this.legend, this.readout), this.svg, this.table.element);
    host.append(this.element);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /** `times` are those that the cursor stops at; `describe(i)` says what is there. */
  show(t0, t1, times, describe) {
    const atEnd = this.cursor === null || this.cursor >= this.times.length - 1;
    Object.assign(this, { t0, t1, times, describe });
    if (this.cursor !== null && (atEnd || this.cursor >= times.length)) {
      this.cursor = times.length ? times.length - 1 : null;
    }
    this.draw();
    this.table.refresh();
  }

  draw() {
    const width = Math.floor(this.element.clientWidth);
    if (!width || this.t1 === undefined) return;
    const area = {
      x0: this.left, x1: width - RIGHT, y0: this.height - BOTTOM, y1: TOP,
      x: (t) => this.left + ((t - this.t0) / (this.t1 - this.t0)) * (width - RIGHT - this.left),
    };
    this.area = area;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    const g = s("g", {});
    this.drawInside(g, area);
    this.drawTimes(g, area, width);
    this.mark = s("line", { class: "cursor", y1: area.y1, y2: area.y0, visibility: "hidden" });
    g.append(this.mark);
    this.svg.replaceChildren(g);
    this.point(this.cursor);
  }

  drawTimes(g, area, width) {
    const { ticks, withSeconds } = timeTicks(this.t0, this.t1, Math.max(2, width / 90));
    for (const t of ticks) {
      const x = area.x(t);
      g.append(s("line", { class: "tick", x1: x, x2: x, y1: area.y0, y2: area.y0 + 4 }));
      if (x < area.x0 + 12 || x > area.x1 - 12) continue;
      g.append(s("text", { class: "axis", x, y: this.height - 5, "text-anchor": "middle" },
        clock(t, withSeconds)));
    }
    g.append(s("line", { class: "base", x1: area.x0, x2: area.x1, y1: area.y0, y2: area.y0 }));
  }

  // ------------------------------------------------------------ the cursor

  onKey(event) {
    const last = this.times.length - 1;
    const at = this.cursor ?? last;
    const to = {
      ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
      PageUp: at + 10, PageDown: at - 10, Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.point(Math.max(0, Math.min(last, to)));
  }

  onPointer(event) {
    if (!this.times.length || !this.area) return;
    const box = this.svg.getBoundingClientRect();
    const x = event.clientX - box.left;
    let best = 0;
    for (let i = 1; i < this.times.length; i += 1) {
      if (Math.abs(this.area.x(this.times[i]) - x) < Math.abs(this.area.x(this.times[best]) - x)) best = i;
    }
    this.point(best);
  }

  point(index) {
    this.cursor = index;
    const last = this.times.length - 1;
    const shown = index ?? last;
    this.svg.setAttribute("aria-valuemax", Math.max(0, last));
    this.svg.setAttribute("aria-valuenow", Math.max(0, shown));
    const text = shown >= 0 ? this.describe(shown) : "nothing yet";
    this.svg.setAttribute("aria-valuetext", text);
    setText(this.readout, index === null ? this.resting() : text);
    if (!this.mark) return;
    this.mark.setAttribute("visibility", index === null ? "hidden" : "visible");
    if (index === null) return;
    const x = this.area.x(this.times[index]);
    this.mark.setAttribute("x1", x);
    this.mark.setAttribute("x2", x);
  }

  /** What stands there while nobody points. */
  resting() {
    return "";
  }
}

/** Lines, and optionally a band, over a vertical axis from zero. */
export class LinePlot extends Plot {
  /** `series` are {name, cls, format}; `top` fixes the axis. */
  constructor(host, options) {
    super(host, {
      ...options,
      keys: options.isKeyed === false ? [] : options.series.map((one) => [one.cls, one.name]),
    });
    Object.assign(this, { series: options.series, top: options.top, axis: options.axis });
    this.data = { values: [], band: [] };
  }

  /** `values[series][i]` and `band[i]` = [low, high] at `times[i]`; null where unknown. */
  update(t0, t1, times, values, band = []) {
    this.data = { values, band };
    this.show(t0, t1, times, (i) => `${clock(times[i])}: ${this.at(i)}`);
  }

  at(i) {
    const parts = this.series.map((one, k) => `${one.name} ${one.format(this.data.values[k][i])}`);
    return parts.join(", ");
  }

  resting() {
    const last = this.times.length - 1;
    return last < 0 ? "nothing yet" : "";
  }

  drawInside(g, area) {
    const highest = [...this.data.values.flat(), ...this.data.band.map((b) => b?.[1])];
    const max = this.top ?? highest.reduce((a, v) => (v > a ? v : a), 0);
    const { top, step } = niceTop(max);
    const y = (v) => area.y0 - (Math.min(v, top) / top) * (area.y0 - area.y1);
    for (let v = 0; v <= top + step / 2; v += step) {
      g.append(s("line", { class: "grid", x1: area.x0, x2: area.x1, y1: y(v), y2: y(v) }));
      g.append(s("text", { class: "axis", x: area.x0 - 6, y: y(v) + 4, "text-anchor": "end" },
        this.axis(v)));
    }
    this.drawBand(g, area, y);
    this.series.forEach((one, k) => {
      const d = path(this.times, this.data.values[k], area.x, y);
      g.append(s("path", { class: `line ${one.cls}`, d }));
      const dots = loneDots(this.data.values[k]);
      for (const i of dots) {
        g.append(s("circle", { class: `dot ${one.cls}`, r: 2.5, cx: area.x(this.times[i]), cy: y(this.data.values[k][i]) }));
      }
    });
  }

  drawBand(g, area, y) {
    for (const [from, to] of runs(this.data.band)) {
      const up = [], down = [];
      for (let i = from; i < to; i += 1) {
        const x = area.x(this.times[i]).toFixed(1);
        up.push(`${x},${y(this.data.band[i][1]).toFixed(1)}`);
        down.unshift(`${x},${y(this.data.band[i][0]).toFixed(1)}`);
      }
      g.append(s("polygon", { class: "band", points: [...up, ...down].join(" ") }));
    }
  }

  tableOf() {
    return this.makeTable(this.times, this.data);
  }
}

/** [from, to) of what is known, in a row. */
function runs(values) {
  const found = [];
  values.forEach((v, i) => {
    if (v === null || v === undefined) return;
    const last = found.at(-1);
    if (last && last[1] === i) last[1] = i + 1;
    else found.push([i, i + 1]);
  });
  return found;
}

const loneDots = (values) => runs(values).filter(([a, b]) => b - a === 1).map(([a]) => a);

function path(times, values, x, y) {
  return runs(values).map(([from, to]) => {
    const points = [];
    for (let i = from; i < to; i += 1) points.push(`${x(times[i]).toFixed(1)},${y(values[i]).toFixed(1)}`);
    return `M${points.join("L")}`;
  }).join("");
}
