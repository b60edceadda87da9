"""What became of the requests after a switch: when clearly fewer are served well, undo it. Pure.

Goodput is the share of ended requests that were served within the targets, of those that arrived
after the switch, against those that ended before it began. Requests still open long after they
arrived count as not served. When much more arrives than before, nothing is concluded: the load may
be to blame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engine.cluster import (
    NO_SLO,
    ClusterEvent,
    RequestOutcome,
    RequestStatus,
    SloSpec,
    SwitchMode,
    SwitchPhase,
    SwitchTicket,
)

OWN_TARGET = 2.0  # without targets: times the 90th percentile before the switch
MAX_KEPT = 2000  # outcomes


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """What counts as a loss."""

    num_ticks: int = 3  # in a row at which goodput must be down
    drop: float = 0.2  # of the share of requests served well
    min_requests: int = 10  # per tick, to say anything
    max_load_growth: float = 1.25  # of arrivals per second, to be comparable
    window_s: float = 300.0  # before the switch, that it is compared with
    horizon_s: float = 900.0  # after it, that it is watched for


@dataclass(frozen=True, slots=True)
class Undo:
    """A switch that should be taken back."""

    ticket_id: str
    to_key: str  # where it was before
    from_key: str
    goodput_before: float
    goodput_after: float

    @property
    def reason(self) -> str:
        return (
            f"undo: goodput {self.goodput_after:.2f} after the switch to {self.from_key}, "
            f"{self.goodput_before:.2f} before"
        )


@dataclass(slots=True)
class _Watched:
    ticket: SwitchTicket
    slo: SloSpec
    before: float  # share served well
    arrivals_per_s: float  # before
    open_after_s: float  # an open request older than that is not served
    ended: list[RequestOutcome]  # since the last tick, of those that arrived after the switch
    open: dict[str, float]  # arrival_s
    num_arrived: int = 0
    streak: int = 0


class SwitchWatch:
    """Sees every event once, in order, and the last ticket at each tick."""

    def __init__(self, config: WatchConfig, slo: SloSpec = NO_SLO) -> None:
        self.config, self._slo = config, slo
        self.reset()

    def reset(self) -> None:
        self._ended: deque[RequestOutcome] = deque(maxlen=MAX_KEPT)
        self._arrivals: deque[float] = deque(maxlen=MAX_KEPT)
        self._watched: _Watched | None = None
        self._seen = ""
        self._not_watched: set[str] = set()

    def saved(self) -> dict[str, Any]:
        """Without the requests before, which `recall` takes."""
        watched = self._watched
        told = None if watched is None else asdict(replace(watched, ticket=_slim(watched.ticket)))
        return {"seen": self._seen, "left_out": sorted(self._not_watched), "watched": told}

    def recall(self, outcomes: Iterable[RequestOutcome], arrivals: Iterable[float]) -> None:
        """Requests that ended, and times of arrivals, before anything is observed."""
        self._ended.extend(outcomes)
        self._arrivals.extend(arrivals)

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._seen, self._not_watched = str(saved["seen"]), set(saved["left_out"])
        found = saved["watched"]
        self._watched = None if found is None else _restored(found)

    def leave_out(self, decision_id: str) -> None:
        """That decision's switch is not watched: it is an undo, or somebody wants it so."""
        self._not_watched.add(decision_id)

    @property
    def targets(self) -> SloSpec:
        """Those given, else from how requests were served lately."""
        if self.has_targets or not self._ended:
            return self._slo
        return own_targets(tuple(self._ended))

    @property
    def has_targets(self) -> bool:
        """Whether targets were given."""
        return self._slo != NO_SLO

    def attainment(self, since_s: float) -> tuple[int, int]:
        """Of the requests that ended after then: how many were served within the targets, and how
        many there are. May be asked from any thread."""
        slo, ended = self.targets, [o for o in tuple(self._ended) if o.finish_s > since_s]
        return sum(is_good(slo, o) for o in ended), len(ended)

    def observe(
        self, now_s: float, events: Iterable[ClusterEvent], ticket: SwitchTicket | None
    ) -> Undo | None:
        """One tick; says when the last switch should be undone, once."""
        for event in events:
            if event.arrival is not None:
                self._arrived(event.arrival.request_id, event.arrival.arrival_s)
            elif event.outcome is not None:
                self._has_ended(event.outcome)
        if ticket is not None and ticket.ticket_id != self._seen:
            if not ticket.phase.is_terminal:
                self._watched = None  # what is watched is on its way out
                return None
            self._seen = ticket.ticket_id
            self._watched = self._begin(ticket)
            return None
        return self._judge(now_s) if self._watched is not None else None

    def _arrived(self, request_id: str, arrival_s: float) -> None:
        self._arrivals.append(arrival_s)
        watched = self._watched
        if watched is not None and arrival_s >= watched.ticket.updated_s:
            watched.open[request_id] = arrival_s
            watched.num_arrived += 1

    def _has_ended(self, outcome: RequestOutcome) -> None:
        self._ended.append(outcome)
        watched = self._watched
        if watched is not None and outcome.arrival_s >= watched.ticket.updated_s:
            watched.open.pop(outcome.request_id, None)
            watched.ended.append(outcome)

    def _begin(self, ticket: SwitchTicket) -> _Watched | None:
        """None: there is nothing to watch, or nothing to compare with."""
        config, start_s = self.config, ticket.started_s
        undo = ticket.decision_id in self._not_watched
        self._not_watched.discard(ticket.decision_id)
        since_s = start_s - config.window_s
        before = [o for o in self._ended if since_s <= o.finish_s < start_s]
        if ticket.phase is not SwitchPhase.DONE or undo or len(before) < config.min_requests:
            return None
        slo = self._slo if self._slo != NO_SLO else own_targets(before)
        arrived = [t for t in self._arrivals if since_s <= t < start_s]
        span_s = max(start_s - min(arrived, default=start_s), 1e-9)
        latency = [o.finish_s - o.arrival_s for o in before]
        return _Watched(
            ticket=ticket,
            slo=slo,
            before=float(np.mean([is_good(slo, o) for o in before])),
            arrivals_per_s=len(arrived) / span_s,
            open_after_s=OWN_TARGET * float(np.quantile(latency, 0.9)),
            ended=[o for o in self._ended if o.arrival_s >= ticket.updated_s],
            open={},
        )

    def _judge(self, now_s: float) -> Undo | None:
        watched, config = self._watched, self.config
        assert watched is not None
        since_s = now_s - watched.ticket.updated_s
        rate = watched.num_arrived / max(since_s, 1e-9)
        if since_s > config.horizon_s or rate > config.max_load_growth * watched.arrivals_per_s:
            self._watched = None
            return None
        overdue = sum(now_s - t > watched.open_after_s for t in watched.open.values())
        number = len(watched.ended) + overdue
        if number < config.min_requests:
            return None
        after = sum(is_good(watched.slo, o) for o in watched.ended) / number
        watched.ended = []
        watched.streak = watched.streak + 1 if after < watched.before - config.drop else 0
        if watched.streak < config.num_ticks:
            return None
        ticket, self._watched = watched.ticket, None
        return Undo(ticket.ticket_id, ticket.from_key, ticket.to_key, watched.before, after)


