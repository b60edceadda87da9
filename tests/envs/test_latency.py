"""Where the surrogate's step times come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel
from envs.surrogate import kernel, layout
from envs.surrogate.latency import linear_profile, step_records

TWO = ParallelConfig(2, 1)


def test_compiled_step_time_equals_the_model(small_cluster: ProfiledCluster) -> None:
    straight = StepTimeModel(TWO, 1e-3, 2e-5, 3e-5, 4e-7, per_pair_s=5e-9)
    knots = (1, 2, 64, 65, 400)
    curved = replace(straight, token_knots=knots, token_s=(1e-3, 3e-3, 4e-3, 9e-3, 1e-2))
    for model in (straight, curved):
        profile = replace(small_cluster.profile, steps=(model,))
        step = step_records(profile, factor=1.5)[TWO]
        for tokens in (1, 2, 3, 63, 64, 65, 66, 399, 400, 401, 5000):
            found = kernel.step_seconds(step[()], tokens, 3, 700, 9e4, 1.25)
            assert found == pytest.approx(
                1.5 * model.step_s(tokens, 3, 700, 9e4, memory=1.25), rel=1e-12
            )


def test_too_many_knots_are_refused(small_cluster: ProfiledCluster) -> None:
    knots = tuple(range(1, layout.MAX_KNOTS + 2))
    model = StepTimeModel(
        TWO, 0.0, 0.0, 0.0, 0.0, token_knots=knots, token_s=tuple(map(float, knots))
    )
    profile: ServingProfile = replace(small_cluster.profile, steps=(model,))
    with pytest.raises(InvalidRequestError, match="17 knots"):
        step_records(profile)


def test_ideal_machine_scales_with_its_devices() -> None:
    configs = [ParallelConfig(1, 1), ParallelConfig(4, 1), ParallelConfig(1, 2)]
    profile = linear_profile(configs, 0.0, 1e-4, 2e-4, 1e-6)
    one, four, piped = (m.step_s(100, 10, 5000) for m in profile.steps)
    assert one / four == pytest.approx(4.0)
    assert profile.steps[2].stage_share * piped == pytest.approx(one / 2)
    assert np.isclose(one, 0.01 + 0.002 + 0.005)
