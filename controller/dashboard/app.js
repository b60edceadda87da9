// Holds what was heard of the controller and shows it; nothing here decides anything.

import { Controls } from "./controls.js";
import { DecisionsPanel } from "./decisions.js";
import { DeviceMap, Timeline } from "./devices.js";
import { clock, h, setText, word } from "./dom.js";
import { Session } from "./session.js";
import { Feed } from "./stream.js";
import { SwitchPanel } from "./switches.js";
import { Tiles, TrustPanel } from "./summary.js";
import { ServicePanel, TrafficPanel } from "./traffic.js";

const MAX_SAMPLES = 1500;
const LATE_TICKS = 3; // after so many missed ones something is wrong
const RANGES = [["15 min", 900], ["1 h", 3600], ["6 h", 21600]];
const $ = (id) => document.getElementById(id);

class Page {
  constructor() {
    Object.assign(this, {
      facts: null, state: null, held: [], engine: null, samples: [], deployments: {},
      link: "connecting", heardAt: null, skew: 0, range: 3600, isDue: false,
    });
    this.session = new Session();
    this.controls = new Controls($("controls"), $("dialog"), {
      act: (path, fields, done) => this.act(path, fields, done),
      signIn: (token) => this.signIn(token),
      look: (path) => this.look(path),
    });
    this.tiles = new Tiles($("now"));
    this.map = new DeviceMap($("devices"));
    this.switch = new SwitchPanel($("switch"), () => this.controls.askCancel(this.engine.switch));
    this.timeline = new Timeline($("timeline"));
    this.service = new ServicePanel($("service"));
    this.traffic = new TrafficPanel($("traffic"));
    this.decisions = new DecisionsPanel($("decisions"), (path) => this.session.get(path));
    this.trust = new TrustPanel($("trust"));
    this.controls.place($("switch"), $("trust"));
    this.addRanges();
    this.olds = [...document.querySelectorAll("section")].map((section) => {
      const old = h("span", { class: "old", hidden: true });
      section.querySelector("h2").append(" ", old);
      return old;
    });
    this.feed = new Feed("/api/events", () => this.session.headers(),
      (name, data) => this.hear(name, data), (link, why) => this.onLink(link, why));
  }

  start() {
    this.feed.run();
    setInterval(() => this.due(), 1000);
    this.due();
  }

