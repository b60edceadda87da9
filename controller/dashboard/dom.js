// Elements, and values as people read them. No markup is ever parsed from data.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return element;
}

export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const s = (tag, props, ...children) =>
  fill(document.createElementNS(SVG, tag), props, children);

/** Sets text only when it differs, so that nothing is announced or laid out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A deployment's key, which may break after a "+". */
export const keyNodes = (key) =>
  key.split("+").flatMap((term, i) => (i ? ["+", document.createElement("wbr"), term] : [term]));

/** A table in a box that scrolls sideways by itself. A column name with "#" in front has numbers. */
export function table(label, columns, rows) {
  const names = columns.map((c) => c.replace(/^#/, ""));
  const numbers = columns.map((c) => c.startsWith("#"));
  const cls = (i) => (numbers[i] ? "num" : undefined);
  const head = h("tr", {}, names.map((n, i) => h("th", { scope: "col", class: cls(i) }, n)));
  const body = rows.map((row) =>
    h("tr", {}, row.map((cell, i) => h("td", { class: cls(i) }, cell ?? "–"))));
  return h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label },
    h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
}

/** `details` whose content is made when it is opened, and again by `refresh` while it is open. */
export class Details {
  constructor(summary, make) {
    this.make = make;
    this.content = h("div", {});
    this.element = h("details", { ontoggle: () => this.refresh() },
      h("summary", {}, summary), this.content);
  }

  refresh() {
    if (!this.element.open) return;
    const [left, hadFocus] = [this.scrollLeft(), this.content.contains(document.activeElement)];
    this.content.replaceChildren(this.make());
    const box = this.content.querySelector(".scroll");
    if (box) box.scrollLeft = left;
    if (hadFocus) box?.focus();
  }

  scrollLeft() {
    return this.content.querySelector(".scroll")?.scrollLeft ?? 0;
  }
}

/** Facts as a list of names and values; those without a value are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", { class: "facts" },
    known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

export const isNumber = (v) => typeof v === "number" && Number.isFinite(v);

/** Three significant digits, without exponents for what people meet here. */
export function num(value, unknown = "–") {
  if (value === "Infinity") return "∞";
  if (!isNumber(value)) return unknown;
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (size >= 0.01 || size === 0) return value.toFixed(2);
  return value.toPrecision(2);
}

export const percent = (v, unknown = "–") =>
  isNumber(v) ? `${(100 * v).toFixed(v > 0 && v < 1 ? 1 : 0)} %` : unknown;

/** For axes: without decimals. */
export const wholePercent = (v) => `${Math.round(100 * v)} %`;

/** A length of time. */
export function seconds(v) {
  if (!isNumber(v)) return "–";
  if (v === 0) return "0 s";
  if (v < 0.0995) return `${(1000 * v).toFixed(v < 0.00995 ? 1 : 0)} ms`;
  if (v < 10) return `${v.toFixed(2)} s`;
  if (v < 120) return `${v.toFixed(0)} s`;
  if (v < 7200) return `${Math.floor(v / 60)} min ${String(Math.floor(v % 60)).padStart(2, "0")} s`;
  return `${Math.floor(v / 3600)} h ${String(Math.floor((v % 3600) / 60)).padStart(2, "0")} min`;
}

export function bytes(v) {
  if (!isNumber(v)) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (v >= size) return `${(v / size).toPrecision(3)} ${unit}`;
  }
  return `${v} B`;
}

const pad = (n) => String(n).padStart(2, "0");

/** Local time of day of seconds since 1970. */
export function clock(wall, withSeconds = true) {
  const d = new Date(wall * 1000);
  return `${pad(d.getHours())}:${pad(d.getMinutes())}${withSeconds ? `:${pad(d.getSeconds())}` : ""}`;
}

export const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

/** "MODE_ACTIVE" -> "active" */
export const word = (name, prefix) => name.replace(`${prefix}_`, "").toLowerCase().replaceAll("_", " ");

/** "tp2 pp1" */
export const shape = (tp, pp) => `tp${tp} pp${pp}`;

const seen = new Map();
/** One of eight colours for a shape of replica, the same as long as the page is open. */
export function colour(tp, pp) {
  const name = shape(tp, pp);
  if (!seen.has(name)) seen.set(name, seen.size % 8);
  return `c${seen.get(name)}`;
}
