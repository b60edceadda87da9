"""A toy task for learners: an environment whose best row is plain to see."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from policies.base import Observation, ObservationSpec

SPEC = ObservationSpec(("bias",), ("is_keep", "worth"), 4, 15.0)
EPISODE = 32


class PickTheBest(VecEnv):
    """Reward 1 for the legal row of largest worth, else 0; one random row is masked."""

    def __init__(self, num_envs: int, seed: int) -> None:
        shape = (SPEC.flat_size,)
        super().__init__(
            num_envs, spaces.Box(-np.inf, np.inf, shape, np.float32), spaces.Discrete(4)
        )
        self.rng, self.clock, self.illegal = np.random.default_rng(seed), 0, 0
        self.masks = np.ones((num_envs, 4), bool)
        self.now: list[Observation] = []

    def _draw(self) -> np.ndarray:
        rows = self.rng.normal(size=(self.num_envs, 4, 2)).astype(np.float32)
        rows[:, :, 0] = [1, 0, 0, 0]
        self.masks = np.ones((self.num_envs, 4), bool)
        self.masks[np.arange(self.num_envs), self.rng.integers(1, 4, self.num_envs)] = False
        state = np.ones(1, np.float32)
        self.now = [
            Observation(state, r, m, ("a", "b", "c", "d"))
            for r, m in zip(rows, self.masks, strict=True)
        ]
        return np.stack([o.flat() for o in self.now])

    def reset(self) -> np.ndarray:
        return self._draw()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = np.asarray(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        worth = np.stack([np.where(o.mask, o.candidates[:, 1], -np.inf) for o in self.now])
        self.illegal += int((~self.masks[np.arange(self.num_envs), self.actions]).sum())
        rewards = (worth.argmax(1) == self.actions).astype(np.float32)
        self.clock += 1
        done = self.clock % EPISODE == 0
        following = self._draw()
        infos: list[dict[str, Any]] = [{} for _ in self.now]
        if done:
            for row, info in enumerate(infos):
                info |= {"terminal_observation": following[row], "TimeLimit.truncated": True}
        return following, rewards, np.full(self.num_envs, done), infos

    def close(self) -> None:
        pass

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks"

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kw: Any) -> list[Any]:
        assert method_name == "action_masks"
        return list(self.masks)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs
