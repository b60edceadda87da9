// The switch in flight, phase by phase, and those before it.

import { Details, bytes, facts, h, plural, seconds, setText, table, word } from "./dom.js";

const PHASES = ["prepare", "transfer", "verify", "commit", "release"];
const ENDS = { done: "done", rolled_back: "rolled back", cancelled: "cancelled" };

export class SwitchPanel {
  constructor(host, onCancel) {
    this.title = h("p", { class: "lead" }, "No switch so far.");
    this.steps = PHASES.map((name) => h("li", {}, h("b", {}, name), h("span", {}, "–")));
    this.list = h("ol", { class: "phases", hidden: true }, this.steps);
    this.progress = h("progress", { max: "1", value: "0", "aria-label": "Bytes moved", hidden: true });
    this.figures = h("div", {});
    this.cancel = h("button", { type: "button", class: "danger", hidden: true, onclick: onCancel }, "Cancel this switch");
    this.before = new Details("Switches before", () => this.tableOf());
    host.append(this.title, this.list, this.progress, this.figures, this.cancel, this.before.element);
    this.switches = [];
  }

  /** `ticket` of the engine view or null; `switches` of the state. Returns what is new, in words. */
  update(ticket, switches, mayOperate) {
    this.switches = switches;
    this.before.refresh();
    this.before.element.hidden = !switches.length;
    if (!ticket) return "";
    const news = this.newsOf(ticket);
    const how = ticket.is_over ? ENDS[ticket.phase] : "switching";
    setText(this.title, `${how}: ${ticket.from_key} → ${ticket.to_key}`);
    this.list.hidden = false;
    this.showPhases(ticket);
    const share = ticket.planned_bytes ? ticket.moved_bytes / ticket.planned_bytes : 0;
    this.progress.hidden = ticket.is_over;
    this.progress.value = Math.min(1, share);
    this.progress.setAttribute("aria-valuetext", `${bytes(ticket.moved_bytes)} moved`);
    this.figures.replaceChildren(facts(this.factsOf(ticket)));
    const early = PHASES.indexOf(ticket.phase) < PHASES.indexOf("commit");
    const hadFocus = document.activeElement === this.cancel;
    this.cancel.hidden = ticket.is_over || !early;
    this.cancel.disabled = !mayOperate;
    if (hadFocus && this.cancel.hidden) document.getElementById("main").focus();
    return news;
  }

  newsOf(ticket) {
    const now = `${ticket.ticket_id} ${ticket.phase}`;
    const [before, first] = [this.told, this.told === undefined];
    this.told = now;
    if (first || before === now) return "";
    if (!ticket.is_over) return `Switching to ${ticket.to_key}: ${ticket.phase}.`;
    return `The switch to ${ticket.to_key} is ${ENDS[ticket.phase]}${ticket.reason ? `: ${ticket.reason}` : ""}.`;
  }

  showPhases(ticket) {
    const at = PHASES.indexOf(ticket.phase);
    PHASES.forEach((name, i) => {
      const spent = ticket.phase_s[name];
      const passed = ticket.phase === "done" || (ticket.is_over ? spent !== undefined : i < at);
      const state = !ticket.is_over && i === at ? "current" : passed ? "passed" : "ahead";
      const failed = ticket.is_over && ticket.phase !== "done" && !passed;
      const step = this.steps[i];
      step.className = failed ? "skipped" : state;
      if (state === "current") step.setAttribute("aria-current", "step");
      else step.removeAttribute("aria-current");
      const mark = { current: "● ", passed: "✓ " }[state] ?? (failed ? "✕ " : "");
      const text = spent !== undefined ? seconds(spent) : state === "current" ? "now" : failed ? "not reached" : "–";
      setText(step.lastChild, mark + (passed && text === "–" ? "" : text));
    });
  }

  factsOf(t) {
    const moved = [
      t.num_migrated ? `${t.num_migrated} migrated` : "",
      t.num_recomputed ? `${t.num_recomputed} recomputed` : "",
      t.num_drained ? `${t.num_drained} drained` : "",
    ].filter(Boolean).join(", ");
    return [
      ["took", `${seconds(t.duration_s)} (predicted ${seconds(t.predicted_s)})`],
      ["moved", `${bytes(t.moved_bytes)} (planned for weights: ${bytes(t.planned_bytes)})`],
      ["requests", moved || "none moved"],
      ["pause", `${seconds(t.pause_s)}, ${word(t.mode, "SWITCH_MODE")}`],
      ["why it ended", t.reason],
      ["ticket", t.ticket_id],
    ];
  }

  tableOf() {
    const rows = [...this.switches].reverse().map((t) => [
      t.ticket_id, t.from_key, t.to_key, word(t.phase, "SWITCH_PHASE"),
      seconds(t.updated_s - t.started_s), seconds(t.pause_s), bytes(t.moved_bytes), t.reason,
    ]);
    const columns = ["ticket", "from", "to", "end", "#took", "#pause", "#moved", "reason"];
    return table(plural(rows.length, "switch", "switches"), columns, rows);
  }
}
