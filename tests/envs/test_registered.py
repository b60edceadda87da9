"""The registered environments: Gymnasium's and Stable-Baselines3's checkers, seeds, grid, masks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import envs  # noqa: F401 (registers the environments)
from engine.errors import InvalidRequestError
from envs.serving_env import ServingEnv

SURROGATE, ENGINE = "tidewright/Surrogate-v0", "tidewright/Engine-v0"
SHORT = {"env.episode_s": 120.0, "workload.load": [0.3, 0.3]}
REAL_TIME = {
    "decision.grid_s": 0.25,
    "env.episode_s": 0.5,
    "env.initial": "4xtp1pp1",
    "workload.load": [0.05, 0.05],
}


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_surrogate(**options: Any) -> ServingEnv:
    env = gymnasium.make(SURROGATE, settings=SHORT, **options).unwrapped
    assert isinstance(env, ServingEnv)
    return env


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("columns", [False, True])
def test_checkers_find_nothing_in_the_surrogate(columns: bool) -> None:
    check_env(make_surrogate(columns=columns, render_mode="ansi"))
    sb3_check_env(make_surrogate(columns=columns), skip_render_check=False)


def test_it_needs_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = gymnasium.make(SURROGATE)
    flat, _ = env.reset(seed=3)
    assert env.observation_space.contains(flat)
    flat, reward, terminated, _, info = env.step(0)
    assert env.observation_space.contains(flat)
    assert np.isfinite(reward)
    assert not terminated
    assert info["at_s"] == 15.0  # the decision grid
    env.close()


def test_a_seed_makes_the_whole_episode() -> None:
    """Traffic, first deployment, perturbed profile: everything comes from the seed of `reset`."""
    env = make_surrogate()

    def run(seed: int) -> tuple[list[float], list[float], list[int]]:
        flat, _ = env.reset(seed=seed)
        sums, rewards, arrived, over = [float(flat.sum())], [], [], False
        while not over:
            legal = np.flatnonzero(env.action_masks())
            flat, reward, _, over, info = env.step(int(legal[-1]))
            sums.append(float(flat.sum()))
            rewards.append(reward)
            arrived.append(info["arrived"])
        return sums, rewards, arrived

    first, other = run(5), run(6)
    assert len(first[1]) == 8  # 120 s on a grid of 15 s
    assert run(5) == first
    assert other[2] != first[2]
    env.close()


def test_only_keep_is_legal_while_a_switch_runs() -> None:
    """On a grid finer than a switch, every decision inside it has one legal row."""
    settings = SHORT | {"decision.grid_s": 0.05, "decision.min_dwell_s": 0.05}
    env = gymnasium.make(SURROGATE, settings=settings).unwrapped
    assert isinstance(env, ServingEnv)
    env.reset(seed=1)
    inside = started = 0
    for _ in range(200):
        assert env.prepared is not None
        mask = env.action_masks()
        assert mask[0]
        if env.prepared.snapshot.switch_in_flight:
            inside += 1
            assert not mask[1:].any()
        _, _, _, _, info = env.step(int(np.flatnonzero(mask)[-1]))
        started += info["ticket"] is not None
    assert started > 0
    assert inside > started  # each lasts for several decisions
    env.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "nowhere.yaml"}, r"config nowhere\.yaml cannot be read"),
        ({"settings": {"env.episode": 5}}, r"unknown key 'env\.episode' in the settings; did you"),
        ({"settings": {"env.episode_s": -1}}, r"env\.episode_s in .* is -1"),
        ({"settings": {"seed.of": 1}}, r"seed in .*valid integer"),
        ({"render_mode": "human"}, r"render_mode is 'human'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    from envs.registered import make_surrogate as make

    with pytest.raises(InvalidRequestError, match=message):
        make(**options)


# ---------------------------------------------------------------- the real engine


def workers() -> set[int]:
    """Children of the fork server, which itself stays for later engines."""
    servers = psutil.Process().children()
    return {worker.pid for server in servers for worker in server.children(recursive=True)}


@pytest.mark.filterwarnings("error")
def test_checkers_find_nothing_in_the_engine(tiny_model_dir: Path) -> None:
    """Real workers, real time; all of them are gone after `close`."""
    before = workers()
    options = {"model": str(tiny_model_dir)}
    env = gymnasium.make(ENGINE, settings=REAL_TIME, options=options).unwrapped
    assert isinstance(env, ServingEnv)
    flat, _ = env.reset(seed=0)
    assert env.observation_space.contains(flat)
    assert len(workers() - before) == 4
    env.close()
    env.close()
    check_env(env, skip_render_check=True)
    env.close()
    assert workers() <= before


def test_engine_serves_and_switches(tiny_model_dir: Path) -> None:
    """Requests of the trace end, and a chosen candidate becomes the deployment."""
    settings = REAL_TIME | {"env.episode_s": 20.0, "decision.min_dwell_s": 0.25}
    env = gymnasium.make(
        ENGINE,
        settings=settings,
        options={"model": str(tiny_model_dir)},
        render_mode="ansi",
    ).unwrapped
    assert isinstance(env, ServingEnv)
    with env:
        env.reset(seed=2)
        assert env.prepared is not None
        finished, wanted = 0, ""
        while not (finished and env.prepared.snapshot.epoch):
            assert not env.is_over
            action = 0 if wanted else int(np.flatnonzero(env.action_masks())[-1])
            _, reward, _, _, info = env.step(action)
            finished += len(info["outcomes"])
            assert np.isfinite(reward)
            if info["ticket"] is not None:
                wanted = info["decision"].executed_key
        assert env.prepared.snapshot.deployment.key == wanted != "4xtp1pp1"
        assert wanted in env.render()
    assert env.cluster is None


def test_engine_refuses_what_is_not_the_profile_s(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match="block_size are those of the profile"):
        gymnasium.make(ENGINE, options={"block_size": 8})
    with pytest.raises(InvalidRequestError, match="unknown key 'modle'"):
        gymnasium.make(ENGINE, options={"modle": "x"})
