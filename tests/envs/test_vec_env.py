"""Several environments at once: equal to each alone, with threads too, by both libraries' rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

import envs  # noqa: F401 (registers the environments)
from envs.serving_env import ServingEnv
from envs.vec_env import ServingVecEnv
from envs.vector_env import ServingVectorEnv

SURROGATE = "tidewright/Surrogate-v0"
STEPS = 4
SETTINGS = {"env.episode_s": STEPS * 15.0, "workload.load": [0.3, 0.3]}


@pytest.fixture(scope="module")
def make_env() -> Callable[..., ServingEnv]:
    from envs.experiment import build_env
    from envs.registered import load_experiment

    experiment = load_experiment(None, SETTINGS)
    planner = experiment.pipeline().planner  # one for all, threads included
    return lambda **options: build_env(experiment, planner, **options)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_vec_env_equals_its_environments(
    make_env: Callable[..., ServingEnv], num_threads: int
) -> None:
    """Also over the end of an episode: `terminal_observation`, `TimeLimit.truncated`, restart."""
    venv, alone = ServingVecEnv([make_env(), make_env()], num_threads), make_env()
    venv.seed(11)
    flats = venv.reset()
    first, _ = alone.reset(seed=12)  # the second environment's seed
    np.testing.assert_array_equal(flats[1], first)
    for step in range(STEPS):
        flats, rewards, dones, infos = venv.step(np.zeros(2, np.int64))
        flat, reward, terminated, truncated, _ = alone.step(0)
        last = step == STEPS - 1
        assert (terminated, truncated) == (False, last)
        assert rewards[1] == np.float32(reward)
        assert dones.tolist() == [last] * 2
        assert infos[1]["TimeLimit.truncated"] == last
        assert ("terminal_observation" in infos[1]) == last
        np.testing.assert_array_equal(infos[1]["terminal_observation"] if last else flats[1], flat)
    np.testing.assert_array_equal(flats[1], alone.reset()[0])  # the next episode has begun
    venv.close()
    assert all(env.cluster is None for env in venv.envs)


def test_maskable_ppo_learns_on_it(make_env: Callable[..., ServingEnv]) -> None:
    venv = ServingVecEnv([make_env(), make_env()])
    assert is_masking_supported(venv)
    model = MaskablePPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=1, seed=0)
    model.learn(32)
    masks = get_action_masks(venv)
    assert masks.shape == (2, venv.action_space.n)
    assert masks[:, 0].all()
    action, _ = model.predict(venv.reset(), action_masks=get_action_masks(venv))
    assert action.shape == (2,)
    venv.close()


# ---------------------------------------------------------------- gymnasium's VectorEnv


@pytest.mark.filterwarnings("error")
def test_make_vec_gives_the_batched_environment() -> None:
    venv = gymnasium.make_vec(SURROGATE, num_envs=4, settings=SETTINGS, num_threads=2)
    assert isinstance(venv, ServingVectorEnv)
    assert venv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    flats, infos = venv.reset(seed=0)
    assert venv.observation_space.contains(flats)
    assert infos["at_s"].tolist() == [0.0] * 4
    assert venv.action_masks().shape == (4, venv.single_action_space.n)
    assert venv.step(venv.action_space.sample())[1].shape == (4,)
    with pytest.raises(ValueError, match="3 seeds for 4 environments"):
        venv.reset(seed=[1, 2, 3])
    venv.close()
    venv.close()
    assert all(env.cluster is None for env in venv.envs)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, tuple) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(np.array_equal(ours, theirs)) if isinstance(ours, np.ndarray) else ours == theirs


def test_vector_env_behaves_as_gymnasium_s_own(make_env: Callable[..., ServingEnv]) -> None:
    """Beside `SyncVectorEnv` in the same autoreset mode: observations, rewards, flags and infos,
    `final_obs` and `final_info` included, over two episodes."""
    ours = ServingVectorEnv([make_env(columns=False) for _ in range(2)])
    theirs = SyncVectorEnv(
        [lambda: make_env(columns=False)] * 2, autoreset_mode=ours.metadata["autoreset_mode"]
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert same(ours.reset(seed=3), theirs.reset(seed=3))
    for step in range(2 * STEPS):
        actions = ours.action_masks().shape[1] - 1 - np.argmax(ours.action_masks()[:, ::-1], axis=1)
        found, expected = ours.step(actions), theirs.step(actions)
        for mine, other in zip(found, expected, strict=True):
            assert same(mine, other)
        assert found[3].all() == (step % STEPS == STEPS - 1)
        assert ("final_obs" in found[4]) == found[3].all()
    ours.close()
    theirs.close()
