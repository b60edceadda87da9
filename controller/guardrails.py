"""Vetoes: which candidates a policy may not choose, and what happens when it does. Pure.

The same vetoes are the mask before sampling and the review after it, in training and in
production. A vetoed choice becomes keep, which is never vetoed. `RULES` is the one list of all
guardrails, in their order; docs/guardrails.md explains it and is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from engine.cluster import Candidate, ClusterSnapshot, ClusterSpec, ParallelConfig
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.plan import check_memory

KEEP = 0
NO_SUCH_CANDIDATE = "no_such_candidate"


@dataclass(frozen=True, slots=True)
class Rule:
    """One guardrail: the reason that it gives, what it means, and what it looks at."""

    name: str
    meaning: str
    memory: bool = False  # whether it follows from past failures, outcomes or operators
    undo_waives: bool = False  # whether an undo after a loss of goodput goes ahead all the same


RULES = (
    Rule("switch_in_flight", "a switch runs; at most one does"),
    Rule("stale_metrics", "the engine's figures are old, missing or no numbers, or events lost"),
    Rule("unobserved", "traffic has been seen for too short a time to know the load"),
    Rule("hold", "an operator holds the deployment until an hour named", memory=True),
    Rule("drift", "the engine was switched by hand; that is not fought", memory=True),
    Rule("dwell", "the last switch ended too short a time ago", undo_waives=True),
    Rule("switch_budget", "the budget of switches per hour is spent"),
    Rule("infeasible", "it does not fit: devices alive, memory, heads or layers"),
    Rule("undone", "a switch to it was undone a short time ago", memory=True),
    Rule("capacity_change", "it takes or gives back too many devices at once", undo_waives=True),
    Rule("coverage", "a type of requests would have no capacity or too little", undo_waives=True),
    Rule("headroom", "it could not carry the traffic forecast", undo_waives=True),
    Rule("transition", "the switch itself would pause what the load needs"),
    Rule("disagreement", "the planner finds it clearly worse than keeping", undo_waives=True),
)
RULE = {rule.name: rule for rule in RULES}
UNDO_WAIVES = frozenset(rule.name for rule in RULES if rule.undo_waives)


@dataclass(frozen=True, slots=True)
class GuardrailConfig:
    """Limits of the vetoes."""

    min_headroom: float = 1.0  # at the median forecast, while keep is above it
    max_headroom_loss: float = 0.05  # below the floor, how much worse than keep a choice may be
    min_coverage: float = 1.0  # capacity for each type alone over its high forecast
    max_capacity_change: float = 0.5  # share of the pool's devices, per decision
    in_place_max_load: float = 0.5  # of capacity, above which nothing may pause that it needs
    clearly_worse: float = 0.25  # by how much, in all that the planner knows

    def __post_init__(self) -> None:
        if not 0 < self.max_capacity_change <= 1 or not self.clearly_worse >= 0:
            raise InvalidRequestError(
                "guardrails need max_capacity_change in (0, 1] and clearly_worse of 0 or more, got "
                f"{self.max_capacity_change} and {self.clearly_worse}."
            )


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the vetoes of one tick follow from, beside the candidates.

    `not_now` are reasons against any switch (of `RULES`), `banned` those against some deployments
    by key. `capacity` is requests per second of each type that one replica takes, `demand` the
    high forecast of each type.
    """

    spec: ClusterSpec
    snapshot: ClusterSnapshot
    is_stale: bool = False
    not_now: tuple[str, ...] = ()
    banned: Mapping[str, str] = field(default_factory=dict)
    capacity: Mapping[ParallelConfig, Sequence[float]] = field(default_factory=dict)
    demand: Sequence[float] = ()
    dead: frozenset[int] = frozenset()  # positions of replicas that serve nothing
    is_in_place: Callable[[Candidate], bool] = lambda candidate: False


@dataclass(frozen=True, slots=True)
class Review:
    """What is executed in place of the chosen row, and why."""

    executed: int
    vetoes: tuple[str, ...]
    propensity: float  # total probability of the rows that end in the executed one


class Shape(NamedTuple):
    alike: tuple[tuple[ParallelConfig, int], ...]  # configurations and how many replicas of each
    num_devices: int


@lru_cache(maxsize=4096)
def _shape(configs: tuple[ParallelConfig, ...]) -> Shape:
    alike = tuple((parallel, len(list(group))) for parallel, group in groupby(configs))
    return Shape(alike, sum(parallel.num_devices for parallel in configs))


@lru_cache(maxsize=4096)
def _fits(spec: ClusterSpec, configs: tuple[ParallelConfig, ...]) -> bool:
    """Devices, memory, heads and layers, all devices being alive."""
    try:
        spec.check(configs)
        for parallel in set(configs):
            check_memory(spec, parallel)
    except InfeasibleError:
        return False
    return True


