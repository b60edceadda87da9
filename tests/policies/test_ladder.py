"""Greedy, scaling and work-function rules, on observations small enough to decide by hand."""

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec, Policy
from policies.baselines import GreedyPolicy, ScalingPolicy, WorkFunctionPolicy, switch_cost_s

SPEC = ObservationSpec(
    ("log_latency", "latency_known"),
    ("headroom_q90", "log_latency", "devices_used", "switch_s"),
    4,
    15.0,
)
KEYS = ("4xtp1pp1", "1xtp4pp1", "2xtp2pp1", "2xtp1pp1")


def observation(
    headroom: tuple[float, ...] = (1.2, 0.9, 1.1, 1.05),
    latency_s: tuple[float, ...] = (10.0, 4.0, 6.0, 12.0),
    devices: tuple[float, ...] = (1.0, 1.0, 1.0, 0.5),
    switch_s: tuple[float, ...] = (0.0, 2.0, 2.0, 2.0),
    seen_s: float | None = None,
    legal: tuple[int, ...] = (0, 1, 2, 3),
) -> Observation:
    rows = np.array([headroom, np.log(latency_s), devices, switch_s], np.float32).T
    state = np.array([np.log1p(seen_s or 0.0), seen_s is not None], np.float32)
    return Observation(state, rows, np.isin(np.arange(4), legal), KEYS)


def chosen(policy: Policy, seen: Observation) -> int:
    probabilities = policy.probabilities(seen)
    assert probabilities.sum() == 1.0
    return int(probabilities.argmax())


def test_greedy_takes_the_fastest_that_holds() -> None:
    greedy = GreedyPolicy(SPEC)
    assert chosen(greedy, observation()) == 2  # row 1 is faster and does not hold
    assert chosen(greedy, observation(legal=(0, 1, 3))) == 0
    assert chosen(greedy, observation(headroom=(0.5, 0.9, 0.8, 0.7))) == 1  # none holds
    assert chosen(greedy, observation(headroom=(0.5, 0.9, 0.8, 0.7), legal=(0, 3))) == 3


def test_scaling_takes_the_fewest_devices_that_hold_what_is_expected_and_seen() -> None:
    scaling = ScalingPolicy(SPEC)
    assert chosen(scaling, observation()) == 3  # half of the devices, 1.05
    assert chosen(scaling, observation(seen_s=11.0)) == 0  # 1.1 of what was expected: 1.2 holds
    assert chosen(scaling, observation(seen_s=10.7)) == 0  # of equals that with more headroom
    assert chosen(scaling, observation(seen_s=1e4)) == 0  # none holds twice: the most headroom
    fast = observation(headroom=(1.2, 0.9, 1.1, 0.81), seen_s=1.0)
    assert chosen(scaling, fast) == 3  # the correction ends at 0.8


def test_work_function_against_all_courses() -> None:
    """w(k) by its definition: the least over all courses of deployments that end in k."""
    rng, rule = np.random.default_rng(0), WorkFunctionPolicy(SPEC)
    costs, total = [], 0
    for step in range(5):
        latency_s = tuple(np.exp(rng.normal(1.0, 0.7, 4)).tolist())
        seen = observation(latency_s=latency_s, switch_s=(0.0, 1.0, 1.0, 1.0))
        choice = chosen(rule, seen)
        price = switch_cost_s(np.array([0.0, 1.0, 1.0, 1.0]), latency_s[0])
        costs.append((np.array(latency_s) * 15.0, price))
        expected = _work(costs)
        assert np.isclose(
            [rule._work[k] - min(rule._work.values()) for k in KEYS], expected - expected.min()
        ).all()
        before = _work(costs[:-1]) if step else price
        assert choice == int(np.argmin(before + costs[-1][0] + price))
        total += choice != 0
    assert total  # it moves at times


def _work(costs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Row 0 is where it is; the first interval finds every other as if reached just now."""
    best = np.full(4, np.inf)
    for course in np.ndindex(*(4,) * (len(costs) + 1)):
        total = costs[0][1][course[0]]
        for (cost, price), here, there in zip(costs, course, course[1:], strict=False):
            total += cost[here] + (max(price[here], price[there]) if here != there else 0.0)
        best[course[-1]] = min(best[course[-1]], total)
    return best


def test_a_feature_that_is_missing_is_named() -> None:
    bare = ObservationSpec(("x",), SPEC.candidate_features, 4, 15.0)
    with pytest.raises(InvalidRequestError, match="no state feature 'log_latency', only x"):
        ScalingPolicy(bare)