  addRanges() {
    const radios = RANGES.map(([name, value]) => {
      const input = h("input", { type: "radio", name: "range", value, onchange: () => { this.range = value; this.due(); } });
      input.checked = value === this.range;
      return h("label", {}, input, h("span", {}, name));
    });
    $("ranges").append(h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Time shown"), radios));
  }

  // ------------------------------------------------------------ what is heard

  hear(name, data) {
    this.heardAt = Date.now() / 1000;
    if (data.wall_s) this.skew = data.wall_s - this.heardAt;
    const take = {
      hello: () => this.onHello(data), tick: () => this.onTick(data), state: () => this.onState(data),
      engine: () => { this.engine = data; },
    }[name];
    take?.();
    this.due();
  }

  onHello(data) {
    if (this.facts && this.facts.life !== data.life) this.say("The controller was started again.");
    Object.assign(this, { facts: data, samples: data.samples, deployments: data.deployments, engine: null });
  }

  onTick(data) {
    const last = this.samples.at(-1)?.seq ?? 0;
    this.samples = [...this.samples, ...data.samples.filter((x) => x.seq > last)].slice(-MAX_SAMPLES);
    Object.assign(this.deployments, data.deployments);
    this.facts.slo = data.slo;
  }

  onState(data) {
    const now = Date.now() / 1000 + this.skew;
    const holds = data.holds.map((x) => ({ ...x, until: now + x.remaining_s }));
    Object.assign(this, { state: data, held: holds });
  }

  async onLink(link, why) {
    this.why = why;
    if (link !== "live" && this.link === "live") this.lostAt = this.heardAt;
    const back = link === "live" && this.link !== "live" && this.lostAt;
    this.link = link;
    if (back) this.say("Connected again.");
    if (link === "live" || link === "denied") await this.loadSession();
    this.due();
  }

  async loadSession() {
    try {
      await this.session.load();
    } catch (error) {
      this.say(error.message, true);
    }
    this.due();
  }

  async signIn(token) {
    this.session.signIn(token);
    await this.loadSession();
    this.feed.retry();
    if (token && !this.session.may.operate) this.say("This token does not let you change anything.", true);
    else this.say(token ? "Signed in." : "Signed out.");
  }

  async act(path, fields, done) {
    this.say("asking …");
    try {
      const told = await this.session.post(path, fields);
      this.say(typeof done === "function" ? done(told) : done);
    } catch (error) {
      this.say(`That was not done: ${error.message}`, true);
    }
  }

  /** What is read at the path; null, and told, when it cannot be. */
  async look(path) {
    try {
      return await this.session.get(path);
    } catch (error) {
      this.say(error.message, true);
      return null;
    }
  }

  say(text, isError = false) {
    setText($("news"), text);
    $("news").className = isError ? "error" : "";
    clearTimeout(this.quiet);
    this.quiet = setTimeout(() => setText($("news"), ""), isError ? 20000 : 8000);
  }

  // ------------------------------------------------------------ what is shown

  due() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.render();
    });
  }

  render() {
    const now = Date.now() / 1000 + this.skew;
    this.showLink(now);
    this.showBanners(now);
    const isLive = this.link === "live";
    this.controls.update({
      mode: this.state ? word(this.state.mode, "MODE") : "", isHeld: this.holds(now).length > 0, isLive, session: this.session,
    });
    if (!this.facts) return;
    setText($("model"), this.facts.model);
    const seen = this.samples.findLast((x) => x.deployment !== null);
    const live = this.engine?.deployment ? this.engine : null;
    const past = seen && { deployment: this.deployments[seen.deployment], dead: seen.dead, replicas: [] };
    const lastTick = this.samples.at(-1);
    this.tiles.update({ facts: this.facts, state: this.state, last: seen, view: live, now, lastTick, isOld: document.body.classList.contains("is-old") });
    this.map.update(this.facts, live ?? past);
    if (this.state) {
      const news = this.switch.update(live?.switch, this.state.switches, isLive && this.session.may.operate);
      if (news) this.say(news);
      this.trust.update(this.state, this.facts);
    }
    this.showPlots(isLive ? now : this.lostAt + this.skew);
  }

  /** Only when there is something new: plots are redrawn as a whole. */
  showPlots(now) {
    const last = this.samples.at(-1);
    const key = [this.facts.life, last?.seq, this.range, Math.floor(now / Math.max(5, this.range / 400))].join();
    if (key === this.plotted) return;
    this.plotted = key;
    const end = Math.max(now, last ? last.wall_s + this.facts.grid_s : 0); // the next tick is forecast
    const first = this.samples[0]?.wall_s ?? end;
    const start = Math.max(end - this.range, Math.min(first, end - 4 * this.facts.grid_s));
    const from = this.samples.findIndex((x) => x.wall_s >= start);
    const shown = from < 0 ? [] : this.samples.slice(from);
    this.timeline.update(this.facts, shown, this.deployments, start, end);
    this.service.update(this.facts, shown, start, end);
    this.traffic.update(this.facts, shown, start, end);
    this.decisions.update(this.samples, this.facts.rules);
  }

  showLink(now) {
    document.body.dataset.link = this.link;
    const words = { live: "live", connecting: "connecting", denied: "sign in needed" };
    setText($("link"), words[this.link] ?? "not connected");
    const lost = this.link !== "live" && this.lostAt ? this.lostAt + this.skew : null;
    const since = lost ?? (this.isStuck(now) ? this.samples.at(-1).wall_s : null);
    document.body.classList.toggle("is-old", since !== null);
    for (const old of this.olds) {
      old.hidden = since === null;
      if (since !== null) setText(old, `old: as of ${clock(since)}`);
    }
  }

  holds(now) {
    return this.held.filter((x) => x.until > now);
  }

  showBanners(now) {
    const found = [];
    if (this.link === "lost") {
      found.push(["bad", this.lostAt
        ? `Not connected since ${clock(this.lostAt + this.skew)}. What is shown is from then and may no longer hold. Trying again …`
        : "The controller does not answer. Trying again …"]);
    } else if (this.link === "denied") {
      found.push(["warn", this.why]);
    } else if (this.link === "live") {
      found.push(...this.troubles(now));
    }
    const key = JSON.stringify(found);
    if (key === this.bannered) return;
    this.bannered = key;
    $("banners").replaceChildren(...found.map(([cls, text]) => h("p", { class: `banner ${cls}` }, text)));
  }

  isStuck(now) {
    const last = this.samples.at(-1);
    return Boolean(last && this.facts && now - last.wall_s > LATE_TICKS * this.facts.grid_s);
  }

  /** What an operator should know first, the worst on top. */
  troubles(now) {
    const found = [];
    const last = this.samples.at(-1);
    if (this.isStuck(now)) {
      found.push(["bad", `No tick since ${clock(last.wall_s)}: the control loop is stuck. What is shown is from then.`]);
    }
    if (this.engine?.error || last?.status === "unavailable") {
      const seen = this.samples.findLast((x) => x.deployment !== null);
      const since = seen ? ` since ${clock(seen.wall_s)}` : "";
      found.push(["bad", `The engine has not answered${since}: ${this.engine?.error || last.reason}. What is shown of it is from then.`]);
    } else if (last?.status === "failed") {
      found.push(["bad", `The last tick failed: ${last.reason}`]);
    } else if (last?.is_stale) {
      found.push(["warn", "The engine’s figures are old, missing or no numbers: nothing is switched on them."]);
    }
    if (this.state && this.state.breaker !== "closed") {
      found.push(["warn", `The circuit breaker is ${this.state.breaker.replace("_", " ")}: ${this.state.breaker_reason}.`]);
    }
    for (const hold of this.holds(now)) {
      found.push(["info", `No switch until ${clock(hold.until)} (${hold.rule}): ${hold.reason}`]);
    }
    return found;
  }
}

new Page().start();
