"""MaskablePPO with the candidate network learns a toy task in seconds, reproducibly."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from policies.base import Observation, ObservationSpec
from policies.normalized_venv import NormalizedVecEnv
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoConfig
from policies.training import TrainingResult, Watch, train

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


CONFIG = PpoConfig(
    n_timesteps=16384, n_steps=32, batch_size=256, learning_rate=3e-3, gamma=0.5, hidden_size=16
)


def run(seed: int, config: PpoConfig = CONFIG) -> tuple[TrainingResult, PickTheBest]:
    venv = PickTheBest(16, seed)
    return train(venv, config, SPEC, seed), venv


def test_it_learns_to_pick_the_best_legal_row() -> None:
    result, venv = run(seed=1)
    assert venv.illegal == 0
    exam = PickTheBest(400, seed=99)
    exam.reset()
    picks = np.array([int(result.policy.probabilities(o).argmax()) for o in exam.now])
    exam.step_async(picks)
    assert exam.step_wait()[1].mean() > 0.9
    assert exam.illegal == 0
    assert result.state.num_timesteps == 16384
    curve = result.state.reward_curve
    assert curve[-1][1] > curve[0][1]


def test_same_seed_same_weights() -> None:
    config = PpoConfig(n_timesteps=1024, n_steps=32, batch_size=256, hidden_size=8)
    first, second, third = (run(seed, config)[0].policy.network for seed in (3, 3, 4))
    one, two, three = (n.state_dict()["logit.weight"].numpy() for n in (first, second, third))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)


def test_an_interrupt_keeps_what_was_learned() -> None:
    def stop(num_timesteps: int) -> None:
        if num_timesteps >= 1024:
            raise KeyboardInterrupt

    result = train(PickTheBest(16, 0), CONFIG, SPEC, 0, Watch(report=stop))
    assert result.interrupted
    assert result.state.num_timesteps == 1024


def test_scaled_rewards_keep_their_sign_and_have_unit_returns() -> None:
    venv = NormalizedVecEnv(
        PickTheBest(64, seed=0), ObservationNormalizer(SPEC), PpoConfig(gamma=0.5)
    )
    venv.reset()
    returns, seen = np.zeros(64), []
    for _ in range(EPISODE - 1):
        rewards = venv.step(np.zeros(64, int))[1]
        assert (rewards >= 0).all()
        returns = 0.5 * returns + rewards
        seen.append(returns.std())
    assert np.mean(seen[10:]) == pytest.approx(1.0, rel=0.2)
