// What whoever uses this page may do, and the calls that ask and change.

const KEY = "tidewright-token";

export class CallError extends Error {}

export class Session {
  constructor() {
    this.token = sessionStorage.getItem(KEY) ?? "";
    this.may = { read: false, operate: false, admin: false };
    this.pageToken = "";
  }

  headers() {
    return this.token ? { authorization: `Bearer ${this.token}` } : {};
  }

  signIn(token) {
    this.token = token.trim();
    if (this.token) sessionStorage.setItem(KEY, this.token);
    else sessionStorage.removeItem(KEY);
  }

  async load() {
    const told = await this.get("/api/session");
    this.may = told.may;
    this.pageToken = told.page_token;
  }

  async get(path) {
    return read(await fetch(path, { headers: this.headers(), cache: "no-store" }));
  }

  /** Changes something, once however often it is sent. */
  async post(path, fields) {
    const headers = {
      ...this.headers(),
      "content-type": "application/json",
      "x-tidewright-token": this.pageToken,
    };
    const body = JSON.stringify({ ...fields, idempotency_key: newKey() });
    const send = () => fetch(path, { method: "POST", headers, body });
    let answer = await send();
    if (answer.status === 403) { // the controller was started again and has another page token
      await this.load();
      headers["x-tidewright-token"] = this.pageToken;
      answer = await send();
    }
    return read(answer);
  }
}

async function read(answer) {
  const told = await answer.json().catch(() => null);
  if (answer.ok) return told;
  throw new CallError(told?.error?.message ?? `the controller answered ${answer.status}.`);
}

/** A name for one change; crypto.randomUUID is missing where the page is not on localhost. */
function newKey() {
  const values = crypto.getRandomValues(new Uint32Array(4));
  return `page-${Array.from(values, (v) => v.toString(16).padStart(8, "0")).join("")}`;
}
