"""The environment: Gymnasium's contract, determinism, accounting, and the fast path's equality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from engine.cluster import (
    RequestOutcome,
    RequestStatus,
    SloSpec,
    UtilitySpec,
    WorkloadType,
    WorkloadTyping,
)
from engine.profile import ProfiledCluster
from envs.build import surrogate_parts
from envs.reward import RewardConfig, RewardLedger, Stretch
from envs.serving_env import ServingEnv
from envs.workload import RequestType, Trace, WorkloadConfig, generate

TYPING = WorkloadTyping(
    (WorkloadType("short", 12.0, 20.0), WorkloadType("long", 120.0, 40.0)), (0.6, 0.4)
)
TYPES = (RequestType("short", 12, 20), RequestType("long", 120, 40))
STEPS = 12
MakeEnv = Callable[..., ServingEnv]
REWARD = RewardConfig(
    0.05,
    1e-4,
    0.02,
    UtilitySpec(0.5, 0.3, 0.2),
    SloSpec(0.5, 0.05),
    Stretch((0.0, 50.0), (1.0, 3.0)),
    device_s_cost=1e-3,
)


@pytest.fixture
def make_env(small_cluster: ProfiledCluster) -> MakeEnv:
    """make_env(rate_per_s, **options of surrogate_parts)."""

    def make(rate_per_s: float = 40.0, **options: Any) -> ServingEnv:
        config = WorkloadConfig(types=TYPES, mean_rate_per_s=rate_per_s, max_tokens=250)
        decision = DecisionConfig(grid_s=5.0, min_dwell_s=5.0, max_candidates=8)
        pipeline = build_pipeline(small_cluster, TYPING, decision)

        def traffic(rng: np.random.Generator) -> Trace:
            return generate(config, STEPS * 5.0, rng)

        return ServingEnv(surrogate_parts(pipeline, traffic, "4xtp1pp1", **options))

    return make


def drawn_actions(env: ServingEnv, seed: int) -> Callable[[], int]:
    rng = np.random.default_rng(seed)
    return lambda: int(rng.choice(np.flatnonzero(env.action_masks())))


def test_same_seed_same_episode(make_env: MakeEnv) -> None:
    def run(seed: int) -> tuple[list[float], list[float], str]:
        env = make_env(spread=0.1)
        env.reset(seed=seed)
        act, rewards, sums = drawn_actions(env, 0), [], []
        for _ in range(STEPS):
            flat, reward, _, _, info = env.step(act())
            rewards.append(reward)
            sums.append(float(flat.sum()))
        return rewards, sums, info["decision"].decision_id

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_episode_is_truncated_and_accounts_for_every_request(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=1)
    act, outcomes, arrived, rewards, switches = drawn_actions(env, 1), [], 0, [], 0
    for step in range(STEPS):
        _, reward, terminated, truncated, info = env.step(act())
        assert (terminated, truncated) == (False, step == STEPS - 1)
        assert info["at_s"] == pytest.approx(5.0 * (step + 1))
        outcomes += info["outcomes"]
        arrived += info["arrived"]
        rewards.append(reward)
        switches += info["ticket"] is not None
        assert (info["decision"].plan is None) == (info["ticket"] is None)
    assert switches > 0
    record = env.record()
    assert record.outcomes == tuple(outcomes)
    assert len(record.outcomes) + len(record.unfinished_arrivals_s) == arrived
    assert record.rewards == tuple(rewards)
    assert record.num_switches == switches
    assert all(o.status is RequestStatus.FINISHED for o in outcomes)


def test_rewards_are_those_of_the_ledger(make_env: MakeEnv) -> None:
    """A second way to the same sum: all outcomes at once, when every request has ended."""
    env = make_env(rate_per_s=15.0)
    env.reset(seed=2)
    rng, ledger = np.random.default_rng(2), RewardLedger(env.parts.reward)
    total, moved, outcomes = 0.0, 0, []
    for _ in range(STEPS):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        _, reward, _, _, info = env.step(action)
        total += reward
        moved += info["decision"].plan.weight_bytes if info["ticket"] else 0
        outcomes += info["outcomes"]
        assert sum(info["reward_terms"].values()) == pytest.approx(reward)
    submitted = env.parts.make_trace(np.random.default_rng(2)).requests()
    for request in submitted:
        ledger.admit(request)
    assert ledger.settle(outcomes, 5.0 * STEPS, moved).total == pytest.approx(total)


def test_illegal_action_keeps(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=0)
    illegal = np.flatnonzero(~env.action_masks())
    assert len(illegal)
    _, _, _, _, info = env.step(int(illegal[-1]))
    assert info["ticket"] is None
    assert info["decision"].vetoes


def test_switch_is_followed_by_a_new_epoch(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=0)
    while env.step(drawn_actions(env, 4)())[4]["ticket"] is None:
        pass
    assert env.prepared is not None
    assert env.prepared.snapshot.epoch == 1
    assert env.action_masks()[0]


@pytest.mark.parametrize("rate_per_s", [20.0, 150.0])
def test_columns_equal_events(make_env: MakeEnv, rate_per_s: float) -> None:
    """The fast path: same observations, masks, rewards and switches, also under overload."""
    options = {"spread": 0.1, "reward": REWARD}
    plain, fast = make_env(rate_per_s, **options), make_env(rate_per_s, **options, columns=True)
    for seed in (7, 8):
        first, _ = plain.reset(seed=seed)
        np.testing.assert_allclose(fast.reset(seed=seed)[0], first, rtol=1e-6)
        act, switches = drawn_actions(plain, seed), 0
        for _ in range(STEPS):
            action = act()
            one, other = plain.step(action), fast.step(action)
            np.testing.assert_allclose(other[0], one[0], rtol=1e-5, atol=1e-6)
            assert other[1] == pytest.approx(one[1], rel=1e-9, abs=1e-9)
            assert (plain.action_masks() == fast.action_masks()).all()
            assert other[4]["arrived"] == one[4]["arrived"]
            assert len(other[4]["traffic"]["finish_s"]) == len(one[4]["outcomes"])
            assert other[4]["decision"].executed_key == one[4]["decision"].executed_key
            switches += one[4]["ticket"] is not None
        assert switches > 0
        assert plain.cluster is not None
        assert fast.cluster is not None
        assert plain.cluster.snapshot() == fast.cluster.snapshot()


def test_slo_by_hand() -> None:
    done = RequestOutcome("r", RequestStatus.FINISHED, 0.0, 0.5, 1.5, 10, 11)  # TPOT 0.1 s
    assert SloSpec().is_met_by(done)
    assert SloSpec(0.5, 0.1).is_met_by(done)
    assert not SloSpec(0.4, 0.2).is_met_by(done)
    assert not SloSpec(0.6, 0.09).is_met_by(done)
    rejected = RequestOutcome("r", RequestStatus.REJECTED, 0.0, None, 0.0, 10, 0)
    assert not SloSpec().is_met_by(rejected)
