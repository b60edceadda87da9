"""Vetoes: which candidates a policy may not choose, and what happens when it does. Pure.

The same vetoes are the mask before sampling and the review after it. A vetoed choice becomes
keep, which is never vetoed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from engine.cluster import Candidate, ClusterSnapshot, ClusterSpec
from engine.errors import InfeasibleError
from engine.migration.plan import check_memory

KEEP = 0


@dataclass(frozen=True, slots=True)
class GuardrailConfig:
    """Floors of the vetoes."""

    min_headroom: float = 1.0  # at the median forecast, while keep is above it
    max_headroom_loss: float = 0.05  # below the floor, how much worse than keep a choice may be


@dataclass(frozen=True, slots=True)
class Review:
    """What is executed in place of the chosen row, and why."""

    executed: int
    vetoes: tuple[str, ...]
    propensity: float  # total probability of the rows that end in the executed one


def _infeasible(spec: ClusterSpec, snapshot: ClusterSnapshot, candidate: Candidate) -> bool:
    alive = spec.num_devices - len(set(snapshot.dead_devices))
    try:
        spec.check(candidate.configs)
        for parallel in set(candidate.configs):
            check_memory(spec, parallel)
    except InfeasibleError:
        return True
    return sum(c.num_devices for c in candidate.configs) > alive


def _lacks_headroom(keep: Candidate, candidate: Candidate, config: GuardrailConfig) -> bool:
    """Below the floor though keep is above it; or, with keep below it too, worse than keep."""
    floor = min(config.min_headroom, keep.headroom - config.max_headroom_loss)
    return candidate.headroom < floor


def mask_reasons(
    spec: ClusterSpec,
    snapshot: ClusterSnapshot,
    candidates: Sequence[Candidate],
    is_stale: bool,
    not_now: str,
    config: GuardrailConfig,
) -> tuple[str, ...]:
    """Why each candidate is illegal; empty where it is legal. Keep (row 0) always is.

    `not_now` is the deployment scheduler's reason against any switch, or empty.
    """

    def reason(candidate: Candidate) -> str:
        if snapshot.switch_in_flight:
            return "switch_in_flight"
        if is_stale:
            return "stale_metrics"
        if not_now:
            return not_now
        if _infeasible(spec, snapshot, candidate):
            return "infeasible"
        if _lacks_headroom(candidates[KEEP], candidate, config):
            return "headroom"
        return ""

    return ("", *(reason(c) for c in candidates[1:]))


def review(reasons: Sequence[str], action: int, probabilities: ArrayLike | None = None) -> Review:
    """The row executed for `action`, with the propensity of that row after the guard map.

    `reasons` holds one entry per candidate. Rows past the candidates and vetoed rows become
    keep. Without probabilities the choice counts as deterministic.
    """

    def executed_for(row: int) -> int:
        return row if 0 <= row < len(reasons) and not reasons[row] else KEEP

    executed = executed_for(action)
    vetoes: tuple[str, ...] = ()
    if executed != action:
        vetoes = (reasons[action] if 0 <= action < len(reasons) else "no_such_candidate",)
    if probabilities is None:
        return Review(executed, vetoes, 1.0)
    given = np.asarray(probabilities, np.float64)
    sent = [p for row, p in enumerate(given.tolist()) if executed_for(row) == executed]
    return Review(executed, vetoes, float(min(1.0, sum(sent))))
