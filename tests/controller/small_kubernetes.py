"""A small server of what a lease needs of Kubernetes' API: Leases, over TLS, with tokens.

Semantics as the API's own: a name is created once (409 else), an update must tell the version that
it is of (409 when it is an older one), and the server refuses fields that are not as documented.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

LEASES = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([a-z0-9-]+)/leases(?:/([^/]+))?")
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
INT32 = 2**31


@dataclass
class SmallKubernetes:
    """Where it is and who may ask; tests look at `objects` and change them as others would."""

    account: Path  # with token and ca.crt, as in a pod
    url: str = ""
    token: str = "first"
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    version: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.renew_token(self.token)

    def renew_token(self, token: str) -> None:
        """The one before is not taken any more."""
        self.token = token
        (self.account / "token").write_text(f"{token}\n")

    def put(self, key: tuple[str, str], given: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        metadata = given["metadata"] | {"resourceVersion": str(self.version)}
        self.objects[key] = given | {"metadata": metadata}
        return self.objects[key]

    def label(self, namespace: str, name: str) -> None:
        """As somebody else may, who changes nothing of the lease itself."""
        with self.lock:
            found = self.objects[namespace, name]
            metadata = found["metadata"] | {"labels": {"team": "a"}}
            self.put((namespace, name), found | {"metadata": metadata})


def _problems(given: dict[str, Any]) -> Iterator[str]:
    spec = given.get("spec", {})
    if (given.get("apiVersion"), given.get("kind")) != ("coordination.k8s.io/v1", "Lease"):
        yield "no Lease of coordination.k8s.io/v1"
    if not spec.get("leaseDurationSeconds", 0) > 0:
        yield "spec.leaseDurationSeconds must be greater than 0"
    if not 0 <= spec.get("leaseTransitions", 0) < INT32:
        yield "spec.leaseTransitions must be an int32 of 0 or more"
    for name in ("acquireTime", "renewTime"):
        if not MICRO_TIME.fullmatch(spec.get(name, "2026-01-01T00:00:00.000000Z")):
            yield f"spec.{name} is no time in microseconds"


class Handler(BaseHTTPRequestHandler):
    """GET, POST and PUT of Leases: no more of Kubernetes."""

    api: SmallKubernetes

    def log_message(self, *_: object) -> None:
        """Silent."""

    def _answer(self, code: int, told: dict[str, Any]) -> None:
        data = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: int, message: str) -> None:
        self._answer(code, {"kind": "Status", "code": code, "message": message})

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        given = json.loads(self.rfile.read(length)) if length else {}
        match = LEASES.fullmatch(self.path)
        if self.headers["Authorization"] != f"Bearer {self.api.token}":
            self._refuse(401, "Unauthorized")
        elif match is None:
            self._refuse(403, "forbidden: no such path for this account")
        else:
            with self.api.lock:
                self._serve(match[1], match[2], given)

    do_GET = do_POST = do_PUT = _handle

    def _serve(self, namespace: str, name: str | None, given: dict[str, Any]) -> None:
        api, creates = self.api, self.command == "POST"
        key = (namespace, given["metadata"]["name"] if name is None else name)
        found = api.objects.get(key)
        if self.command != "GET" and (wrong := ", ".join(_problems(given))):
            self._refuse(422, wrong)
        elif creates and found is not None:
            self._refuse(409, f"leases {key[1]} already exists")
        elif found is None and not creates:
            self._refuse(404, f"leases {key[1]} not found")
        elif self.command == "GET":
            self._answer(200, found or {})
        elif creates:
            self._answer(201, api.put(key, given))
        elif (
            given["metadata"].get("resourceVersion") != (found or {})["metadata"]["resourceVersion"]
        ):
            self._refuse(409, "the object has been modified; please apply your changes to it")
        else:
            self._answer(200, api.put(key, given))


class Server(ThreadingHTTPServer):
    request_queue_size = 64


@contextmanager
def serve(folder: Path) -> Iterator[SmallKubernetes]:
    """With the files of an account in `folder`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    api = SmallKubernetes(folder)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"api": api}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    api.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
