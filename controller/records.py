"""What a controller tells of itself: mode, tick records, counters. Mirrors protos/control.proto."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine.cluster import SwitchTicket


class Mode(StrEnum):
    ACTIVE = "active"  # decides and applies
    ADVISORY = "advisory"  # decides and logs only
    OFF = "off"  # observes only


class TickStatus(StrEnum):
    DECIDED = "decided"
    OBSERVED = "observed"  # mode off
    UNAVAILABLE = "unavailable"  # the engine did not answer
    FAILED = "failed"  # the tick itself failed; `reason` says how


@dataclass(frozen=True, slots=True)
class TypeRate:
    """Requests per second of one workload type over one decision interval."""

    type: str
    forecast_p50_per_s: float
    forecast_p90_per_s: float
    actual_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class CandidateView:
    """One candidate as the policy saw it."""

    key: str
    origin: str
    legal: bool
    mask_reason: str
    probability: float | None  # None where nothing was decided
    headroom: float
    predicted_switch_s: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class TickRecord:
    """One tick of the control loop."""

    seq: int
    at_s: float
    status: TickStatus
    mode: Mode
    decision_id: str = ""
    candidates: tuple[CandidateView, ...] = ()
    action: int = 0
    chosen_key: str = ""
    executed_key: str = ""
    propensity: float = 0.0
    policy: str = ""
    reason: str = ""
    vetoes: tuple[str, ...] = ()
    ticket: SwitchTicket | None = None
    rates: tuple[TypeRate, ...] = ()
    epoch: int = 0
    deployment_key: str = ""
    num_waiting: int = 0
    num_running: int = 0
    tick_s: float = 0.0
    notes: tuple[str, ...] = ()  # what happened beside the decision: drift, an undo, a time-out
    arm: str = ""  # of the canary; empty when there is none


@dataclass(slots=True)
class Counters:
    """Since the controller started; only its loop writes them."""

    num_ticks: int = 0
    num_decisions: int = 0
    num_switches_started: int = 0
    num_switches_done: int = 0
    num_switches_failed: int = 0
    num_vetoed: int = 0
    num_unavailable: int = 0
    num_failed: int = 0
    num_fallbacks: int = 0
    num_late: int = 0
    num_restarts: int = 0
    num_events_lost: int = 0
    num_drifts: int = 0
    num_undone: int = 0
    num_timeouts: int = 0
