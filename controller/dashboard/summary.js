// The figures on top, and what is known of policy and guardrails.

import { Details, facts, h, isNumber, keyNodes, num, percent, plural, seconds, setText, table } from "./dom.js";
import { attainment } from "./traffic.js";

export class Tiles {
  constructor(host) {
    this.tiles = {};
    const list = h("dl", { class: "tiles" });
    for (const name of ["Deployment", "Queue", "Within targets", "First token", "Next decision"]) {
      const [big, small] = [h("strong", {}, "–"), h("span", { class: "muted" })];
      this.tiles[name] = { big, small };
      list.append(h("div", {}, h("dt", {}, name), h("dd", {}, big, small)));
    }
    host.append(list);
  }

  set(name, big, small) {
    setText(this.tiles[name].big, big);
    setText(this.tiles[name].small, small);
  }

  /** `last` is the newest tick that saw the engine, `view` the engine at this moment. */
  update({ facts: f, state, last, view, now, lastTick, isOld }) {
    const key = view?.deployment?.key ?? state?.deployment_key;
    const { big } = this.tiles.Deployment;
    if (key && big.textContent !== key) big.replaceChildren(...keyNodes(key));
    this.set("Deployment", key || "unknown", key ? `epoch ${view?.epoch ?? state.epoch}` : "not seen yet");
    this.setQueue(view, last);
    this.set("Within targets", percent(attainment(last)),
      last?.num_ended ? `of ${plural(last.num_ended, "request")} in the last interval` : "no request ended in the last interval");
    this.set("First token", seconds(last?.ttft_s), isNumber(last?.tpot_s) ? `then ${seconds(last.tpot_s)} per token` : "nothing served lately");
    const due = lastTick ? Math.max(0, lastTick.wall_s + f.grid_s - now) : f.grid_s;
    const actor = !state ? "" : state.actor === "policy" ? `by ${state.policy}` : `by the ${state.actor === "safe" ? "safe plan" : state.actor}`;
    if (isOld) this.set("Next decision", "unknown", "what is shown is old");
    else if (state?.mode === "MODE_OFF") this.set("Next decision", "none", "the mode is off");
    else this.set("Next decision", `in ${Math.ceil(due)} s`, actor);
  }

  setQueue(view, last) {
    const known = view?.replicas?.filter((r) => isNumber(r.num_waiting) && isNumber(r.num_running));
    const sum = (name) => known.reduce((a, r) => a + r[name], 0);
    const [waiting, running] = known
      ? [sum("num_waiting") + view.num_queued_unrouted, sum("num_running")]
      : [last?.num_waiting, last?.num_running];
    this.set("Queue", isNumber(waiting) ? `${waiting} waiting` : "–", isNumber(running) ? `${running} running` : "unknown");
  }
}

export class TrustPanel {
  constructor(host) {
    this.about = h("div", {});
    this.rules = new Details("Guardrails", () => this.rulesTable());
    this.counters = new Details("Counters since the start", () => this.countersTable());
    host.append(this.about, this.rules.element, this.counters.element);
  }

  update(state, f) {
    Object.assign(this, { state, rulesOf: f.rules });
    const c = state.canary;
    const told = [
      ["policy", state.policy + (state.policy_digest ? ` (${state.policy_digest})` : "")],
      ["decided by", state.actor],
      ["circuit breaker", state.breaker.replace("_", " ") + (state.breaker_reason ? `: ${state.breaker_reason}` : "")],
      ["canary", c ? `${c.name} in ${percent(c.fraction)} of blocks, now ${c.arm}; evidence against it ${num(c.evidence)} of ${num(c.threshold)}` : "none"],
      ["shadows", state.shadows.join(", ") || "none"],
      ["retraining", state.retraining.join("; ") || "not advised"],
      ["log records lost", state.num_log_records_lost || ""],
      ["up for", seconds(state.uptime_s)],
      ["grid", `a decision every ${seconds(state.grid_s)}`],
    ];
    const key = JSON.stringify(told);
    if (key !== this.key) this.about.replaceChildren(facts(told));
    this.key = key;
    this.counters.refresh();
  }

  rulesTable() {
    return table("Guardrails in their order", ["rule", "against a switch because"], Object.entries(this.rulesOf ?? {}));
  }

  countersTable() {
    const rows = Object.entries(this.state?.counters ?? {}).map(([n, v]) => [n.replace("num_", "").replaceAll("_", " "), v]);
    return table("Counters", ["what", "#times"], rows);
  }
}
