"""What a policy's figures are on validation traffic."""

from __future__ import annotations

import numpy as np

from controller.retraining import RetrainingConfig, RetrainingTrigger, expected_from, figures_of
from envs.expectations import measure_expected
from envs.registered import make_surrogate
from policies.baselines import KeepPolicy


def test_the_trigger_is_silent_where_its_expectations_come_from() -> None:
    """And fires where every latency is three times what it was."""
    settings = {"env.episode_s": 1500.0, "env.initial": "4xtp1pp1", "workload.load": (0.4, 0.4)}
    env = make_surrogate(settings=settings, columns=True)
    found = measure_expected(KeepPolicy(), [env])
    assert set(found) == {"forecast_error", "log_latency_ratio"}
    config = RetrainingConfig(ticks=10)
    calm, off = (RetrainingTrigger(expected_from({"expected": found}), config) for _ in range(2))
    env.reset(seed=0)
    fired = [False, False]
    while not env.is_over:
        assert env.prepared is not None
        figures = figures_of(env.prepared)
        slow = {name: value + np.log(3.0) * ("ratio" in name) for name, value in figures.items()}
        fired[0] |= calm.observe(figures).is_advised
        fired[1] |= off.observe(slow).is_advised
        env.step(0)
    env.close()
    assert fired == [False, True]
