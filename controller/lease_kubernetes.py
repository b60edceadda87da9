"""A lease in Kubernetes (coordination.k8s.io/v1), for controllers in one cluster.

The object tells holder, duration and, as `leaseTransitions`, the epoch. Every write is of the
`resourceVersion` that was read, so of two at once one is refused. As for Kubernetes' own
controllers, a lease is over when nobody has written it for its duration on the clock of who looks:
clocks of machines need not agree.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError, UnavailableError

API = "/apis/coordination.k8s.io/v1"
CONFLICT, MISSING = 409, 404


def server_url(environment: Mapping[str, str] = os.environ) -> str:
    """Of the cluster that this process runs in. Raises InvalidRequestError outside of one."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{n}", "") for n in ("HOST", "PORT"))
    if not host:
        raise InvalidRequestError(
            "a lease in Kubernetes is for controllers that run there, and KUBERNETES_SERVICE_HOST "
            "is not set; choose a file or etcd with --lease."
        )
    return f"https://[{host}]:{port or 443}" if ":" in host else f"https://{host}:{port or 443}"


class KubernetesLease:
    """A `LeaseStore`. `account` is a folder with `token` and `ca.crt`; both are read for each call,
    since tokens expire and are renewed there."""

    def __init__(
        self,
        url: str,
        account: Path,
        namespace: str,
        name: str,
        holder: str,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, self._account, self._holder, self.ttl_s = url, account, holder, ttl_s
        self._leases = f"{API}/namespaces/{namespace}/leases"
        self._namespace, self._name, self._clock = namespace, name, clock
        self._seen = ("", 0.0)  # version of the object, and since when it has been that
        self._held: dict[str, Any] = {}  # the object as it was last written here

    @property
    def where(self) -> str:
        return f"kubernetes://{self._namespace}/{self._name}"

    # -- the API --------------------------------------------------------------------------

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The object, or None where there is none or it is not the one written about."""
        data = None if body is None else json.dumps(body).encode()
        try:
            token = (self._account / "token").read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            request = urllib.request.Request(self._url + path, data, headers, method=method)
            trusted = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
            with urllib.request.urlopen(
                request, timeout=self.ttl_s / 3, context=trusted
            ) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in (CONFLICT, MISSING):
                return None
            raise UnavailableError(self._problem(_told(error))) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = str(getattr(error, "reason", error) or type(error).__name__)
            raise UnavailableError(self._problem(why)) from error

    def _problem(self, why: str) -> str:
        return (
            f"the lease {self.where} cannot be had of {self._url}: {why}. The service account "
            "needs get, create and update on leases of coordination.k8s.io."
        )

    def _read(self) -> Any:
        return self._call("GET", f"{self._leases}/{self._name}")

    def _write(self, found: Any, spec: dict[str, Any]) -> bool:
        """In place of `found`, or as the first. False: somebody else was faster."""
        if found is None:
            metadata = {"name": self._name, "namespace": self._namespace}
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}
            written = self._call("POST", self._leases, body | {"spec": spec})
        else:
            written = self._call("PUT", f"{self._leases}/{self._name}", found | {"spec": spec})
        if written is not None:
            self._held = written
        return written is not None

    # -- the lease ------------------------------------------------------------------------

    def _is_free(self, found: Any) -> bool:
        """Given up, over, or left by this very process in a call whose answer was lost."""
        spec, version = found.get("spec", {}), found["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = version, self._clock()
        if spec.get("holderIdentity") in (None, "", self._holder):
            return True
        return self._clock() - self._seen[1] >= float(spec.get("leaseDurationSeconds") or 0)

    def acquire(self, above: int) -> int:
        found = self._read()
        if found is not None and not self._is_free(found):
            return 0
        epoch = max(_epoch_of(found), above) + 1
        now = _now()
        spec = {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": math.ceil(self.ttl_s),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": epoch,
        }
        return epoch if self._write(found, spec) else 0

    def _is_ours(self, found: Any) -> bool:
        held = self._held.get("spec", {})
        spec = {} if found is None else found.get("spec", {})
        return bool(held) and all(
            spec.get(name) == held[name] for name in ("holderIdentity", "leaseTransitions")
        )

    def renew(self) -> bool:
        """Also where others wrote to it, labels for instance, and it is still ours."""
        for found in (lambda: self._held, self._read):
            current = found()
            if not self._is_ours(current):
                return False
            if self._write(current, current["spec"] | {"renewTime": _now()}):
                return True
        return False

    def release(self) -> None:
        """Without a holder, for the least that the API takes; the epoch stays."""
        current = self._read()
        if self._is_ours(current):
            kept = {n: v for n, v in current["spec"].items() if n != "holderIdentity"}
            self._write(current, kept | {"leaseDurationSeconds": 1, "renewTime": _now()})
        self._held = {}

    def holder(self) -> str:
        """Whoever is written there, also when its lease is over."""
        found = self._read()
        return "" if found is None else str(found.get("spec", {}).get("holderIdentity") or "")


def _epoch_of(found: Any) -> int:
    return 0 if found is None else int(found.get("spec", {}).get("leaseTransitions") or 0)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _told(error: urllib.error.HTTPError) -> str:
    """The API's own sentence, from its Status object."""
    text = error.read(2000).decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["message"]
    return f"{error.code} {text.strip()}"
