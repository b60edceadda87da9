"""A small server of what a lease needs of etcd's JSON gateway: nothing is kept on disk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SmallEtcd(BaseHTTPRequestHandler):
    """Keys with revisions, transactions with comparisons, leases that expire: no more of etcd."""

    keys: dict[str, dict[str, Any]]
    leases: dict[str, tuple[float, float]]  # id -> ttl, until
    state: dict[str, int]
    lock: threading.Lock

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self._expire()
            name = self.path.removeprefix("/v3/").replace("/", "_").replace("kv_", "")
            answer = getattr(self, name)(body)
        data = json.dumps(answer).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _expire(self) -> None:
        over = [i for i, (_, until_s) in self.leases.items() if time.monotonic() >= until_s]
        for number in over:
            self.lease_revoke({"ID": number})

    def range(self, body: dict[str, Any]) -> dict[str, Any]:
        found = self.keys.get(body["key"])
        return {"kvs": [found], "count": "1"} if found else {}

    def txn(self, body: dict[str, Any]) -> dict[str, Any]:
        def holds(compare: dict[str, Any]) -> bool:
            found = self.keys.get(compare["key"], {})
            name = {"CREATE": "create_revision", "MOD": "mod_revision"}[compare["target"]]
            return int(found.get(name, 0)) == int(compare[name])

        if not all(map(holds, body["compare"])):
            return {}  # the gateway leaves out what is false
        self.state["revision"] += 1
        for put in (request["request_put"] for request in body["success"]):
            before = self.keys.get(put["key"], {})
            revision = str(self.state["revision"])
            self.keys[put["key"]] = put | {
                "create_revision": before.get("create_revision", revision),
                "mod_revision": revision,
            }
        return {"succeeded": True}

    def lease_grant(self, body: dict[str, Any]) -> dict[str, Any]:
        self.state["lease"] += 1
        number, ttl_s = str(self.state["lease"]), float(body["TTL"])
        self.leases[number] = (ttl_s, time.monotonic() + ttl_s)
        return {"ID": number, "TTL": body["TTL"]}

    def lease_keepalive(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["ID"] not in self.leases:
            return {"result": {"ID": body["ID"]}}
        ttl_s, _ = self.leases[body["ID"]]
        self.leases[body["ID"]] = (ttl_s, time.monotonic() + ttl_s)
        return {"result": {"ID": body["ID"], "TTL": str(int(ttl_s))}}

    def lease_revoke(self, body: dict[str, Any]) -> dict[str, Any]:
        self.leases.pop(body["ID"], None)
        gone = [key for key, found in self.keys.items() if found.get("lease") == body["ID"]]
        for key in gone:
            del self.keys[key]
        return {}


class Server(ThreadingHTTPServer):
    request_queue_size = 64


@contextmanager
def serve() -> Iterator[str]:
    """Gives its URL."""
    fresh: dict[str, Any] = {
        "keys": {},
        "leases": {},
        "state": {"revision": 0, "lease": 0},
        "lock": threading.Lock(),
    }
    server = Server(("127.0.0.1", 0), type("Handler", (SmallEtcd,), fresh))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
