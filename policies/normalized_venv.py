"""Observations and rewards on their way to the learner, normalised by running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from policies.base import Floats
from policies.normalizer import ObservationNormalizer, RunningMoments
from policies.ppo import PpoConfig

REWARD_CLIP = 10.0  # standard deviations of the discounted return


class NormalizedVecEnv(VecEnvWrapper):
    """Normalises observations (and rewards) and learns the statistics while it does so.

    `frozen`: statistics of observations stay as they are, so that a prior sees what it was trained
    on. `returns` holds the moments of the discounted return, which a resumed run takes over.
    """

    def __init__(
        self,
        venv: VecEnv,
        normalizer: ObservationNormalizer,
        config: PpoConfig,
        frozen: bool = False,
        returns: RunningMoments | None = None,
    ) -> None:
        super().__init__(venv)
        assert venv.num_envs % config.group_size == 0, (venv.num_envs, config.group_size)
        self.returns = returns or RunningMoments(1)
        self._normalizer, self._config, self._frozen = normalizer, config, frozen
        self._discounted = np.zeros(venv.num_envs)

    def reset(self) -> Floats:
        return self._observe(np.asarray(self.venv.reset(), np.float32))

    def step_wait(self) -> tuple[Floats, Any, Any, list[dict[str, Any]]]:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if info.get("terminal_observation") is not None:
                last = np.asarray(info["terminal_observation"], np.float32)
                info["terminal_observation"] = self._normalizer.normalise(last)
        if self._config.normalise_reward:
            rewards = self._scale(rewards, dones)
        return self._observe(np.asarray(observations, np.float32)), rewards, dones, infos

    def _observe(self, flat: Floats) -> Floats:
        if not self._frozen:
            self._normalizer.update(flat)
        return self._normalizer.normalise(flat)

    def _scale(self, rewards: Any, dones: Any) -> Any:
        """Rewards over the std of the running discounted return; the mean is left alone."""
        self._discounted = self._discounted * self._config.gamma + rewards
        self.returns.update(self._discounted[:, None])
        self._discounted[np.asarray(dones, bool)] = 0.0
        std = float(np.sqrt(self.returns.variance[0] + 1e-8))
        return np.clip(rewards / std, -REWARD_CLIP, REWARD_CLIP).astype(np.float32)