class _Tick:
    """The vetoes of one tick that differ between candidates."""

    def __init__(self, now: Circumstances, keep: Candidate, config: GuardrailConfig) -> None:
        self._now, self._keep, self._config = now, keep, config
        live = tuple([c for i, c in enumerate(keep.configs) if i not in now.dead])
        self._live = _shape(live)
        self._alive = now.spec.num_devices - len(set(now.snapshot.dead_devices))
        self._keep_devices = self._live.num_devices
        self._keep_coverage = self._coverage(self._live)

    def reasons(self, candidate: Candidate) -> Iterator[str]:
        """Every veto against it, in the order of `RULES`."""
        shape = _shape(candidate.configs)
        if self._infeasible(candidate, shape):
            yield "infeasible"
        if self._now.banned and candidate.key in self._now.banned:
            yield self._now.banned[candidate.key]
        if self._changes_too_much(shape):
            yield "capacity_change"
        if self._covers_too_little(shape):
            yield "coverage"
        if self._lacks_headroom(candidate):
            yield "headroom"
        if self._pauses_too_much(candidate):
            yield "transition"
        if self._is_clearly_worse(candidate, shape):
            yield "disagreement"

    def _infeasible(self, candidate: Candidate, shape: Shape) -> bool:
        return not _fits(self._now.spec, candidate.configs) or shape.num_devices > self._alive

    def _changes_too_much(self, shape: Shape) -> bool:
        """More devices only count while keep has the headroom to wait for them."""
        change = shape.num_devices - self._keep_devices
        if change > 0 and self._keep.headroom < self._config.min_headroom:
            return False
        return abs(change) > self._config.max_capacity_change * self._now.spec.num_devices

    def _coverage(self, shape: Shape) -> list[float]:
        """Per type, what these replicas take of it alone over what may arrive of it."""
        capacity = self._now.capacity
        rows = [(capacity[parallel], n) for parallel, n in shape.alike if parallel in capacity]
        return [
            sum([row[j] * n for row, n in rows]) / demand if demand > 0 else np.inf
            for j, demand in enumerate(self._now.demand)
        ]

    def _covers_too_little(self, shape: Shape) -> bool:
        floor = self._config.min_coverage
        found = zip(self._coverage(shape), self._keep_coverage, strict=True)
        return any(covered < min(floor, kept) for covered, kept in found)

    def _lacks_headroom(self, candidate: Candidate) -> bool:
        """Below the floor though keep is above it; or, with keep below it too, worse than keep."""
        config = self._config
        floor = min(config.min_headroom, self._keep.headroom - config.max_headroom_loss)
        return candidate.headroom < floor

    def _pauses_too_much(self, candidate: Candidate) -> bool:
        """In place, what changes stands still: what stays must carry the load meanwhile, unless
        the load is low, or keep cannot carry it either and the candidate can."""
        config, keep = self._config, self._keep
        load = 1.0 / max(keep.headroom, 1e-9)
        stays = 1.0 - candidate.num_devices_changed / max(self._keep_devices, 1)
        if load <= max(config.in_place_max_load, stays):
            return False
        if keep.headroom < config.min_headroom <= candidate.headroom:
            return False
        return self._now.is_in_place(candidate)

    def _is_clearly_worse(self, candidate: Candidate, shape: Shape) -> bool:
        """By the margin in latency and headroom at both forecasts, and no smaller, and with no
        more room for KV."""
        keep, factor = self._keep, 1.0 + self._config.clearly_worse
        return (
            candidate.latency_s > factor * keep.latency_s
            and candidate.headroom * factor < keep.headroom
            and candidate.headroom_q90 * factor < keep.headroom_q90
            and candidate.kv_capacity_tokens <= keep.kv_capacity_tokens
            and shape.num_devices >= self._keep_devices
        )


def mask_reasons(
    now: Circumstances,
    candidates: Sequence[Candidate],
    config: GuardrailConfig,
    waived: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    """Why each candidate is illegal: the first rule against it that is not waived; empty where it
    is legal. Keep (row 0) always is."""
    in_flight = ("switch_in_flight",) if now.snapshot.switch_in_flight else ()
    stale = ("stale_metrics",) if now.is_stale else ()
    for reason in (*in_flight, *stale, *now.not_now):
        if reason not in waived:
            return ("", *(reason for _ in candidates[1:]))
    tick = _Tick(now, candidates[KEEP], config)
    return (
        "",
        *(next((r for r in tick.reasons(c) if r not in waived), "") for c in candidates[1:]),
    )


def guard_map(reasons: Sequence[str], rows: int) -> tuple[int, ...]:
    """Row -> executed row, for that many rows: those past the candidates and vetoed ones become
    keep. `reasons` holds one entry per candidate."""
    ends = [KEEP if reason else row for row, reason in enumerate(reasons[:rows])]
    return (*ends, *[KEEP] * (rows - len(ends)))


def review(reasons: Sequence[str], action: int, probabilities: ArrayLike | None = None) -> Review:
    """The row executed for `action`, with the propensity of that row after the guard map.

    Without probabilities the choice counts as deterministic.
    """
    known = 0 <= action < len(reasons)
    executed = action if known and not reasons[action] else KEEP
    vetoes: tuple[str, ...] = ()
    if executed != action:
        vetoes = (reasons[action] if known else NO_SUCH_CANDIDATE,)
    if probabilities is None:
        return Review(executed, vetoes, 1.0)
    given = np.asarray(probabilities, np.float64)
    ends = guard_map(reasons, len(given))
    sent = [p for p, end in zip(given.tolist(), ends, strict=True) if end == executed]
    return Review(executed, vetoes, float(min(1.0, sum(sent))))
