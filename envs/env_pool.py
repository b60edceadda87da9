"""Several serving environments that one process steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.serving_env import ServingEnv
from policies.base import Floats

Step = tuple[Floats, float, bool, bool, dict[str, Any]]


class Stepped(NamedTuple):
    """Of an environment whose episodes restart by themselves. Where one is done, `flat` is the next
    one's first and `reset_info` its info; `info` has `terminal_observation` then."""

    flat: Floats
    reward: float
    done: bool
    info: dict[str, Any]
    reset_info: dict[str, Any] | None


class EnvPool:
    """Environments and the threads that step them; they may share a planner. Simulation and the
    planner's solver run outside the interpreter's lock, the rest of a step holds it."""

    def __init__(self, envs: Sequence[ServingEnv], num_threads: int = 1) -> None:
        assert envs, "at least one environment"
        assert num_threads >= 1, num_threads
        self.envs = list(envs)
        self._threads = ThreadPoolExecutor(num_threads, "env") if num_threads > 1 else None

    def step(self, actions: NDArray[np.int64]) -> list[Step]:
        """`ServingEnv.step` of all; [N] actions."""
        each = map if self._threads is None else self._threads.map
        return list(each(ServingEnv.step, self.envs, actions))

    def step_on(self, actions: NDArray[np.int64]) -> list[Stepped]:
        """The same, beginning the next episode where one ends."""
        return [
            _step_on(env, *step) for env, step in zip(self.envs, self.step(actions), strict=True)
        ]

    def close(self) -> None:
        for env in self.envs:
            env.close()
        if self._threads is not None:
            self._threads.shutdown()


def _step_on(
    env: ServingEnv,
    flat: Floats,
    reward: float,
    terminated: bool,
    truncated: bool,
    info: dict[str, Any],
) -> Stepped:
    done, reset_info = terminated or truncated, None
    info["TimeLimit.truncated"] = truncated and not terminated
    if done:
        info["terminal_observation"] = flat
        flat, reset_info = env.reset()
    return Stepped(flat, reward, done, info, reset_info)
