"""A lease in etcd 3.4 or later, over its JSON gateway, for controllers on several machines.

`KEY` is bound to an etcd lease, so it goes when its holder does not renew; `KEY/epoch` stays and
counts. Both are written in one transaction, which succeeds only when nobody has the key and the
count is as it was read.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import urllib.error
import urllib.request
from typing import Any

from engine.errors import UnavailableError


class EtcdLease:
    """A `LeaseStore`. `url` is the gateway's, such as http://127.0.0.1:2379."""

    def __init__(self, url: str, key: str, holder: str, ttl_s: float) -> None:
        self._url, self._key, self._name, self.ttl_s = url.rstrip("/"), key, holder, ttl_s
        self._id = "0"

    @property
    def where(self) -> str:
        return f"{self._url}/{self._key}"

    def _post(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/v3/{method}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.ttl_s / 3) as response:
                answer: dict[str, Any] = json.loads(response.readline() or b"{}")
                return answer
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"etcd at {self._url} does not answer: {_why(error)}."
            ) from error

    def _get(self, key: str) -> tuple[str, int]:
        """Value and revision of the last change; 0: there is none."""
        found = self._post("kv/range", {"key": _coded(key)}).get("kvs", [])
        if not found:
            return "", 0
        return base64.b64decode(found[0].get("value", "")).decode(), int(found[0]["mod_revision"])

    def acquire(self, above: int) -> int:
        if self._get(self._key)[1]:
            return 0
        counted, revision = self._get(f"{self._key}/epoch")
        epoch = max(int(counted or 0), above) + 1
        granted = self._post("lease/grant", {"TTL": str(math.ceil(self.ttl_s)), "ID": "0"})
        self._id = str(granted["ID"])
        key, count = _coded(self._key), _coded(f"{self._key}/epoch")
        put = {"key": key, "value": _coded(self._name), "lease": self._id}
        answer = self._post(
            "kv/txn",
            {
                "compare": [
                    {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"},
                    {"key": count, "target": "MOD", "result": "EQUAL", "mod_revision": revision},
                ],
                "success": [
                    {"request_put": put},
                    {"request_put": {"key": count, "value": _coded(str(epoch))}},
                ],
            },
        )
        if not answer.get("succeeded"):
            self.release()
            return 0
        return epoch

    def renew(self) -> bool:
        answer = self._post("lease/keepalive", {"ID": self._id})
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    def release(self) -> None:
        self._post("lease/revoke", {"ID": self._id})

    def holder(self) -> str:
        return self._get(self._key)[0]


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.read(200).decode(errors='replace').strip()}"
    return str(getattr(error, "reason", error) or type(error).__name__)
