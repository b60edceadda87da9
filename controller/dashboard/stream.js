// Server-sent events by fetch, which can carry a bearer token; comes back with the last event's id.

const SILENCE_MS = 6000; // the controller sends something every two seconds
const RETRY_MS = [250, 500, 1000, 2000, 4000];

/** Splits a text stream into {id, event, data}. */
export class EventParser {
  constructor() {
    this.rest = "";
  }

  push(text) {
    const blocks = (this.rest + text).split("\n\n");
    this.rest = blocks.pop();
    return blocks.map(parseBlock).filter((e) => e.data !== "");
  }
}

function parseBlock(block) {
  const found = { id: null, event: "message", data: "" };
  for (const line of block.split("\n")) {
    const at = line.indexOf(":");
    const [name, value] = [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
    if (name === "data") found.data += (found.data ? "\n" : "") + value;
    else if (name in found) found[name] = value;
  }
  return found;
}

/** Calls `onEvent(name, data)`, and `onLink("live" | "lost" | "denied", why)` on changes. */
export class Feed {
  constructor(path, headers, onEvent, onLink) {
    Object.assign(this, { path, headers, onEvent, onLink, lastId: "", failures: 0 });
    this.wake = () => {};
  }

  async run() {
    for (;;) {
      let denied = false;
      try {
        await this.follow();
      } catch (error) {
        denied = !this.isRetrying && (error.status === 401 || error.status === 403);
        if (!this.isRetrying) this.onLink(denied ? "denied" : "lost", error.message);
      }
      this.isRetrying = false;
      const wait = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
      await new Promise((resolve) => {
        this.wake = resolve;
        if (!denied) setTimeout(resolve, wait);
      });
    }
  }

  /** Tries at once, as after signing in. */
  retry() {
    this.failures = 0;
    this.isRetrying = this.isFollowing;
    this.stop?.abort();
    this.wake();
  }

  async follow() {
    this.stop = new AbortController();
    this.isFollowing = true;
    const { signal } = this.stop;
    let timer;
    const listen = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.stop.abort(new Error("nothing was heard")), SILENCE_MS);
    };
    try {
      listen();
      const headers = this.headers();
      if (this.lastId) headers["last-event-id"] = this.lastId;
      const answer = await fetch(this.path, { headers, signal, cache: "no-store" });
      if (!answer.ok) {
        const told = await answer.json().catch(() => ({}));
        const why = told.error?.message ?? `the answer was ${answer.status}`;
        throw Object.assign(new Error(why), { status: answer.status });
      }
      const parser = new EventParser();
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the controller ended the stream");
        listen();
        for (const event of parser.push(value)) this.take(event);
      }
    } finally {
      this.isFollowing = false;
      clearTimeout(timer);
    }
  }

  take(event) {
    if (this.failures || !this.isLive) this.onLink("live", "");
    this.failures = 0;
    this.isLive = true;
    if (event.id) this.lastId = event.id;
    this.onEvent(event.event, JSON.parse(event.data));
  }
}
