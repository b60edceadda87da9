"""What fitted step times are worth: their errors on steps of the engine, by regime. Pure.

The fits are the profiler's (`engine.step_fit`).
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.cluster import ParallelConfig
from engine.profile import StepTimeModel
from engine.step_fit import MeasuredSteps, Residual


def residuals(model: StepTimeModel, steps: MeasuredSteps) -> dict[str, Residual]:
    """Errors of a model on steps that were alone in flight, its own or held-out ones, by
    `engine.step_fit.REGIMES` and over all of them ("all")."""
    predicted = steps.predicted(model)
    by_regime = {
        regime: Residual.of(predicted[chosen], steps.step_s[chosen])
        for regime, chosen in steps.regimes().items()
    }
    return by_regime | {"all": Residual.of(predicted, steps.step_s)}


def table(calibrations: Mapping[ParallelConfig, Mapping[str, Residual]]) -> str:
    """Markdown, a row per configuration and regime; percent."""
    lines = ["| configuration | regime | steps | p50 | p90 | bias |", "|---|---|---|---|---|---|"]
    for parallel, by_regime in calibrations.items():
        for regime, r in by_regime.items():
            cells = " | ".join(f"{100 * value:.1f}" for value in (r.p50, r.p90, r.bias))
            lines.append(f"| {parallel.key} | {regime} | {r.count} | {cells} |")
    return "\n".join(lines)
