"""What a policy's figures are on validation traffic, for the controller's retraining trigger."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from controller.retraining import FIGURES, RetrainingConfig, Smoothing, figures_of
from envs.serving_env import ServingEnv
from policies.base import Policy


def measure_expected(policy: Policy, envs: Iterable[ServingEnv]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each smoothed figure over one episode of each environment,
    once the smoothing has its memory; a figure that was never known is left out. For the key
    `expected` of a checkpoint's manifest."""
    memory, seen = RetrainingConfig().memory_ticks, {name: list[float]() for name in FIGURES}
    for env in envs:
        env.reset(seed=0)
        policy.reset()
        smoothing, tick = Smoothing(memory), 0
        while not env.is_over:
            prepared = env.prepared
            assert prepared is not None
            smoothing.observe(figures_of(prepared))
            for name, value in smoothing.values.items() if tick >= memory else ():
                seen[name].append(value)
            env.step(int(np.argmax(policy.probabilities(prepared.observation))))
            tick += 1
        env.close()
    return {
        name: {"mean": round(float(np.mean(v)), 5), "std": round(float(np.std(v)), 5)}
        for name, v in seen.items()
        if v
    }
