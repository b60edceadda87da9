"""Several serving environments behind Stable-Baselines3's `VecEnv`, stepped in one process.

A process per environment would spend more on sending observations than a step costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs.serving_env import ServingEnv
from policies.base import Floats

Indices = None | int | Iterable[int]


class ServingVecEnv(VecEnv):
    """Owns its environments. Episodes restart by themselves: the info of the last step has
    `terminal_observation` and `TimeLimit.truncated`; `action_masks` are reached by `env_method`."""

    def __init__(self, env_makers: Sequence[Callable[[], ServingEnv]]) -> None:
        self.envs = [make() for make in env_makers]
        assert self.envs, "at least one environment"
        first = self.envs[0]
        super().__init__(len(self.envs), first.observation_space, first.action_space)
        self._actions: NDArray[np.int64] = np.zeros(self.num_envs, np.int64)
        shape = first.observation_space.shape
        assert shape is not None
        self._observations = np.zeros((self.num_envs, *shape), np.float32)

    def reset(self) -> Floats:
        for index, env in enumerate(self.envs):
            options = self._options[index] or None
            seed = self._seeds[index]
            self._observations[index], self.reset_infos[index] = env.reset(
                seed=seed, options=options
            )
        self._reset_seeds()
        self._reset_options()
        return self._observations.copy()

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = np.asarray(actions, np.int64)

    def step_wait(self) -> tuple[Floats, Floats, NDArray[np.bool_], list[dict[str, Any]]]:
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, np.bool_)
        infos: list[dict[str, Any]] = []
        for index, env in enumerate(self.envs):
            flat, rewards[index], terminated, truncated, info = env.step(self._actions[index])
            info["TimeLimit.truncated"] = truncated and not terminated
            if terminated or truncated:
                dones[index] = True
                info["terminal_observation"] = flat
                flat, self.reset_infos[index] = env.reset()
            self._observations[index] = flat
            infos.append(info)
        return self._observations.copy(), rewards, dones, infos

    def close(self) -> None:
        for env in self.envs:
            env.close()

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
