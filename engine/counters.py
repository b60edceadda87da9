"""What the engine process counts while requests run: plain numbers that metrics read when asked."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from engine.cluster import Binding, SwitchMode, SwitchPhase, SwitchTicket
from engine.messages import LeaderStats

LATENCY_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKEN_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0,
)  # fmt: skip
LENGTH_BOUNDS_TOKENS = tuple(
    float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)
)  # 1 to 500,000


class Histogram:
    """Counts per bucket (upper bounds inclusive, one more without a bound) and the sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus writes a histogram."""
        total, rows = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started; replacing a replica resets none of them.

    A prompt counts once it is computed, an output token when it comes. `queue_s` and `prefill_s`
    need what leaders report; a leader that reports nothing leaves them empty.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    _seen: dict[int, LeaderStats] = field(default_factory=dict)  # by replica, the latest

    def add_growth(self, replica_id: int, stats: LeaderStats) -> None:
        """Add what a leader's own totals grew by since it last spoke."""
        before = self._seen.get(replica_id, _NOTHING)
        self._seen[replica_id] = stats
        self.num_preemptions += stats.num_preemptions_total - before.num_preemptions_total
        self.prefix_cache_queries += stats.prefix_cache_queries - before.prefix_cache_queries
        self.prefix_cache_hits += stats.prefix_cache_hits - before.prefix_cache_hits

    def keep_only(self, replica_ids: tuple[int, ...]) -> None:
        """Forget the leaders that are gone; their totals stay counted."""
        self._seen = {k: v for k, v in self._seen.items() if k in replica_ids}


_NOTHING = LeaderStats()


@dataclass(slots=True)
class SwitchCounters:
    """Totals of the switches that have ended; `last` is the latest of them."""

    ended: Counter[tuple[SwitchMode, SwitchPhase]] = field(default_factory=Counter)
    sequences: Counter[Binding] = field(default_factory=Counter)
    moved_bytes: int = 0
    duration_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    pause_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    last: SwitchTicket | None = None

    def observe(self, ticket: SwitchTicket) -> None:
        """Take a terminal ticket."""
        self.ended[ticket.mode, ticket.phase] += 1
        self.sequences[Binding.DRAIN] += ticket.num_drained
        self.sequences[Binding.MIGRATE] += ticket.num_migrated
        self.sequences[Binding.RECOMPUTE] += ticket.num_recomputed
        self.moved_bytes += ticket.moved_bytes
        self.duration_s.observe(ticket.duration_s)
        self.pause_s.observe(ticket.pause_s)
        self.last = ticket
