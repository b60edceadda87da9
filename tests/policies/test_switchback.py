"""Switchback: plans are balanced and drawn, the test is exact, intervals hold the truth."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from policies.switchback import (
    Plan,
    SwitchbackConfig,
    analyse,
    block_means,
    blocks_needed,
    detectable,
    dumps,
    loads,
    pair_differences,
    plan,
    randomisation_p,
    sign_of,
)

GRID_S = 15.0


def rewards(found: Plan, effect: float, rng: np.random.Generator, carried_s: float = 0.0):  # type: ignore[no-untyped-def]
    """Traffic that drifts, noise, `effect` for B, and what a policy leaves behind for a while."""
    at_s = np.arange(0.0, found.duration_s, GRID_S)
    drift = np.sin(at_s / 20_000.0) + 0.3 * np.sin(at_s / 3_000.0)
    worth = np.array([effect * (found.arm_at(max(0.0, t - carried_s)) == "B") for t in at_s])
    return at_s, drift + worth + 0.5 * rng.standard_normal(len(at_s))


def test_a_plan_is_balanced_drawn_and_the_same_for_its_seed() -> None:
    found = plan(SwitchbackConfig(num_blocks=40, seed=3))
    assert found == plan(SwitchbackConfig(num_blocks=40, seed=3))
    assert found != plan(SwitchbackConfig(num_blocks=40, seed=4))
    arms = [b.arm for b in found.blocks]
    assert all({arms[i], arms[i + 1]} == {"A", "B"} for i in range(0, 40, 2))
    assert 5 < sum(arms[i] == "A" for i in range(0, 40, 2)) < 15
    for block, then in itertools.pairwise(found.blocks):
        assert block.end_s == then.begin_s
    for block in found.blocks:
        assert 1200 <= block.end_s - block.begin_s <= 1800
        assert block.count_from_s == block.begin_s + 600
        assert found.arm_at(block.begin_s) == found.arm_at(block.end_s - 1) == block.arm
    with pytest.raises(InvalidRequestError, match="not in the experiment"):
        found.arm_at(found.duration_s)


def test_burn_in_and_what_runs_over_an_end_are_not_counted() -> None:
    found = plan(SwitchbackConfig(num_blocks=6, shortest_s=60, longest_s=60, burn_in_s=30))
    at_s = np.arange(0.0, 360.0, 15.0) + 5.0
    reward = np.arange(len(at_s), dtype=float)
    means, counted = block_means(found, at_s, reward, GRID_S)
    assert means.tolist() == [2.0, 6.0, 10.0, 14.0, 18.0, 22.0]  # one interval of each block
    assert counted == 6
    with pytest.raises(InvalidRequestError, match=r"block 6 of 6 .* has no logged interval"):
        block_means(found, at_s[:-4], reward[:-4], GRID_S)


def test_p_by_hand_and_by_enumeration() -> None:
    rng = np.random.default_rng(0)
    assert randomisation_p(np.array([1.0, 2.0, 3.0]), rng) == 2 / 8
    values = rng.normal(size=9)
    orders = itertools.product((-1, 1), repeat=9)
    more = [abs(np.dot(o, values)) >= abs(values.sum()) - 1e-12 for o in orders]
    assert randomisation_p(values, rng) == pytest.approx(np.mean(more))


def test_many_pairs_are_sampled() -> None:
    values = np.random.default_rng(1).normal(0.5, 1.0, 30)
    several = [randomisation_p(values, np.random.default_rng(i)) for i in range(3)]
    z = values.sum() / math.sqrt((values**2).sum())
    normal = math.erfc(abs(z) / math.sqrt(2))
    assert several == pytest.approx([normal] * 3, abs=0.02)


def test_without_a_difference_p_is_uniform_and_intervals_hold_zero() -> None:
    rng, found = np.random.default_rng(2), []
    for seed in range(150):
        drawn = plan(SwitchbackConfig(num_blocks=16, seed=seed))
        means = 0.1 * np.arange(16) + rng.normal(size=16)
        found.append(randomisation_p(pair_differences(drawn, means), rng))
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.1
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_an_effect_is_found_and_held_by_the_interval_in_spite_of_carry_over() -> None:
    found = plan(SwitchbackConfig(num_blocks=24, seed=1))
    at_s, reward = rewards(found, 0.4, np.random.default_rng(3), carried_s=500.0)
    result = analyse(found, at_s, reward, GRID_S)
    assert result.p_value < 0.01
    assert result.interval[0] < 0.4 < result.interval[1]
    assert 0 < result.interval[0] < result.difference < result.interval[1] < 0.8
    assert result.num_intervals + result.num_discarded == len(at_s)
    assert result.mean_b - result.mean_a == pytest.approx(result.difference)
    assert "B is better" in sign_of(result)
    nothing = analyse(found, *rewards(found, 0.0, np.random.default_rng(4)), GRID_S)
    assert "no difference is shown" in sign_of(nothing)


def test_the_interval_is_what_the_test_accepts() -> None:
    found = plan(SwitchbackConfig(num_blocks=16, seed=1))
    at_s, reward = rewards(found, 0.3, np.random.default_rng(5))
    result = analyse(found, at_s, reward, GRID_S)
    differences = pair_differences(found, block_means(found, at_s, reward, GRID_S)[0])
    rng = np.random.default_rng(0)
    for edge, inward in zip(result.interval, (1e-6, -1e-6), strict=True):
        assert randomisation_p(differences, rng, edge + inward) > 0.05
        assert randomisation_p(differences, rng, edge - 1e-3 * np.sign(inward)) <= 0.05


def test_too_few_blocks_for_a_bound_give_none() -> None:
    found = plan(SwitchbackConfig(num_blocks=6))
    at_s, reward = rewards(found, 5.0, np.random.default_rng(6))
    assert analyse(found, at_s, reward, GRID_S).interval == (-math.inf, math.inf)


def test_planning_for_a_difference() -> None:
    blocks = blocks_needed(0.5, spread=1.0)
    at_least = plan(SwitchbackConfig(num_blocks=blocks))
    fewer = plan(SwitchbackConfig(num_blocks=blocks - 2))
    assert detectable(at_least, 1.0) <= 0.5 < detectable(fewer, 1.0)
    assert blocks == 2 * math.ceil(2 * (1.959964 + 0.841621) ** 2 / 0.25)


def test_plans_as_files_and_bad_ones() -> None:
    found = plan(SwitchbackConfig(seed=9))
    assert loads(dumps(found)) == found
    told = json.loads(dumps(found))
    told["blocks"][0]["arm"], told["blocks"][1]["arm"] = (
        told["blocks"][1]["arm"],
        told["blocks"][0]["arm"],
    )
    with pytest.raises(InvalidRequestError, match="changed after it was made"):
        loads(json.dumps(told))
    for text in ("{", "[]", "{}"):
        with pytest.raises(InvalidRequestError, match="no switchback plan"):
            loads(text)
    for wrong in ({"num_blocks": 7}, {"burn_in_s": 1200.0}, {"longest_s": 10.0}):
        with pytest.raises(InvalidRequestError, match="a switchback needs"):
            SwitchbackConfig(**wrong)
