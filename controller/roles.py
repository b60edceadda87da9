"""Who may call what: the one table of every method that the control service answers.

A method that is not in it is refused to everybody; a test holds it to the services' own lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

CONTROL = "tidewright.control.v1.ControlService"
SMALL_BYTES = 64 << 10
LARGE_BYTES = 64 << 20  # a snapshot of a large pool with its events; the server's limit holds too


class Role(IntEnum):
    """Each may do what the ones before it may."""

    ANYONE = 0  # also without a token
    READ = 1
    OPERATE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Method:
    """What a call needs, whether it is recorded in the audit log, and how large it may be."""

    role: Role
    is_audited: bool = False  # every method that changes what the controller or the engine does
    max_bytes: int = SMALL_BYTES


_WATCH, _ASK = Method(Role.READ), Method(Role.READ)
_STEER = Method(Role.OPERATE, is_audited=True)
_OWN = Method(Role.ADMIN, is_audited=True)  # who decides from now on
_ENGINE = Method(Role.OPERATE, max_bytes=LARGE_BYTES)  # changes the caller's own session alone
_CONTROL = {
    "GetState": _WATCH,
    "WatchState": _WATCH,
    "WatchDecisions": _WATCH,
    "Explain": _WATCH,
    "GetForecast": _ASK,
    "GetPlan": _ASK,
    "ListPolicies": _ASK,
    "ProposeSwitch": _STEER,
    "ApplySwitch": _STEER,
    "CancelSwitch": _STEER,
    "Hold": _STEER,
    "Resume": _STEER,
    "SetMode": _STEER,
    "Rollback": _STEER,
    "LoadPolicy": _OWN,
    "SetCanary": _OWN,
    "Decide": _ENGINE,
    "ReportMetrics": _ENGINE,
}
METHODS = {f"{CONTROL}/{name}": method for name, method in _CONTROL.items()} | {
    "grpc.health.v1.Health/Check": Method(Role.ANYONE),
    "grpc.health.v1.Health/List": Method(Role.ANYONE),
    "grpc.health.v1.Health/Watch": Method(Role.ANYONE),
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Method(Role.READ),
}


def parse_role(name: str) -> Role | None:
    """'read', 'operate' or 'admin'."""
    return {r.name.lower(): r for r in Role if r is not Role.ANYONE}.get(name)
