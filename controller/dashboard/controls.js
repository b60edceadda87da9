// Mode, hold, switches, policies, sign in: what an operator does.

import { bytes, h, plural, seconds, setText } from "./dom.js";

const MODES = { active: "decides and switches", advisory: "decides and only logs", off: "only observes" };
const HOLDS = [["15 minutes", 900], ["1 hour", 3600], ["4 hours", 14400], ["8 hours", 28800], ["24 hours", 86400]];

export class Controls {
  /** `act(path, fields, done)` asks the controller and tells how it went; `look(path)` reads. */
  constructor(host, dialog, { act, signIn, look }) {
    Object.assign(this, { dialog, act, signIn, look });
    this.modes = Object.keys(MODES).map((mode) => h("button", {
      type: "button", "aria-pressed": "false", title: MODES[mode], "data-mode": mode,
      onclick: () => act("/api/mode", { mode: `MODE_${mode.toUpperCase()}` }, `The mode is ${mode}: the controller ${MODES[mode]}.`),
    }, mode[0].toUpperCase() + mode.slice(1)));
    this.hold = this.button("Hold …", () => this.askHold());
    this.resume = this.button("Resume", () => act("/api/resume", {}, "Nothing is held any more."));
    this.rollback = this.button("Roll back policy …", () => this.askRollback());
    this.sign = this.button("Sign in …", () => this.askToken());
    this.propose = this.button("Propose a switch …", () => this.askSwitch());
    this.load = this.button("Load policy …", () => this.askPolicy());
    this.canary = this.button("Canary …", () => this.askCanary());
    this.why = h("p", { class: "muted", id: "why-not" });
    host.append(
      h("div", { class: "buttons" },
        h("div", { class: "segments", role: "group", "aria-label": "Mode" }, this.modes),
        this.hold, this.resume, this.rollback, this.sign),
      this.why);
    dialog.addEventListener("close", () => dialog.replaceChildren());
  }

  /** What belongs to a panel stands at its end. */
  place(switches, policies) {
    switches.append(this.propose);
    policies.append(h("div", { class: "buttons end" }, this.load, this.canary));
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
    this.hold.disabled = this.rollback.disabled = this.propose.disabled = !enabled;
    for (const button of [this.load, this.canary]) {
      button.disabled = !isLive || !session.may.admin;
      button.title = session.may.admin ? "" : "needs the role “admin”";
    }
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

  async askSwitch() {
    const told = await this.look("/api/explain");
    const keys = (told?.candidates ?? []).map(({ candidate }) => candidate.key);
    const key = h("input", { id: "switch-key", type: "text", list: "switch-keys", required: true, autocomplete: "off", spellcheck: "false" });
    const dry = h("input", { id: "switch-dry", type: "checkbox", checked: true });
    this.ask("Propose a switch", "It is planned and guarded like one of the planner’s own.", [
      h("label", { for: "switch-key" }, "to the deployment, such as 2xtp2pp1"), key,
      h("datalist", { id: "switch-keys" }, keys.map((name) => h("option", { value: name }))),
      h("label", { class: "check", for: "switch-dry" }, dry, "only ask what it would take"),
    ], "Propose", () => this.act("/api/propose", { target_key: key.value.trim(), dry_run: dry.checked },
      (found) => proposed(found, dry.checked)));
  }

  async askPolicy() {
    const field = await this.policyField();
    if (!field) return;
    this.ask("Load a policy", "It decides from the next tick on; “Roll back policy” goes back.", field.parts, "Load",
      () => this.act("/api/load", { name: field.name.value },
        (told) => `${told.policy.name} decides, in place of ${told.previous.name}.`));
  }

  async askCanary() {
    const field = await this.policyField("none: end the canary");
    if (!field) return;
    const share = h("input", { id: "canary-share", type: "number", min: "5", max: "95", step: "5", value: "20", required: true });
    this.ask("Canary", "It decides in a share of blocks of 20 to 30 minutes, and is rolled back when it is worse.", [
      ...field.parts, h("label", { for: "canary-share" }, "share of blocks, in per cent"), share,
    ], "Set the canary", () => {
      const name = field.name.value;
      this.act("/api/canary", { name, fraction: name ? Number(share.value) / 100 : 0 },
        name ? `${name} is on trial in ${share.value} % of blocks.` : "There is no canary any more.");
    });
  }

  /** A choice among the policies that the controller has, with what is to be said of the chosen. */
  async policyField(none) {
    const told = await this.look("/api/policies");
    if (!told) return null;
    const name = h("select", { id: "policy-name" },
      told.policies.map((p) => h("option", { value: p.name, disabled: !p.is_compatible },
        `${p.name} (${p.kind}${p.is_active ? ", decides now" : p.is_compatible ? "" : ", does not fit"})`)),
      none ? h("option", { value: "" }, none) : null);
    const about = h("p", { class: "muted", id: "policy-about" });
    const show = () => setText(about, told.policies.find((p) => p.name === name.value)?.problem ?? "");
    name.setAttribute("aria-describedby", "policy-about");
    name.addEventListener("change", show);
    show();
    return { name, parts: [h("label", { for: "policy-name" }, "policy"), name, about] };
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

/** What came of a switch asked for by hand, in words. */
function proposed(found, isDry) {
  const key = found.target_key;
  if (found.vetoes.length) return `${isDry ? "A switch" : "No switch"} to ${key}: vetoed, ${found.vetoes.join("; ")}.`;
  if (found.applied) return `Switching to ${key}.`;
  return `A switch to ${key} may be made: ${plural(found.num_transfers, "transfer")}, ${bytes(found.weight_bytes)}, ${seconds(found.predicted_s)}.`;
}
