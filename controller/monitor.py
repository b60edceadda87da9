"""The controller's view of the traffic: arrival rates per type, latencies, lengths, freshness.

Fed by the cluster's events and snapshots; time comes from them. An arrival counts with its
P(type | prompt length, class, client), since its output length is unknown until it has finished.
Unknown is not zero: measurements that are missing, NaN or old are reported as stale.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from operator import add

import numpy as np
from numpy.typing import NDArray

from controller import counting
from controller.posterior import TypePosterior
from controller.workload import assign, centres
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    ReplicaStats,
    RequestOutcome,
    RequestStatus,
    WorkloadTyping,
)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
SCALES = (0.25, 1.0, 4.0)  # of window_s: fast, medium and slow rates
CENTRE_WEIGHT = 20.0  # finished requests that a type's fitted centre counts as
QUARTER_S = 900.0
LENGTH_MEMORY = 2000.0  # finished requests per type that its observed lengths remember


@dataclass(frozen=True, slots=True)
class MonitorState:
    """What is known at `at_s`. Tuples are per type; rates in requests per second."""

    at_s: float
    observed_s: float  # since the monitor was reset
    rates: tuple[tuple[float, ...], ...]  # [scale][type], fastest scale first
    num_outstanding: int  # arrived and not ended
    num_waiting: int
    waiting_prompt_tokens: int
    running_context_tokens: int
    kv_usage_mean: float  # over live replicas, 0..1
    kv_usage_max: float
    num_finished_recent: float  # finished requests that the latency figures stand on
    latency_s: float  # exponentially weighted means over window_s; 0 when nothing finished
    ttft_s: float
    tpot_s: float
    prompt_tokens: tuple[float, ...]  # observed means; the type's centre before any finished
    output_tokens: tuple[float, ...]
    stats_age_s: float  # oldest replica measurement; inf when one is missing
    is_stale: bool


def _is_finite(stats: ReplicaStats) -> bool:
    return math.isfinite(stats.measured_at_s + stats.num_running + stats.kv_blocks_used)


class Monitor:
    """Owns the counters. `observe` every event once, in order; `state` when a decision is due."""

    def __init__(self, typing: WorkloadTyping, window_s: float, stale_after_s: float) -> None:
        assert min(window_s, stale_after_s) > 0, (window_s, stale_after_s)
        self._typing, self._stale_after_s = typing, stale_after_s
        self._taus = window_s * np.array(SCALES)
        self._window_s = window_s
        self.posterior = TypePosterior(typing)
        self.reset(0.0)

    def reset(self, now_s: float) -> None:
        num_types = len(self._typing.types)
        self._start_s = self._last_s = self._interval_start_s = now_s
        self._arrived = np.zeros((len(SCALES), num_types))  # decayed counts
        self._interval = np.zeros(num_types)  # expected arrivals since the last interval ended
        self._ended = np.zeros(6)  # decayed: count, latency, count with ttft, ttft, tpot's count,..
        self._num_open = 0
        self._quarters: deque[tuple[int, tuple[float, ...]]] = deque(maxlen=4)
        self._length_weight = np.full(num_types, CENTRE_WEIGHT)
        self._length_sum = centres(self._typing) * CENTRE_WEIGHT
        self.posterior.reset()

    def observe(self, events: Iterable[ClusterEvent]) -> None:
        """Count arrivals and ends; other kinds of events are none of the monitor's business."""
        arrivals: list[Arrival] = []
        outcomes: list[RequestOutcome] = []
        for event in events:
            if event.arrival is not None:
                arrivals.append(event.arrival)
            elif event.outcome is not None:
                outcomes.append(event.outcome)
        self._num_open = max(0, self._num_open + len(arrivals) - len(outcomes))
        if arrivals:
            self._count_arrivals(arrivals)
        finished = [o for o in outcomes if o.status is RequestStatus.FINISHED]
        if finished:
            self._count_finished(finished)

    def _decay_to(self, now_s: float) -> None:
        elapsed_s = now_s - self._last_s
        if elapsed_s > 0:
            self._arrived *= np.exp(-elapsed_s / self._taus)[:, None]
            self._ended *= math.exp(-elapsed_s / self._window_s)
            self._last_s = now_s

    def _count_arrivals(self, arrivals: list[Arrival]) -> None:
        rows = self.posterior.rows_given(
            [a.prompt_tokens for a in arrivals],
            [a.request_class for a in arrivals],
            [a.client_id for a in arrivals],
        )
        self._add_arrivals(np.array([a.arrival_s for a in arrivals], np.float64), rows)

    def _add_arrivals(self, arrival_s: Floats, rows: Floats) -> None:
        """[N], and [N, J] what is known of their types."""
        self._decay_to(float(arrival_s.max()))
        counting.add_arrivals(
            arrival_s, rows, self._last_s, self._taus, self._arrived, self._interval
        )

    def _count_finished(self, finished: list[RequestOutcome]) -> None:
        prompt = np.array([o.prompt_tokens for o in finished], np.int64)
        output = np.array([o.output_tokens for o in finished], np.int64)
        types = assign(self._typing, prompt, output)
        labels = [o.request_class for o in finished], [o.client_id for o in finished]
        self.posterior.observe_given(prompt, types, *labels)
        arrival_s, first_token_s, finish_s = (
            np.array(times, np.float64)  # None becomes nan
            for times in zip(
                *[(o.arrival_s, o.first_token_s, o.finish_s) for o in finished], strict=True
            )
        )
        self._add_finished(types, prompt, output, arrival_s, first_token_s, finish_s)

    def _add_finished(
        self,
        types: Counts,
        prompt_tokens: Counts,
        output_tokens: Counts,
        arrival_s: Floats,
        first_token_s: Floats,
        finish_s: Floats,
    ) -> None:
        """[N] each; a time to the first token that is not known is nan."""
        keep = 1.0 - 1.0 / LENGTH_MEMORY
        lengths = self._length_weight, self._length_sum
        counting.add_lengths(types, prompt_tokens, output_tokens, keep, *lengths)
        self._decay_to(float(finish_s.max()))
        times = arrival_s, first_token_s, finish_s
        counting.add_latencies(*times, output_tokens, self._last_s, self._window_s, self._ended)

    def take_interval(self, now_s: float) -> Floats:
        """[J] mean arrival rates since the last call (or reset), in requests per second."""
        self._decay_to(now_s)
        elapsed_s = max(now_s - self._interval_start_s, 1e-9)
        rates = self._interval / elapsed_s
        quarter, arrived = int(now_s // QUARTER_S), tuple(self._interval.tolist())
        if self._quarters and self._quarters[-1][0] == quarter:
            arrived = tuple(map(add, self._quarters.pop()[1], arrived))
        self._quarters.append((quarter, arrived))
        self._interval[:], self._interval_start_s = 0.0, now_s
        return np.asarray(rates)

    def recent_counts(self, now_s: float) -> tuple[tuple[float, ...], ...]:
        """Arrivals[J] in each quarter of the last hour that had any, intervals taken only."""
        first = int(now_s // QUARTER_S) - 3
        return tuple([counts for q, counts in self._quarters if q >= first and any(counts)])

    def interval_s(self, now_s: float) -> float:
        """Seconds since the last interval was taken."""
        return now_s - self._interval_start_s

    def _rates(self, now_s: float) -> tuple[tuple[float, ...], ...]:
        """Decayed counts over decayed time; the weights since the start sum to one."""
        observed_s = max(now_s - self._start_s, 1e-3)
        seen_s = self._taus * -np.expm1(-observed_s / self._taus)
        return tuple(map(tuple, (self._arrived / seen_s[:, None]).tolist()))

    def _age_s(self, snapshot: ClusterSnapshot) -> float:
        known = {s.replica_id: s for s in snapshot.replicas}
        age_s = 0.0
        for replica in snapshot.deployment.replicas:
            stats = known.get(replica.replica_id)
            if stats is None or not _is_finite(stats):
                return math.inf
            age_s = max(age_s, snapshot.now_s - stats.measured_at_s)
        return age_s

    def state(self, snapshot: ClusterSnapshot) -> MonitorState:
        """The view at the snapshot's time. Call after the events up to it were observed."""
        self._decay_to(snapshot.now_s)
        running = waiting = waiting_tokens = context_tokens = 0
        usage: list[float] = []
        for s in snapshot.replicas:
            if s.alive and _is_finite(s):
                running += s.num_running
                waiting += s.num_waiting
                waiting_tokens += s.waiting_prompt_tokens
                context_tokens += s.running_context_tokens
                if s.kv_blocks_total > 0:
                    usage.append(s.kv_blocks_used / s.kv_blocks_total)
        waiting += snapshot.num_queued_unrouted
        age_s = self._age_s(snapshot)
        is_stale = not age_s <= self._stale_after_s
        count, latency, ttft_n, ttft, tpot_n, tpot = self._ended.tolist()
        prompts, outputs = (self._length_sum / self._length_weight[:, None]).T.tolist()
        return MonitorState(
            at_s=snapshot.now_s,
            observed_s=max(snapshot.now_s - self._start_s, 0.0),
            rates=self._rates(snapshot.now_s),
            num_outstanding=self._num_open if is_stale else running + waiting,
            num_waiting=waiting,
            waiting_prompt_tokens=waiting_tokens,
            running_context_tokens=context_tokens,
            kv_usage_mean=sum(usage) / len(usage) if usage else 0.0,
            kv_usage_max=max(usage, default=0.0),
            num_finished_recent=count,
            latency_s=latency / count if count > 0 else 0.0,
            ttft_s=ttft / ttft_n if ttft_n > 0 else 0.0,
            tpot_s=tpot / tpot_n if tpot_n > 0 else 0.0,
            prompt_tokens=tuple(prompts),
            output_tokens=tuple(outputs),
            stats_age_s=age_s,
            is_stale=is_stale,
        )
