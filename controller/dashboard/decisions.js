// Every tick's decision, newest first, and on demand why, and why not another candidate.

import { bytes, clock, facts, h, num, percent, plural, seconds, setText, table } from "./dom.js";

const STEP = 10;

/** [class, word] of what a tick came to. */
export function kindOf(x) {
  if (x.status === "unavailable") return ["bad", "no answer"];
  if (x.status === "failed") return ["bad", "failed"];
  if (x.status === "observed") return ["quiet", "mode off"];
  if (x.vetoes.length) return ["warn", "vetoed"];
  if (x.executed_key === x.deployment_key) return ["quiet", "keep"];
  if (x.ticket_id) return ["good", "switch"];
  return x.mode === "active" ? ["warn", "not started"] : ["info", "would switch"];
}

/** "keep+optimum_q90" -> "keep, optimum q90"; keys of deployments stay as they are. */
export const spelled = (text) => text.replace(/\+(?=[a-z])/g, ", ").replace(/([a-z])_(?=[a-z])/g, "$1 ");

/** What was done in a few words, and what is to be said of it. */
function wordsOf(x) {
  if (x.status !== "decided" || x.vetoes.length) return [spelled(x.summary), ""];
  const kept = x.executed_key === x.deployment_key;
  const about = `by ${x.policy}, probability ${percent(x.propensity)}`;
  return [`${kept ? "keep" : "switch to"} ${x.executed_key}`, kept ? about : `${about}: ${spelled(x.reason)}`];
}

const isPlain = (x) => kindOf(x)[1] === "keep" && !x.notes.length;

export class DecisionsPanel {
  constructor(host, ask) {
    Object.assign(this, { ask, shown: STEP, items: new Map(), samples: [] });
    this.filter = h("input", { type: "checkbox", onchange: () => this.render() });
    this.count = h("span", { class: "muted" });
    this.list = h("ol", { class: "decisions" });
    this.more = h("button", { type: "button", hidden: true, onclick: () => this.showMore() }, "Show older");
    this.empty = h("p", { class: "muted" }, "No tick yet.");
    host.append(h("p", { class: "row" }, h("label", {}, this.filter, " only what is no plain keep"), this.count),
      this.empty, this.list, this.more);
  }

  update(samples, rules) {
    Object.assign(this, { samples, rules });
    this.render();
  }

  showMore() {
    const before = this.list.children.length;
    this.shown += 2 * STEP;
    this.render();
    this.list.children[before]?.querySelector("button")?.focus();
  }

  render() {
    const wanted = this.samples.filter((x) => !this.filter.checked || !isPlain(x));
    const shown = wanted.slice(-this.shown).reverse();
    setText(this.count, plural(wanted.length, "tick"));
    setText(this.empty, this.samples.length ? "None of that kind." : "No tick yet.");
    this.empty.hidden = shown.length > 0;
    this.more.hidden = wanted.length <= this.shown;
    const kept = new Set(shown.map((x) => x.seq));
    for (const [seq, item] of this.items) {
      if (!kept.has(seq) || item.sample.wall_s !== this.samples.find((x) => x.seq === seq)?.wall_s) {
        item.element.remove();
        this.items.delete(seq);
      }
    }
    let after = null;
    for (const sample of shown) { // only what is new is put in: what has the focus stays where it is
      const item = this.items.get(sample.seq) ?? this.add(sample);
      const place = after ? after.nextSibling : this.list.firstChild;
      if (item.element !== place) this.list.insertBefore(item.element, place);
      after = item.element;
    }
  }

  add(sample) {
    const [cls, name] = kindOf(sample);
    const id = `why-${sample.seq}`;
    const box = h("div", { id, class: "why", hidden: true });
    const button = h("button", {
      type: "button", "aria-expanded": "false", "aria-controls": id,
      "aria-label": `Why, tick ${sample.seq}`, onclick: () => this.toggle(item),
    }, "Why?");
    const explained = sample.status === "decided" || sample.status === "observed";
    const [did, about] = wordsOf(sample);
    const element = h("li", {},
      h("time", { datetime: new Date(sample.wall_s * 1000).toISOString() }, clock(sample.wall_s)),
      h("span", { class: `badge ${cls}` }, name),
      h("div", { class: "what" }, h("p", {}, did, " ", about ? h("small", {}, about) : null),
        sample.notes.map((note) => h("p", { class: "note" }, note)),
        sample.arm ? h("p", { class: "muted" }, `canary: ${sample.arm}`) : null),
      explained ? button : h("span", {}), box);
    const item = { sample, element, button, box };
    this.items.set(sample.seq, item);
    return item;
  }

  async toggle(item) {
    const open = item.box.hidden;
    item.box.hidden = !open;
    item.button.setAttribute("aria-expanded", String(open));
    if (!open || item.isKnown) return;
    item.box.replaceChildren(h("p", { class: "muted" }, "asking …"));
    try {
      const told = await this.ask(`/api/explain?seq=${item.sample.seq}`);
      item.box.replaceChildren(...explanation(told));
      item.isKnown = true;
    } catch (error) {
      item.box.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }
}

function explanation(told) {
  const rows = told.candidates.map(({ candidate: c, is_chosen, is_executed, why }) => [
    h("span", {}, c.key, is_executed ? h("em", {}, " executed") : is_chosen ? h("em", {}, " chosen") : null),
    percent(c.probability), num(c.headroom), seconds(c.predicted_switch_s), bytes(c.weight_bytes), spelled(why),
  ]);
  const columns = ["candidate", "#probability", "#headroom", "#switch takes", "#moves", "why, or why not"];
  const { policy, propensity, tick_s, decision_id } = told.record;
  return [
    table(`Candidates at tick ${told.record.seq}`, columns, rows),
    h("details", {}, h("summary", {}, "What the policy saw"), features(told)),
    facts([["policy", policy], ["probability of what was executed", policy ? percent(propensity) : ""],
      ["the tick took", seconds(tick_s)], ["decision", decision_id]]),
  ];
}

function features(told) {
  const looked = told.candidates.filter((c, i) => i === 0 || c.is_chosen || c.is_executed);
  const names = Object.keys(looked[0]?.features ?? {});
  const parts = [];
  if (names.length) {
    parts.push(table("Features of candidates", ["feature", ...looked.map((c) => `#${c.candidate.key}`)],
      names.map((n) => [n, ...looked.map((c) => num(c.features[n]))])));
  }
  parts.push(table("Features of the state", ["feature", "#value"],
    Object.entries(told.state_features).map(([n, v]) => [n, num(v)])));
  return h("div", { class: "features" }, parts);
}
