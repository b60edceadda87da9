"""Several serving environments behind Stable-Baselines3's `VecEnv`, stepped in one process.

A process per environment would spend more on sending observations than a step costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs.serving_env import ServingEnv
from policies.base import Floats

Indices = None | int | Iterable[int]
Step = tuple[Floats, float, bool, bool, dict[str, Any]]


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

    def close(self) -> None:
        for env in self.envs:
            env.close()
        if self._threads is not None:
            self._threads.shutdown()


class ServingVecEnv(VecEnv):
    """Owns its environments. Episodes restart by themselves: the info of the last step has
    `terminal_observation` and `TimeLimit.truncated`; `action_masks` are reached by `env_method`."""

    def __init__(self, envs: Sequence[ServingEnv], num_threads: int = 1) -> None:
        self._pool = EnvPool(envs, num_threads)
        self.envs = self._pool.envs
        first = self.envs[0]
        super().__init__(len(self.envs), first.observation_space, first.action_space)
        self._actions: NDArray[np.int64] = np.zeros(self.num_envs, np.int64)

    def reset(self) -> Floats:
        flats = []
        for index, env in enumerate(self.envs):
            options = self._options[index] or None
            flat, self.reset_infos[index] = env.reset(seed=self._seeds[index], options=options)
            flats.append(flat)
        self._reset_seeds()
        self._reset_options()
        return np.stack(flats)

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = np.asarray(actions, np.int64)

    def step_wait(self) -> tuple[Floats, Floats, NDArray[np.bool_], list[dict[str, Any]]]:
        steps = self._pool.step(self._actions)
        rewards = np.array([reward for _, reward, _, _, _ in steps], np.float32)
        flats, dones, infos = [], [], []
        for index, (flat, _, terminated, truncated, info) in enumerate(steps):
            info["TimeLimit.truncated"] = truncated and not terminated
            if terminated or truncated:
                info["terminal_observation"] = flat
                flat, self.reset_infos[index] = self.envs[index].reset()
            flats.append(flat)
            dones.append(terminated or truncated)
            infos.append(info)
        return np.stack(flats), rewards, np.array(dones), infos

    def close(self) -> None:
        self._pool.close()

    # ---------------------------------------------------------------- reaching into environments

    def _chosen(self, indices: Indices) -> list[ServingEnv]:
        return [self.envs[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        return [getattr(env, attr_name) for env in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        for env in self._chosen(indices):
            setattr(env, attr_name, deepcopy(value))

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        return [getattr(env, method_name)(*args, **kwargs) for env in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        return [False for _ in self._chosen(indices)]
