"""The gate before the control service: who calls, how often, whether the method is theirs.

One gate for every front: gRPC through `controller.gate_interceptor`, and whatever else serves the
same methods. What it decides by is the table in `controller.roles`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from controller.access import AccessFile
from controller.audit import AuditLog
from controller.rate_limits import RateLimits
from controller.roles import METHODS, Method, Role, parse_role
from engine.errors import (
    OverloadedError,
    PermissionDeniedError,
    TidewrightError,
    UnauthenticatedError,
)

MAX_STREAMS = 500  # of one caller, open at once


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a call brings along. `certificates` are the names in a verified client certificate."""

    peer: str  # host, without its port
    token: str | None = None
    certificates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as it is known."""

    name: str
    role: Role
    peer: str


class Gate:
    """Without an access file whoever reaches the port may do everything: the port is on loopback,
    or asks for client certificates, or was opened on purpose."""

    def __init__(
        self,
        access: AccessFile | None = None,
        limits: RateLimits | None = None,
        audit: AuditLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.access, self.audit = access, audit or AuditLog(None)
        self._limits, self._clock = limits or RateLimits(0.0, 1), clock
        self._max_streams, self._streams = max_streams, Counter[str]()
        self._lock = threading.Lock()
        self.calls: Counter[tuple[str, str]] = Counter()  # by method and status

    def admit(self, path: str, credentials: Credentials) -> Caller:
        """For the method `service/Method`. Raises OverloadedError, UnauthenticatedError and
        PermissionDeniedError."""
        caller = self._identify(credentials)
        bucket = _bucket_of(caller or Caller("", Role.ANYONE, credentials.peer))
        wait_s = self._limits.take(bucket, self._clock())
        if wait_s > 0:
            raise OverloadedError(
                f"too many calls; try again after {wait_s:.3f} s, or ask for a higher "
                "--rate-per-s.",
                wait_s,
            )
        return self._authorise(path, caller, credentials)

    def check(self, path: str, credentials: Credentials) -> Caller:
        """The same without counting a call: whether a stream may go on."""
        return self._authorise(path, self._identify(credentials), credentials)

    def allows(self, role: str, token: str, peer: str = "") -> bool:
        """Whether that bearer token, or "" for none, gives the role read, operate or admin: for
        fronts that serve something else than the methods."""
        known = self._identify(Credentials(peer, token or None))
        needed = parse_role(role)
        return known is not None and needed is not None and known.role >= needed

    def _identify(self, credentials: Credentials) -> Caller | None:
        if self.access is None:
            return Caller("/".join(credentials.certificates[:1]), Role.ADMIN, credentials.peer)
        right = self.access.find(credentials.token, credentials.certificates)
        return None if right is None else Caller(right.name, right.role, credentials.peer)

    def _authorise(self, path: str, caller: Caller | None, credentials: Credentials) -> Caller:
        method = METHODS.get(path)
        if caller is None:
            if method is not None and method.role is Role.ANYONE:
                return Caller("", Role.ANYONE, credentials.peer)
            raise UnauthenticatedError(
                "the call has no token that is known here; send `authorization: Bearer TOKEN` "
                "(--token-file of the commands)."
            )
        if method is None:
            raise PermissionDeniedError(f"{path} is nobody's to call.")
        if caller.role < method.role:
            raise PermissionDeniedError(
                f"{path.rpartition('/')[2]} needs the role {method.role.name.lower()}; "
                f"{caller.name} has {caller.role.name.lower()}."
            )
        return caller

    @contextmanager
    def open_stream(self, caller: Caller) -> Iterator[None]:
        """Counts it while it is open. Raises OverloadedError when the caller has too many."""
        bucket = _bucket_of(caller)
        with self._lock:
            if self._streams[bucket] >= self._max_streams:
                raise OverloadedError(
                    f"{self._max_streams} streams of this caller are open; end one of them."
                )
            self._streams[bucket] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[bucket] -= 1
                self._streams += Counter()  # forgets those at 0

    @property
    def num_streams(self) -> int:
        with self._lock:
            return self._streams.total()

    # ---------------------------------------------------------------- what came of it

    def record(
        self,
        path: str,
        credentials: Credentials,
        caller: Caller | None,
        request: Any,
        status: str,
        why: str,
        took_s: float,
    ) -> None:
        """For a method that is audited, unless the caller was only too fast. Blocks on the disk."""
        if not method_of(path).is_audited or (caller is None and status == "RESOURCE_EXHAUSTED"):
            return
        known = caller or self._identify(credentials)
        self.audit.append(
            {
                "caller": known.name if known else "",
                "role": known.role.name.lower() if known else "",
                "peer": credentials.peer,
                "certificates": credentials.certificates,
                "method": path,
                "request": request,
                "status": status,
                "why": why,
                "took_s": took_s,
            }
        )

    def count(self, path: str, status: str) -> None:
        with self._lock:
            self.calls[path.rpartition("/")[2], status] += 1

    def counted(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self.calls)


NOBODYS = Method(Role.ADMIN, is_audited=True)


def method_of(path: str) -> Method:
    """Of the table; a method that is not in it is as strict as any."""
    return METHODS.get(path, NOBODYS)


def _bucket_of(caller: Caller) -> str:
    """Those without a name share the bucket of their host."""
    return f"name {caller.name}" if caller.name else f"peer {caller.peer}"


def told_of(error: BaseException) -> str:
    """Of errors that are told to callers only."""
    return str(error) if isinstance(error, TidewrightError) else type(error).__name__
