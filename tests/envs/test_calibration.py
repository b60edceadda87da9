"""Calibration of a profile by steps of known cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster, StepTimeModel
from engine.step_fit import REGIMES, MeasuredSteps
from envs.surrogate.calibration import calibrate, residuals, table

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


def test_calibrated_profile_predicts_other_steps(small_cluster: ProfiledCluster) -> None:
    profile = small_cluster.profile
    truth = replace(profile.step_model(ONE), per_pair_s=3e-7, per_seq_s=1e-3, stage_share=0.7)
    started = replace(
        profile,
        steps=tuple(
            replace(m, busy_cores=0.9, stage_share=0.7) if m.parallel == ONE else m
            for m in profile.steps
        ),
    )
    found, calibrations = calibrate(started, {ONE: measure(truth, 0.04, seed=1)})
    model = found.step_model(ONE)
    assert (model.busy_cores, model.stage_share) == (0.9, 0.7)
    assert found.steps[1:] == started.steps[1:]
    held_out = residuals(model, measure(truth, 0.04, seed=2))
    assert set(held_out) == {*REGIMES, "all"}
    for regime, residual in held_out.items():
        assert residual.count > 20, regime
        assert residual.p50 < 0.05, regime  # the noise has a median of 2.7 %
        assert abs(residual.bias) < 0.02, regime
    before = residuals(profile.step_model(ONE), measure(truth, 0.04, seed=2))["all"]
    assert before.p50 > 2 * held_out["all"].p50
    lines = table(calibrations).splitlines()
    assert len(lines) == 2 + len(REGIMES) + 1
    assert f"| {100 * calibrations[ONE].residuals['all'].p50:.1f} |" in lines[-1]


def test_calibration_names_what_it_refuses(small_cluster: ProfiledCluster) -> None:
    steps = measure(small_cluster.profile.step_model(ONE), 1.0, seed=3)
    with pytest.raises(InvalidRequestError, match="tp1pp1 are no fit"):
        calibrate(small_cluster.profile, {ONE: steps})
    with pytest.raises(InvalidRequestError, match="tp8pp8"):
        calibrate(small_cluster.profile, {ParallelConfig(8, 8): steps})
