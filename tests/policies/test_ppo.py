"""MaskablePPO with the candidate network learns a toy task in seconds, reproducibly."""

import numpy as np
import pytest
from pick_the_best import EPISODE, SPEC, PickTheBest

from policies.normalized_venv import NormalizedVecEnv
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoConfig
from policies.training import TrainingResult, Watch, train

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
