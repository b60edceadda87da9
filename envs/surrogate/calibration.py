"""Calibration: step times fitted to steps of the engine, and what the fits are worth per regime.

The fit is the profiler's own (`engine.step_fit`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.cluster import ParallelConfig
from engine.profile import ServingProfile, StepTimeModel
from engine.step_fit import MAX_RESIDUAL_P50, MeasuredSteps, Residual, fit_step_times


@dataclass(frozen=True, slots=True)
class Calibration:
    """One configuration: its step times and their errors by regime, and over all steps ("all")."""

    model: StepTimeModel
    residuals: Mapping[str, Residual]


def residuals(model: StepTimeModel, steps: MeasuredSteps) -> dict[str, Residual]:
    """Errors of a model on steps, its own or held-out ones, by `engine.step_fit.REGIMES`."""
    predicted = steps.predicted(model)
    by_regime = {
        regime: Residual.of(predicted[chosen], steps.step_s[chosen])
        for regime, chosen in steps.regimes().items()
    }
    return by_regime | {"all": Residual.of(predicted, steps.step_s)}


def calibrate(
    profile: ServingProfile,
    measured: Mapping[ParallelConfig, MeasuredSteps],
    knots: Sequence[int] = (),
    max_residual_p50: float = MAX_RESIDUAL_P50,
) -> tuple[ServingProfile, dict[ParallelConfig, Calibration]]:
    """The profile with step times fitted to `measured`; stage_share, busy_cores and configurations
    without steps stay as they are. Raises InvalidRequestError, naming the configuration, where the
    profile lacks it or `fit_step_times` refuses."""
    found = {}
    for parallel, steps in measured.items():
        old = profile.step_model(parallel)
        model = replace(
            fit_step_times(parallel, steps, knots, max_residual_p50),
            stage_share=old.stage_share,
            busy_cores=old.busy_cores,
        )
        found[parallel] = Calibration(model, residuals(model, steps))
    models = tuple(found[m.parallel].model if m.parallel in found else m for m in profile.steps)
    return replace(profile, steps=models), found


def table(calibrations: Mapping[ParallelConfig, Calibration]) -> str:
    """Markdown, a row per configuration and regime; percent."""
    lines = ["| configuration | regime | steps | p50 | p90 | bias |", "|---|---|---|---|---|---|"]
    for parallel, calibration in calibrations.items():
        for regime, r in calibration.residuals.items():
            cells = " | ".join(f"{100 * value:.1f}" for value in (r.p50, r.p90, r.bias))
            lines.append(f"| {parallel.key} | {regime} | {r.count} | {cells} |")
    return "\n".join(lines)
