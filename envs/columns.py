"""The fast path of training: traffic as columns, without an object per request.

Each part has its plain counterpart (events, `Monitor`, `RewardLedger`), and a test holds an
episode on both paths equal. Only the surrogate can record columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from controller.decision import DecisionPipeline
from controller.monitor import Monitor
from controller.workload import assign
from engine.cluster import ClusterEvent, ClusterSnapshot, Drivable, SloSpec
from envs.reward import (
    WORST,
    RewardConfig,
    RewardTerms,
    charge,
    log_worths,
    lone_seconds,
    reward_terms,
    slo_met,
    times_of,
    warm_up,
    weighted_parts,
)
from envs.traffic_feed import IntervalCounts
from envs.workload import Trace
from policies.base import Counts, Rollout, Seconds, TrafficColumns


@runtime_checkable
class ColumnDrivable(Drivable, Protocol):
    """A cluster that takes and gives traffic as columns."""

    def submit_columns(
        self, arrival_s: Seconds, prompt_tokens: Counts, output_tokens: Counts
    ) -> None:
        """Many requests by arrival time, none before the present time or an earlier submission."""
        ...

    def take_columns(self) -> TrafficColumns:
        """What happened since the last call."""
        ...


class ColumnMonitor(Monitor):
    """`Monitor` that can also be told of traffic by columns, which have no classes or clients."""

    @classmethod
    def like(cls, monitor: Monitor) -> ColumnMonitor:
        """A fresh one with the same settings."""
        return cls(monitor._typing, monitor._window_s, monitor._stale_after_s)

    def observe_columns(self, traffic: TrafficColumns) -> None:
        """As `observe` of the same arrivals and ends."""
        arrived, ended = len(traffic.arrival_s), len(traffic.finish_s)
        self._num_open = max(0, self._num_open + arrived - ended)
        if arrived:
            rows = self.posterior.rows(traffic.arrival_prompt_tokens)
            self._add_arrivals(traffic.arrival_s, rows)
        if traffic.finished.any():
            self._count_finished_columns(traffic)

    def _count_finished_columns(self, traffic: TrafficColumns) -> None:
        done: Any = slice(None) if traffic.finished.all() else traffic.finished
        prompt, output = traffic.prompt_tokens[done], traffic.output_tokens[done]
        types = assign(self._typing, prompt, output)
        self.posterior.observe(prompt, types)
        times = traffic.ended_arrival_s, traffic.first_token_s, traffic.finish_s
        self._add_finished(types, prompt, output, *(each[done] for each in times))


class ColumnLedger:
    """`RewardLedger` over one trace that is submitted in order, starting at `start_s`."""

    def __init__(self, config: RewardConfig, trace: Trace, start_s: float) -> None:
        warm_up()
        self.config = config
        self._stretch = config.stretch.of(config, trace)
        self._reference_s = self._stretch * lone_seconds(config, trace)
        worst_s = config.utility.worst_slowdown * self._reference_s
        self._arrival_s = trace.arrival_s + start_s
        self._due_s = self._arrival_s + worst_s
        self._is_charged = np.zeros(len(trace), np.bool_)
        self._first_open = 0  # all before are charged

    def settle(
        self,
        traffic: TrafficColumns,
        now_s: float,
        switched_bytes: int = 0,
        device_s: float = 0.0,
    ) -> RewardTerms:
        """As `RewardLedger.settle`."""
        arrived = int(np.searchsorted(self._arrival_s, now_s, side="right"))
        ended = traffic.index, traffic.finished, self.parts(traffic)
        span = self._first_open, arrived
        served, unserved, self._first_open = charge(
            *ended, self._is_charged, self._due_s, span, now_s
        )
        return reward_terms(self.config, served, unserved, switched_bytes, device_s)

    def loss(self, before: ClusterSnapshot, after: Rollout) -> float:
        """By how much requests that ended in a stretch of simulated time miss a worth of 1."""
        ended = after.traffic
        served = self.parts(ended)[:, ended.finished].sum()
        return float(len(ended.finished) - served - WORST * (~ended.finished).sum())

    def fork(self) -> ColumnLedger:
        """A copy that knows what has been charged."""
        copied = copy.copy(self)
        copied._is_charged = self._is_charged.copy()
        return copied

    def open_worth(self, now_s: float) -> float:
        """At most what the requests that are still open will be worth: as if all that arrived
        until `now_s` ended then, their objective missed."""
        config, weigh = self.config, self.config.utility
        is_open = ~self._is_charged & (self._arrival_s <= now_s)
        slowdown = (now_s - self._arrival_s[is_open]) / self._reference_s[is_open]
        worth = (weigh.latency + weigh.tpot) * log_worths(slowdown, weigh.worst_slowdown)
        return float((worth - weigh.slo).sum()) / config.scale_requests

    def parts(self, ended: TrafficColumns) -> Seconds:
        """[3, E] `parts_of_utility` of each request, as if it had finished."""
        config, weigh = self.config, self.config.utility
        weights = float(weigh.latency), float(weigh.tpot), float(weigh.slo)
        met = slo_met(config.slo, ended)
        references = (
            self._reference_s[ended.index],
            self._stretch[ended.index] * config.ref_tpot_s,
        )
        found: Seconds = weighted_parts(
            *(weights, float(weigh.worst_slowdown), met),
            *(ended.output_tokens, times_of(ended), references),
        )
        return found


class ColumnTraffic:
    """`envs.traffic_feed.EventTraffic` by columns; see there."""

    def __init__(
        self,
        cluster: Drivable,
        pipeline: DecisionPipeline,
        trace: Trace,
        start_s: float,
        reward: RewardConfig,
    ) -> None:
        assert isinstance(cluster, ColumnDrivable), "only a cluster that records columns"
        if not isinstance(pipeline.monitor, ColumnMonitor):
            pipeline.monitor = ColumnMonitor.like(pipeline.monitor)
        self._cluster, self._monitor = cluster, pipeline.monitor
        self.ledger = ColumnLedger(reward, trace, start_s)
        self._trace, self._arrival_s = trace, trace.arrival_s + start_s
        self._next = 0
        self._interval: TrafficColumns | None = None

    def submit_until(self, until_s: float) -> int:
        first = self._next
        self._next = int(np.searchsorted(self._arrival_s, until_s, side="right"))
        due = slice(first, self._next)
        self._cluster.submit_columns(
            self._arrival_s[due], self._trace.prompt_tokens[due], self._trace.output_tokens[due]
        )
        return self._next - first

    def observe(self, events: Sequence[ClusterEvent]) -> None:
        self._interval = self._cluster.take_columns()
        self._monitor.observe_columns(self._interval)

    def settle(self, now_s: float, switched_bytes: int, device_s: float) -> RewardTerms:
        assert self._interval is not None, "observe first"
        return self.ledger.settle(self._interval, now_s, switched_bytes, device_s)

    def interval_info(self) -> dict[str, Any]:
        assert self._interval is not None, "observe first"
        return {"traffic": self._interval.to_dict()}

    def counts(self, arrived: int, slo: SloSpec) -> IntervalCounts:
        assert self._interval is not None, "observe first"
        ended = self._interval
        met, finished = int(slo_met(slo, ended).sum()), int(ended.finished.sum())
        return IntervalCounts(arrived, finished, met, len(ended.finished) - finished)