def _slim(ticket: SwitchTicket) -> SwitchTicket:
    """Without what grows with the number of requests."""
    return replace(ticket, phase_s=(), bindings=())


def _restored(told: Mapping[str, Any]) -> _Watched:
    """What `asdict` made plain."""
    ticket, ended = dict(told["ticket"]), [dict(o) for o in told["ended"]]
    ticket |= {"phase": SwitchPhase(ticket["phase"]), "mode": SwitchMode(ticket["mode"])}
    ticket |= {"phase_s": (), "bindings": ()}
    values: dict[str, Any] = {
        "ticket": SwitchTicket(**ticket),
        "slo": SloSpec(**told["slo"]),
        "ended": [RequestOutcome(**o | {"status": RequestStatus(o["status"])}) for o in ended],
    }
    return _Watched(**dict(told) | values)


def is_good(slo: SloSpec, outcome: RequestOutcome) -> bool:
    """Whether a request was served within the targets; one that the client gave up is not bad."""
    if outcome.status is RequestStatus.CANCELLED:
        return True
    return slo.is_met_by(outcome)


def own_targets(before: Iterable[RequestOutcome]) -> SloSpec:
    """From how requests were served until now."""
    served = list(before)
    ttft = [o.ttft_s for o in served if o.ttft_s is not None]
    tpot = [o.tpot_s for o in served if o.tpot_s is not None]
    return SloSpec(
        OWN_TARGET * float(np.quantile(ttft, 0.9)) if ttft else 0.0,
        OWN_TARGET * float(np.quantile(tpot, 0.9)) if tpot else 0.0,
    )
