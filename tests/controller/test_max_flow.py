from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from controller.assignment import solve_batch
from controller.max_flow import flow_assignment, rank_one

INF = float("inf")
NEAR = 1e-6  # relative: what whole units of capacity round away


def test_one_kind_of_replica_by_hand() -> None:
    """Two replicas of 4/s and 2/s at rates 1 and 1: each second of rates takes 1/4 + 1/2 s."""
    found = flow_assignment(np.array([[1 / 4, 1 / 2]]), np.array([2.0]))
    assert found.flow == pytest.approx(2 / 0.75, rel=NEAR)
    assert found.theta == pytest.approx(2 / 0.75, rel=NEAR)
    assert found.shares.tolist() == [[1.0, 1.0]]


def test_rates_of_the_form_a_times_b_flow_as_with_an_lcm() -> None:
    """n = (2, 3) and (4, 6): M = lcm = 6 and 12, a request costs 3 or 2 units at either. The
    construction as published, at rates 2 and 4 in whole units, carries all 14 of 18; twice the
    rates, 28, it does not."""
    rates, service = np.array([2, 4]), np.array([[2, 3], [4, 6]])
    capacity = np.array([math.lcm(*row) for row in service.tolist()])
    units = capacity[:, None] // service
    assert units.tolist() == [[3, 2], [3, 2]]
    graph = np.zeros((8, 8), np.int32)
    for demand, carried in ((rates, 14), (2 * rates, 18)):
        graph[0, 1:3] = demand * units[0]
        graph[1:3, 3:5] = (service * units).T
        graph[3:5, 5:7] = np.diag(capacity)
        graph[5:7, 7] = capacity
        assert maximum_flow(csr_array(graph), 0, 7).flow_value == carried
    found = flow_assignment(rates / service, np.ones(2))
    assert found.flow == pytest.approx(18 / 14, rel=NEAR)
    assert found.theta == pytest.approx(18 / 14, rel=NEAR)


def test_a_cut_below_the_capacity_of_all_replicas_is_found() -> None:
    """Type 0 can go to the first replica alone, which takes 2 of it; the rest idles."""
    found = flow_assignment(np.array([[1 / 2, 1 / 20], [INF, 1 / 20]]), np.ones(2))
    assert found.flow == pytest.approx(2.0, rel=NEAR)
    assert found.theta == pytest.approx(2.0, rel=0.2)  # some of type 1 may come to the first
    assert found.shares[:, 0].tolist() == [1.0, 0.0]


def test_a_type_that_can_go_nowhere_is_not_served() -> None:
    found = flow_assignment(np.array([[1.0, INF]]), np.ones(1))
    assert (found.flow, found.theta) == (0.0, 0.0)


def test_comparative_advantage_is_lost() -> None:
    """Each replica takes 4/s of one type and 1/s of the other, at rates 1 and 1: kept apart they
    serve 4 times the rates. The nearest a_k b_j are alike, so that the flow sees half of it."""
    loads = np.array([[1.0, 1 / 4], [1 / 4, 1.0]])
    exact, _ = solve_batch(loads[None], np.ones((1, 2)))
    found = flow_assignment(loads, np.ones(2))
    assert exact[0] == pytest.approx(4.0)
    assert found.flow == pytest.approx(2.0, rel=NEAR)
    assert found.theta < 4.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_flow_is_exact_for_rank_one_rates(kinds: int, types: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    speed, work = rng.uniform(1, 9, kinds), rng.uniform(0.01, 1, types)
    loads, capacity = work / speed[:, None], rng.integers(1, 5, kinds) * 0.9
    found = flow_assignment(loads, capacity)
    exact, _ = solve_batch(loads[None], capacity[None])
    assert found.flow == pytest.approx(exact[0], rel=NEAR)
    assert found.theta == pytest.approx(exact[0], rel=NEAR)
    assert found.busy == pytest.approx(np.ones(kinds), rel=NEAR)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 2), st.integers(0, 2**31))
def test_flow_never_carries_more_than_the_programme(
    kinds: int, types: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    loads = np.exp(spread * rng.standard_normal((kinds, types)))
    loads[rng.random(loads.shape) < 0.15] = INF
    capacity = rng.integers(1, 5, kinds) * 0.9
    found = flow_assignment(loads, capacity)
    exact, _ = solve_batch(loads[None], capacity[None])
    assert found.theta <= exact[0] * (1 + 1e-9)
    assert (found.theta > 0) == (exact[0] > 0)
    if found.theta:
        assert found.shares.sum(axis=0) == pytest.approx(np.ones(types))
        used = (np.where(np.isfinite(loads), loads, 0.0) * found.shares).sum(axis=1) / capacity
        assert 1 / used.max() == pytest.approx(found.theta)


def test_nearest_rank_one_rates_with_gaps() -> None:
    speed, work = np.array([1.0, 2.0, 5.0]), np.array([0.5, 3.0])
    loads = work / speed[:, None]
    for gap in ((0, 0), (2, 1)):
        holed = loads.copy()
        holed[gap] = INF
        a, b = rank_one(holed)
        assert b / a[:, None] == pytest.approx(loads)
