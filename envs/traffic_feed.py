"""Hands an episode's trace to a cluster, interval by interval, and takes in what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from controller.decision import DecisionPipeline
from engine.cluster import ClusterEvent, Drivable, RequestOutcome, RequestStatus, SloSpec
from envs.reward import RewardConfig, RewardLedger, RewardTerms
from envs.workload import Trace


@dataclass(frozen=True, slots=True)
class IntervalCounts:
    """Requests of one interval; `met` are those within the service-level objective."""

    arrived: int = 0
    finished: int = 0
    met: int = 0
    rejected: int = 0


class TrafficFeed(Protocol):
    """One episode's traffic. Per interval: `submit_until`, then `observe`, then `settle`."""

    def submit_until(self, until_s: float) -> int:
        """Submit what arrives up to then; how many requests that was."""
        ...

    def observe(self, events: Sequence[ClusterEvent]) -> None:
        """Tell the pipeline of the interval's traffic; `events` are all of the interval's."""
        ...

    def settle(self, now_s: float, switched_bytes: int, device_s: float) -> RewardTerms:
        """The interval's reward, in which `device_s` device-seconds were in use."""
        ...

    def interval_info(self) -> dict[str, Any]: ...

    def counts(self, arrived: int, slo: SloSpec) -> IntervalCounts:
        """Of the interval's ended requests; `arrived` is what `submit_until` gave."""
        ...


class EventTraffic:
    """The plain way, over any `Drivable`: one object per request and event."""

    def __init__(
        self,
        cluster: Drivable,
        pipeline: DecisionPipeline,
        trace: Trace,
        start_s: float,
        reward: RewardConfig,
    ) -> None:
        self._cluster, self._pipeline = cluster, pipeline
        self._requests, self._start_s = trace.requests(), start_s
        self._ledger = RewardLedger(reward)
        self._stretch = reward.stretch.of(reward, trace).tolist()
        self._next = 0
        self._interval: list[RequestOutcome] = []
        self.open_arrivals_s: dict[str, float] = {}  # of requests not ended
        self.outcomes: list[RequestOutcome] = []

    def submit_until(self, until_s: float) -> int:
        first = self._next
        while self._next < len(self._requests):
            request = self._requests[self._next]
            if self._start_s:
                request = replace(request, arrival_s=request.arrival_s + self._start_s)
            if request.arrival_s > until_s:
                break
            self._cluster.submit(request)
            self._ledger.admit(request, self._stretch[self._next])
            self.open_arrivals_s[request.request_id] = request.arrival_s
            self._next += 1
        return self._next - first

    def observe(self, events: Sequence[ClusterEvent]) -> None:
        self._pipeline.observe(events)
        self._interval = [e.outcome for e in events if e.outcome is not None]
        self.outcomes += self._interval
        for outcome in self._interval:
            self.open_arrivals_s.pop(outcome.request_id, None)

    def settle(self, now_s: float, switched_bytes: int, device_s: float) -> RewardTerms:
        return self._ledger.settle(self._interval, now_s, switched_bytes, device_s)

    def interval_info(self) -> dict[str, Any]:
        return {"outcomes": self._interval}

    def counts(self, arrived: int, slo: SloSpec) -> IntervalCounts:
        met = sum(slo.is_met_by(outcome) for outcome in self._interval)
        finished = sum(o.status is RequestStatus.FINISHED for o in self._interval)
        return IntervalCounts(arrived, finished, met, len(self._interval) - finished)
