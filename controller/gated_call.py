"""One call that goes through the gate, over whatever front: counted and audited once it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict

from controller.gate import Caller, Credentials, Gate, method_of, told_of
from engine.errors import TidewrightError
from engine.wire import status_of


class GatedCall:
    """What is known of a call until it ends, which is told once. `request` is a message, plain
    data, or None when it could not be read."""

    def __init__(self, gate: Gate, path: str, credentials: Credentials) -> None:
        self._gate, self._path, self.credentials = gate, path, credentials
        self.caller: Caller | None = None
        self.request: Any = None
        self._started_s = time.monotonic()

    async def ended(self, error: BaseException | None) -> None:
        status = _status_of(error)
        self._gate.count(self._path, status)
        if not method_of(self._path).is_audited:
            return
        why = "" if error is None else told_of(error)
        took_s = time.monotonic() - self._started_s
        request = _plain(self.request)
        args = (self._path, self.credentials, self.caller, request, status, why, took_s)
        # a caller that hangs up does not keep what it did from being recorded
        await asyncio.shield(asyncio.to_thread(self._gate.record, *args))


def _plain(request: Any) -> dict[str, Any]:
    if request is None or isinstance(request, Mapping):
        return dict(request or {})
    return dict(MessageToDict(request, preserving_proto_field_name=True))


def _status_of(error: BaseException | None) -> str:
    if error is None:
        return "OK"
    if isinstance(error, TidewrightError):
        return str(status_of(error).name)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    return "UNKNOWN"
