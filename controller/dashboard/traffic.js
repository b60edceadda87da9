// Forecast against actual for each type of requests; queue, KV cache and service level.

import { clock, h, num, percent, table, wholePercent } from "./dom.js";
import { LinePlot, legend } from "./plot.js";

const ROWS = 40; // of a table, newest first

const newest = (times) => times.map((_, i) => i).slice(-ROWS).reverse();

export class TrafficPanel {
  constructor(host) {
    this.note = h("p", { class: "muted" }, "Nothing yet.");
    this.grid = h("div", { class: "plots" });
    host.append(this.note, legend([["one", "actual"], ["two", "forecast"], ["band", "median to high forecast"]]), this.grid);
    this.plots = new Map();
  }

  update(facts, samples, t0, t1) {
    this.note.textContent =
      `Requests per second by type, forecast by ${facts.predictor}. The forecast stands at the ` +
      "time that it was made for.";
    for (const type of facts.types) this.plotOf(type).update(...this.dataOf(facts, type, samples, t0, t1));
  }

  plotOf(type) {
    if (!this.plots.has(type.name)) {
      const about = `${num(type.prompt_tokens)} in, ${num(type.output_tokens)} out`;
      const plot = new LinePlot(this.grid, {
        label: `Forecast against actual: ${type.name}`, title: h("span", {}, type.name, " ", h("small", {}, `${about} tokens`)),
        height: 130, axis: (v) => num(v), isKeyed: false,
        series: [
          { name: "actual", cls: "one", format: (v) => num(v) },
          { name: "forecast", cls: "two", format: (v) => num(v) },
        ],
      });
      plot.makeTable = (times, { values, band }) => table(`Forecast against actual, ${type.name}`,
        ["time", "#actual/s", "#forecast/s", "#high/s"],
        newest(times).map((i) => [clock(times[i]), num(values[0][i]), num(values[1][i]), num(band[i]?.[1])]));
      this.plots.set(type.name, plot);
    }
    return this.plots.get(type.name);
  }

  /** What a tick forecasts is for the interval that ends at the next tick, the last one's too. */
  dataOf(facts, type, samples, t0, t1) {
    const rate = (x) => x?.rates.find((r) => r[0] === type.name);
    const [times, known] = [samples.map((x) => x.wall_s), samples.map(rate)];
    if (times.length) times.push(times.at(-1) + facts.grid_s);
    const made = times.map((t, i) => (i > 0 && t - times[i - 1] < 3 * facts.grid_s ? known[i - 1] : undefined));
    return [t0, t1, times,
      [times.map((_, i) => known[i]?.[3] ?? null), made.map((r) => r?.[1] ?? null)],
      made.map((r) => (r ? [r[1], Math.max(r[1], r[2])] : null))];
  }
}

export class ServicePanel {
  constructor(host) {
    this.note = h("p", { class: "muted" });
    this.grid = h("div", { class: "plots three" });
    host.append(this.note, this.grid);
    const count = (v) => (v === null ? "unknown" : num(v));
    this.queue = this.plot("Queue", "requests", (v) => num(v), undefined, [
      { name: "waiting", cls: "one", format: count }, { name: "running", cls: "two", format: count }]);
    this.slo = this.plot("Within targets", "share of requests", wholePercent, 1, [
      { name: "within targets", cls: "one", format: (v) => percent(v, "nothing ended") }]);
    this.kv = this.plot("KV cache", "fullest replica", wholePercent, 1, [
      { name: "used", cls: "one", format: (v) => percent(v, "unknown") }]);
  }

  plot(title, unit, axis, top, series) {
    const plot = new LinePlot(this.grid, { label: title, title: h("span", {}, title, " ", h("small", {}, unit)),
      height: 150, axis, top, series, left: 46 });
    plot.makeTable = (times, { values }) => table(title, ["time", ...series.map((one) => `#${one.name}`)],
      newest(times).map((i) => [clock(times[i]), ...series.map((one, k) => one.format(values[k][i]))]));
    return plot;
  }

  update(facts, samples, t0, t1) {
    this.note.textContent = targetsText(facts.slo);
    const times = samples.map((x) => x.wall_s);
    const of = (name) => samples.map((x) => x[name] ?? null);
    this.queue.update(t0, t1, times, [of("num_waiting"), of("num_running")]);
    this.slo.update(t0, t1, times, [samples.map(attainment)]);
    this.kv.update(t0, t1, times, [of("kv_usage")]);
  }
}

export const attainment = (x) => (x?.num_ended ? x.num_good / x.num_ended : null);

export function targetsText(slo) {
  if (!slo.ttft_s && !slo.tpot_s) return "No targets yet: nothing has ended.";
  const per = slo.ttft_per_prompt_token_s ? ` + ${num(1000 * slo.ttft_per_prompt_token_s)} ms per prompt token` : "";
  const first = slo.ttft_s ? `first token within ${num(slo.ttft_s)} s${per}` : "";
  const next = slo.tpot_s ? `each further one within ${num(1000 * slo.tpot_s)} ms` : "";
  const from = slo.is_given ? "" : " (no targets are given for this pool: twice the slowest tenth of late)";
  return `Targets: ${[first, next].filter(Boolean).join(", ")}${from}.`;
}
