"""Errors of fits to steps of known cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.cluster import ParallelConfig
from engine.profile import ProfiledCluster, StepTimeModel
from engine.step_fit import REGIMES, MeasuredSteps, fit_step_times
from envs.surrogate.calibration import residuals, table

ONE = ParallelConfig(1, 1)


def measure(model: StepTimeModel, noise: float, seed: int) -> MeasuredSteps:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(400):
        decoding, chunk = int(rng.integers(0, 12)), int(rng.integers(0, 2) * rng.integers(2, 200))
        if decoding + chunk == 0:
            continue
        decode_context = int(rng.integers(10, 300, decoding).sum())
        row = (
            decoding + chunk,
            decoding + (chunk > 0),
            decode_context + chunk,
            decode_context + chunk * (chunk + 1) / 2,
        )
        step_s = model.step_s(*row) * rng.lognormal(0.0, noise)
        rows.append((row[0], decoding, *row[1:], step_s))
    return MeasuredSteps.of(rows)


def test_errors_of_a_fit_by_regime(small_cluster: ProfiledCluster) -> None:
    uncalibrated = small_cluster.profile.step_model(ONE)
    truth = replace(uncalibrated, per_pair_s=3e-7, per_seq_s=1e-3)
    model = fit_step_times(ONE, measure(truth, 0.04, seed=1))
    held_out = residuals(model, measure(truth, 0.04, seed=2))
    assert set(held_out) == {*REGIMES, "all"}
    for regime, residual in held_out.items():
        assert residual.count > 20, regime
        assert residual.p50 < 0.05, regime  # the noise has a median of 2.7 %
        assert abs(residual.bias) < 0.02, regime
    before = residuals(uncalibrated, measure(truth, 0.04, seed=2))["all"]
    assert before.p50 > 2 * held_out["all"].p50
    assert before.bias < -0.1, "it lacks what a sequence costs"
    lines = table({ONE: held_out}).splitlines()
    assert len(lines) == 2 + len(REGIMES) + 1
    assert f"| {100 * held_out['all'].p50:.1f} |" in lines[-1]
