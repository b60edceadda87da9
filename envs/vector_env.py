"""Several serving environments behind Gymnasium's `VectorEnv`: what `gymnasium.make_vec` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs.env_pool import EnvPool
from envs.serving_env import ServingEnv
from policies.base import Floats, Mask

Flags = NDArray[np.bool_]
Rewards = NDArray[np.float64]


class ServingVectorEnv(VectorEnv[Floats, NDArray[np.int64], NDArray[Any]]):
    """Owns its environments. Episodes restart in the step that ends them: that step's infos have
    `final_obs` and `final_info`, the observation is the next episode's first."""

    def __init__(self, envs: Sequence[ServingEnv], num_threads: int = 1) -> None:
        self._pool = EnvPool(envs, num_threads)
        self.envs, self.num_envs = self._pool.envs, len(envs)
        first = self.envs[0]
        self.render_mode = first.render_mode
        self.metadata = first.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, self.num_envs)
        self.action_space = batch_space(first.action_space, self.num_envs)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Floats, dict[str, Any]]:
        """Environment i has seed + i, or its own of a sequence."""
        seeds: Sequence[int | None]
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments; give one each.")
        found = [
            env.reset(seed=seed, options=options)
            for env, seed in zip(self.envs, seeds, strict=True)
        ]
        return np.stack([flat for flat, _ in found]), self._infos([info for _, info in found])

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Floats, Rewards, Flags, Flags, dict[str, Any]]:
        steps = self._pool.step(actions)
        _, rewards, terminated, truncated, _ = zip(*steps, strict=True)
        flats, infos = [], []
        for env, (flat, _, _, _, info) in zip(self.envs, steps, strict=True):
            if env.is_over:
                final = {"final_obs": flat, "final_info": _without_arrays(info)}
                flat, first = env.reset()
                info = first | final
            flats.append(flat)
            infos.append(info)
        return (
            np.stack(flats),
            np.array(rewards, np.float64),
            np.array(terminated),
            np.array(truncated),
            self._infos(infos),
        )

    def _infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for index, info in enumerate(infos):
            merged = self._add_info(merged, _without_arrays(info), index)
        return merged

    def action_masks(self) -> Mask:
        """[num_envs, max_candidates]; see `ServingEnv.action_masks`."""
        return np.stack([env.action_masks() for env in self.envs])

    def render(self) -> tuple[Any, ...]:
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


def _without_arrays(info: dict[str, Any]) -> dict[str, Any]:
    """`traffic` has a length of its own in every environment and cannot be stacked."""
    return {key: value for key, value in info.items() if key != "traffic"}
