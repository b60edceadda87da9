// Mode, hold, roll back, sign in: what an operator does.

import { h, setText } from "./dom.js";

const MODES = { active: "decides and switches", advisory: "decides and only logs", off: "only observes" };
const HOLDS = [["15 minutes", 900], ["1 hour", 3600], ["4 hours", 14400], ["8 hours", 28800], ["24 hours", 86400]];

export class Controls {
  /** `act(path, fields, done)` asks the controller and tells how it went. */
  constructor(host, dialog, { act, signIn }) {
    Object.assign(this, { dialog, act, signIn });
    this.modes = Object.keys(MODES).map((mode) => h("button", {
      type: "button", "aria-pressed": "false", title: MODES[mode], "data-mode": mode,
      onclick: () => act("/api/mode", { mode: `MODE_${mode.toUpperCase()}` }, `The mode is ${mode}: the controller ${MODES[mode]}.`),
    }, mode[0].toUpperCase() + mode.slice(1)));
    this.hold = this.button("Hold …", () => this.askHold());
    this.resume = this.button("Resume", () => act("/api/resume", {}, "Nothing is held any more."));
    this.rollback = this.button("Roll back policy …", () => this.askRollback());
    this.sign = this.button("Sign in …", () => this.askToken());
    this.why = h("p", { class: "muted", id: "why-not" });
    host.append(
      h("div", { class: "buttons" },
        h("div", { class: "segments", role: "group", "aria-label": "Mode" }, this.modes),
        this.hold, this.resume, this.rollback, this.sign),
      this.why);
    dialog.addEventListener("close", () => dialog.replaceChildren());
  }

  button(text, onclick) {
    return h("button", { type: "button", onclick }, text);
  }

  update({ mode, isHeld, isLive, session }) {
    const enabled = isLive && session.may.operate;
    for (const button of this.modes) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
      button.disabled = !enabled;
    }
    this.hold.disabled = this.rollback.disabled = !enabled;
    this.keepFocus(this.resume, !enabled || !isHeld);
    this.sign.hidden = session.may.operate && !session.token;
    setText(this.sign, session.token ? "Sign out" : "Sign in …");
    setText(this.why, !isLive ? "" : session.may.operate ? ""
      : "You may look. To change something, sign in with a token of the role “operate”.");
  }

  /** A button that is switched off hands its focus on, so that the keyboard does not get lost. */
  keepFocus(button, disabled) {
    if (disabled && document.activeElement === button) this.hold.focus();
    button.disabled = disabled;
  }

  // ------------------------------------------------------------ dialogs

  ask(title, text, fields, verb, onSubmit) {
    const form = h("form", { method: "dialog" },
      h("h2", { id: "dialog-title" }, title), text ? h("p", {}, text) : null, fields,
      h("div", { class: "buttons end" },
        this.button("Cancel", () => this.dialog.close()),
        h("button", { type: "submit", class: "primary" }, verb)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close();
      onSubmit();
    });
    this.dialog.replaceChildren(form);
    this.dialog.showModal();
  }

  askHold() {
    const length = h("select", { id: "hold-length" }, HOLDS.map(([name, s]) => h("option", { value: s }, name)));
    length.value = "3600";
    const reason = h("input", { id: "hold-reason", type: "text", maxlength: "200", autocomplete: "off" });
    this.ask("Hold the deployment", "No switch is made until the hold ends; decisions are still logged.", [
      h("label", { for: "hold-length" }, "for"), length,
      h("label", { for: "hold-reason" }, "because"), reason,
    ], "Hold", () => {
      const name = HOLDS.find(([, s]) => String(s) === length.value)[0];
      this.act("/api/hold", { duration_s: Number(length.value), reason: reason.value || "held on the dashboard" },
        `No switch for ${name}.`);
    });
  }

  askRollback() {
    this.ask("Roll back the policy", "The policy before the last one that was loaded decides again, from the next tick on.",
      [], "Roll back", () => this.act("/api/rollback", {}, (told) => `${told.policy.name} decides again, in place of ${told.previous.name}.`));
  }

  askCancel(ticket) {
    this.ask("Cancel this switch", `It is rolled back to ${ticket.from_key}, unless it commits before.`, [], "Cancel the switch",
      () => this.act("/api/cancel", { ticket_id: ticket.ticket_id }, "The switch is being rolled back."));
  }

  askToken() {
    if (this.sign.textContent === "Sign out") {
      this.signIn("");
      return;
    }
    const token = h("input", { id: "token", type: "password", autocomplete: "off", required: true });
    this.ask("Sign in", "It is kept until this tab is closed.", [h("label", { for: "token" }, "Bearer token"), token],
      "Sign in", () => this.signIn(token.value));
  }
}
