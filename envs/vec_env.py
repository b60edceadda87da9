"""Several serving environments behind Stable-Baselines3's `VecEnv`, stepped in this process or in
worker processes that have several each: a process per environment would wait for its slowest most
of the time. The same seeds give the same episodes either way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs.env_pool import EnvPool
from envs.env_workers import EnvWorkers, MakeEnvs
from envs.serving_env import ServingEnv, spaces_of
from policies.base import Floats, ObservationSpec

Indices = None | int | Iterable[int]
Steps = tuple[Floats, Floats, NDArray[np.bool_], list[dict[str, Any]]]


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

    def step_wait(self) -> Steps:
        flats, rewards, dones, infos, reset_infos = zip(
            *self._pool.step_on(self._actions), strict=True
        )
        for index, info in enumerate(reset_infos):
            if info is not None:
                self.reset_infos[index] = info
        return np.stack(flats), np.array(rewards, np.float32), np.array(dones), list(infos)

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


class WorkerVecEnv(VecEnv):
    """The same in worker processes, which it owns; see `EnvWorkers`. Infos have neither `decision`
    nor the requests of the interval, and attributes are copies."""

    def __init__(
        self,
        make_envs: MakeEnvs,
        spec: ObservationSpec,
        num_envs: int,
        num_workers: int,
        num_threads: int = 1,
    ) -> None:
        self._workers = EnvWorkers(make_envs, spec, num_envs, num_workers, num_threads)
        try:
            super().__init__(num_envs, *spaces_of(spec))
        except BaseException:  # it asks the workers, which may have failed, or a Ctrl-C came
            self.close()
            raise

    def reset(self) -> Floats:
        self.reset_infos = self._workers.reset(self._seeds, self._options)
        self._reset_seeds()
        self._reset_options()
        return self._workers.board.flats.copy()

    def step_async(self, actions: NDArray[Any]) -> None:
        self._workers.begin_step(np.asarray(actions, np.int64))

    def step_wait(self) -> Steps:
        infos, reset_infos = zip(*self._workers.finish_step(), strict=True)
        for index, info in enumerate(reset_infos):
            if info is not None:
                self.reset_infos[index] = info
        board = self._workers.board
        rewards = board.rewards.astype(np.float32)
        return board.flats.copy(), rewards, board.dones.copy(), list(infos)

    def close(self) -> None:
        self._workers.close()

    @property
    def worker_pids(self) -> list[int]:
        """Until it is closed."""
        return self._workers.pids

    def has_attr(self, attr_name: str) -> bool:
        return all(self._workers.ask("has", (attr_name,), range(self.num_envs)))

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        return self._workers.ask("get", (attr_name,), self._get_indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        self._workers.ask("set", (attr_name, value), self._get_indices(indices))

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if method_name == "action_masks":
            return list(self._workers.board.masks[chosen])
        return self._workers.ask("call", (method_name, args, kwargs), chosen)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]
