// Which device belongs to which replica: now, with its load, and over time.

import { Details, clock, colour, h, percent, plural, s, setText, shape, table } from "./dom.js";
import { Plot } from "./plot.js";

/** Devices of a deployment -> [id, tp, pp, devices] of their replica. */
function owners(deployment) {
  const found = new Map();
  for (const replica of deployment.replicas) {
    for (const device of replica[3]) found.set(device, replica);
  }
  return found;
}

/** "0–3, 8" */
export function spans(numbers) {
  const found = [];
  for (const n of [...numbers].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && last[1] === n - 1) last[1] = n;
    else found.push([n, n]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

export class DeviceMap {
  constructor(host) {
    this.summary = h("p", { class: "muted" }, "Nothing has been seen of the engine yet.");
    this.legend = h("ul", { class: "legend" });
    this.nodes = h("div", { class: "nodes", role: "img", "aria-label": "Devices by replica" });
    this.table = new Details("Table", () => this.tableOf());
    host.append(this.summary, this.legend, this.nodes, this.table.element);
    this.view = null;
  }

  /** `view` is {deployment, dead, replicas}, of now or of the last tick. */
  update(facts, view) {
    if (!view?.deployment) return;
    const drawn = JSON.stringify([view.deployment, view.dead, view.replicas, facts.num_devices]);
    if (drawn === this.drawn) return;
    if (!this.view && view.deployment.replicas.length <= 8 && innerWidth >= 900) this.table.element.open = true;
    Object.assign(this, { drawn, view, facts, owner: owners(view.deployment) });
    this.loads = new Map((view.replicas ?? []).map((r) => [r.id, r]));
    const idle = facts.num_devices - this.owner.size - view.dead.filter((d) => !this.owner.has(d)).length;
    const told = [
      plural(view.deployment.replicas.length, "replica"),
      `on ${this.owner.size} of ${plural(facts.num_devices, "device")}`,
      ...(idle ? [`${idle} idle`] : []),
      ...(view.dead.length ? [`${view.dead.length} lost (${spans(view.dead)})`] : []),
    ].join(", ");
    setText(this.summary, told);
    this.nodes.setAttribute("aria-label", `Devices by replica: ${told}; the table has all of it`);
    this.drawLegend();
    this.drawNodes();
    this.table.refresh();
  }

  drawLegend() {
    const counts = new Map();
    for (const [, tp, pp] of this.view.deployment.replicas) {
      const name = shape(tp, pp);
      counts.set(name, { cls: colour(tp, pp), n: (counts.get(name)?.n ?? 0) + 1 });
    }
    this.legend.replaceChildren(...[...counts].map(([name, { cls, n }]) =>
      h("li", {}, h("i", { class: `swatch ${cls}` }), `${n} × ${name}`)));
  }

  drawNodes() {
    const { num_devices: total, devices_per_node: per } = this.facts;
    const nodes = [];
    for (let first = 0; first < total; first += per) {
      const last = Math.min(first + per, total);
      const row = h("div", { class: "node-row" });
      row.style.gridTemplateColumns = `repeat(${Math.min(per, total)}, minmax(0, 1fr))`;
      for (const block of this.blocks(first, last)) row.append(block);
      nodes.push(h("div", { class: "node" },
        total > per ? h("span", { class: "node-name" }, `node ${first / per}`) : null, row));
    }
    this.nodes.classList.toggle("many", total > per);
    this.nodes.replaceChildren(...nodes);
  }

  *blocks(first, last) {
    const what = (d) => (this.view.dead.includes(d) ? "lost" : this.owner.get(d)?.[0] ?? "idle");
    for (let from = first; from < last;) {
      let to = from + 1;
      while (to < last && what(to) === what(from)) to += 1;
      yield this.block(from, to, what(from));
      from = to;
    }
  }

  block(from, to, what) {
    const where = to - from === 1 ? `device ${from}` : `devices ${from}–${to - 1}`;
    let block;
    if (what === "lost" || what === "idle") {
      block = h("div", { class: `block ${what}`, title: `${where}: ${what}` }, h("b", {}, what));
    } else {
      const [id, tp, pp] = this.owner.get(from);
      const load = this.loads.get(id);
      const bar = h("i", {});
      bar.style.width = `${100 * Math.min(1, load?.kv_usage ?? 0)}%`;
      const dead = load && !load.is_alive;
      block = h("div", {
        class: `block ${colour(tp, pp)}${dead ? " dead" : ""}`,
        title: `replica ${id} (${shape(tp, pp)}) on ${where}${this.loadText(load)}`,
      }, h("b", {}, `#${id}`), h("span", {}, dead ? "down" : shape(tp, pp)), h("u", {}, bar));
    }
    block.style.gridColumn = `span ${to - from}`;
    return block;
  }

  loadText(load) {
    if (!load) return "";
    return `: ${load.num_running ?? "?"} running, ${load.num_waiting ?? "?"} waiting, KV ${percent(load.kv_usage)}`;
  }

  tableOf() {
    const rows = (this.view?.deployment.replicas ?? []).map(([id, tp, pp, devices]) => {
      const load = this.loads.get(id);
      const state = load ? (load.is_alive ? "up" : "down") : "not reported";
      return [`#${id}`, shape(tp, pp), spans(devices), state, load?.num_running ?? "–",
        load?.num_waiting ?? "–", percent(load?.kv_usage)];
    });
    return table("Replicas", ["replica", "shape", "devices", "state", "#running", "#waiting", "#KV used"], rows);
  }
}

/** Devices upwards, time to the right, one colour for each shape of replica. */
export class Timeline extends Plot {
  constructor(host) {
    super(host, { label: "Deployment over time", height: 180 });
    this.spans = [];
  }

  update(facts, samples, deployments, t0, t1) {
    this.facts = facts;
    this.height = Math.max(110, Math.min(290, 34 + facts.num_devices * 20));
    this.spans = deploymentSpans(samples, deployments, facts.grid_s, t1);
    const shapes = new Set(this.spans.flatMap((p) => p.deployment.replicas.map((r) => shape(r[1], r[2]))));
    const keys = [...shapes].map((name) => {
      const [, tp, pp] = name.match(/tp(\d+) pp(\d+)/);
      return h("li", {}, h("i", { class: `swatch ${colour(+tp, +pp)}` }), name);
    });
    this.legend.replaceChildren(...keys);
    const seen = samples.filter((x) => x.deployment !== null);
    this.show(t0, t1, seen.map((x) => x.wall_s), (i) => {
      const { wall_s: at, deployment, epoch } = seen[i];
      return `${clock(at)}: ${deployments[deployment].key}, epoch ${epoch}`;
    });
  }

  resting() {
    return this.spans.length ? "" : "nothing yet";
  }

  drawInside(g, area) {
    const n = this.facts.num_devices;
    const y = (device) => area.y1 + (device / n) * (area.y0 - area.y1);
    const row = (area.y0 - area.y1) / n;
    for (const [device, at] of [[0, y(0) + Math.max(9, row / 2 + 4)], [n - 1, y(n) - Math.max(1, row / 2 - 4)]]) {
      g.append(s("text", { class: "axis", x: area.x0 - 6, y: at, "text-anchor": "end" }, `${device}`));
    }
    g.append(s("rect", { class: "empty", x: area.x0, y: area.y1, width: area.x1 - area.x0, height: area.y0 - area.y1 }));
    for (const one of this.spans) {
      const x0 = Math.max(area.x0, area.x(one.from));
      const x1 = Math.max(x0 + 3, area.x(one.to)); // what has just begun shows, too
      for (const [, tp, pp, devices] of one.deployment.replicas) {
        for (const [a, b] of rows(devices)) {
          const height = y(b + 1) - y(a);
          const gap = height > 5 ? 1 : 0;
          g.append(s("rect", { class: `span ${colour(tp, pp)}${gap ? "" : " thin"}`, x: x0, y: y(a) + gap / 2,
            width: Math.max(0.5, x1 - x0 - 1), height: Math.max(0.5, height - gap) }));
          if (height >= 13 && x1 - x0 > 62) {
            g.append(s("text", { class: "span-text", x: x0 + 6, y: y(a) + height / 2 + 4 }, shape(tp, pp)));
          }
        }
      }
      for (const device of one.dead) {
        g.append(s("rect", { class: "span lost", x: x0, y: y(device), width: x1 - x0, height: Math.max(1, row) }));
      }
    }
  }

  tableOf() {
    const rows = [...this.spans].reverse().map((p) => [
      clock(p.from), clock(p.to), p.deployment.key, p.epoch, p.dead.length ? spans(p.dead) : "none",
    ]);
    return table("Deployments", ["from", "to", "deployment", "#epoch", "lost devices"], rows);
  }
}

function rows(devices) {
  const found = [];
  for (const d of [...devices].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && last[1] === d - 1) last[1] = d;
    else found.push([d, d]);
  }
  return found;
}

/** Ticks in a row that saw the same deployment, each until the next tick. */
function deploymentSpans(samples, deployments, grid, now) {
  const found = [];
  samples.forEach((sample, i) => {
    if (sample.deployment === null) return;
    const next = samples[i + 1]?.wall_s ?? Math.max(now, sample.wall_s);
    const to = Math.min(next, sample.wall_s + 3 * grid);
    const last = found.at(-1);
    const same = last && last.number === sample.deployment && last.to >= sample.wall_s - 1e-6
      && String(last.dead) === String(sample.dead);
    if (same) last.to = to;
    else {
      found.push({ number: sample.deployment, deployment: deployments[sample.deployment],
        epoch: sample.epoch, dead: sample.dead, from: sample.wall_s, to });
    }
  });
  return found;
}
