"""Pipelines that show a policy less than they know: what each kind of knowledge is worth.

Nothing else changes: candidates, guardrails and switches are those of the whole pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from controller.decision import (
    NO_RESTRAINTS,
    DecisionPipeline,
    PreparedDecision,
    Restraints,
)
from engine.cluster import ClusterSnapshot
from policies.base import Observation, ObservationSpec

Hidden = Literal["forecast", "quantiles", "migration", "masks"]
FORECAST = ("forecast_mean", "forecast_q90", "forecast_error", "utilisation_q90", "headroom_q90")
MIGRATION = ("switch_s", "log_switch_s", "switch_per_grid", "weight_bytes", "devices_changed")
QUANTILES = {
    "forecast_q90": "forecast_mean",
    "utilisation_q90": "utilisation",
    "headroom_q90": "headroom",
}


class BlindPipeline(DecisionPipeline):
    """Like another pipeline, with some of the observation hidden.

    forecast: all that is known of times to come; quantiles: its spread, the mean stands for them;
    migration: what a switch would move and take; masks: which rows are legal, an illegal choice
    becomes keep.
    """

    hidden: tuple[Hidden, ...] = ()

    @classmethod
    def of(cls, whole: DecisionPipeline, hidden: Sequence[Hidden]) -> DecisionPipeline:
        """`whole` itself when nothing is hidden."""
        if not hidden:
            return whole
        blind = cls(whole.cluster, whole.typing, whole.config, whole.predictor)
        blind.planner, blind.hidden = whole.planner, tuple(hidden)
        return blind

    def prepare(
        self, snapshot: ClusterSnapshot, restraints: Restraints = NO_RESTRAINTS
    ) -> PreparedDecision:
        prepared = super().prepare(snapshot, restraints)
        seen = hide(self.observation_spec, prepared.observation, self.hidden)
        return replace(prepared, observation=seen)


def hide(spec: ObservationSpec, seen: Observation, hidden: Sequence[Hidden]) -> Observation:
    """A copy without what is hidden."""
    state, rows, mask = seen.state.copy(), seen.candidates.copy(), seen.mask
    for values, names in ((state, spec.state_features), (rows, spec.candidate_features)):
        if "forecast" in hidden:
            values[..., _columns(names, FORECAST)] = 0.0
        if "migration" in hidden:
            values[..., _columns(names, MIGRATION)] = 0.0
        if "quantiles" in hidden:
            for column, of in _pairs(names):
                values[..., column] = values[..., of]
    if "masks" in hidden:
        mask = np.arange(len(mask)) < len(seen.keys)
    return Observation(state, rows, mask, seen.keys)


def _columns(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Features of those names, of every type."""
    return [i for i, name in enumerate(names) if name.split(".")[0] in wanted]


def _pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """(column of a quantile, column of what stands for it)."""
    found = []
    for i, name in enumerate(names):
        base, dot, kind = name.partition(".")
        if base in QUANTILES:
            found.append((i, names.index(QUANTILES[base] + dot + kind)))
    return found
