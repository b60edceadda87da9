"""A right model replays a log exactly; a wrong one does not, and its error is what is learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from logged_controller import TYPES, TYPING, Even

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from engine.cluster import (
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster
from envs.build import default_reward
from envs.logged_replay import replay_logged, replay_policy
from envs.serving_env import EnvParts, ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import WorkloadConfig, generate
from policies.baselines import KeepPolicy

STEPS, GRID_S = 40, 5.0


def make_env(cluster: ProfiledCluster) -> ServingEnv:
    trace = generate(
        WorkloadConfig(types=TYPES, mean_rate_per_s=40.0, max_tokens=250),
        STEPS * GRID_S,
        np.random.default_rng(0),
    )
    decision = DecisionConfig(grid_s=GRID_S, min_dwell_s=5.0, max_candidates=8)
    initial = dense_deployment(parse_deployment_key("4xtp1pp1"))
    return ServingEnv(
        EnvParts(
            build_pipeline(cluster, TYPING, decision),
            lambda rng: SurrogateCluster(cluster, initial, columns=True),
            lambda rng: trace,
            default_reward(cluster),
            columns=True,
        )
    )


def log_of(env: ServingEnv) -> tuple[list[float], list[str]]:
    """Rewards, and the key that was switched to at each decision."""
    rng, rewards, switches = np.random.default_rng(3), [], []
    env.reset(seed=0)
    while not env.is_over:
        legal = np.flatnonzero(env.action_masks())
        _, reward, _, _, info = env.step(int(rng.choice(legal)))
        rewards.append(reward)
        switches.append(info["decision"].executed_key if info["ticket"] is not None else "")
    return rewards, switches


def test_a_right_model_gives_the_rewards_of_the_log(small_cluster: ProfiledCluster) -> None:
    """Routing follows forecasts, which the replay makes from the same arrivals."""
    rewards, switches = log_of(make_env(small_cluster))
    assert sum(map(bool, switches)) >= 3
    run = replay_logged(make_env(small_cluster), switches)
    np.testing.assert_allclose(run.reward, rewards, atol=1e-9)
    assert run.features.shape == (STEPS, 3)
    assert {key for key in switches if key} <= set(run.keys)


def test_a_slow_model_gives_less(small_cluster: ProfiledCluster) -> None:
    env = make_env(small_cluster)
    rewards, switches = log_of(env)
    steps = tuple(s.scaled(2.0) for s in small_cluster.profile.steps)
    slow = replace(small_cluster, profile=replace(small_cluster.profile, steps=steps))
    model = make_env(slow)
    model.parts = replace(model.parts, reward=env.parts.reward)
    assert replay_logged(model, switches).reward.sum() < sum(rewards) - 0.5


def test_a_policy_replayed_in_a_right_model_is_an_episode_of_it(
    small_cluster: ProfiledCluster,
) -> None:
    env = make_env(small_cluster)
    run = replay_policy(env, Even(), np.random.default_rng(4), deterministic=False)
    rng, rewards = np.random.default_rng(4), []
    env.reset(seed=0)
    while not env.is_over:
        mask = env.action_masks()
        rewards.append(env.step(int(rng.choice(len(mask), p=mask / mask.sum())))[1])
    assert run.reward.tolist() == pytest.approx(rewards, abs=0)
    kept = replay_policy(env, KeepPolicy(), rng, deterministic=True)
    assert set(kept.keys) == {"4xtp1pp1"}
    assert kept.features[:, 2].max() == 0
