from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from controller.assignment import assign_rates, simplex_batch, solve_batch


def _theta_by_linprog(rates: np.ndarray, service: np.ndarray, capacity: np.ndarray) -> float:
    configs, types = service.shape
    demand = np.zeros((types, 1 + configs * types))
    busy = np.zeros((configs, 1 + configs * types))
    demand[:, 0] = -rates
    for c in range(configs):
        for j in range(types):
            demand[j, 1 + c * types + j] = 1.0
            busy[c, 1 + c * types + j] = 1.0 / service[c, j]
    cost = np.r_[-1.0, np.zeros(configs * types)]
    found = linprog(cost, A_ub=busy, b_ub=capacity, A_eq=demand, b_eq=np.zeros(types))
    return float(-found.fun)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_equals_linprog_and_is_feasible(configs: int, types: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    service = np.exp(rng.normal(0, 1.5, (configs, types)))
    rates = np.exp(rng.normal(0, 2.0, types))
    capacity = 0.9 * rng.integers(1, 5, configs)
    found = assign_rates(rates, service, capacity)
    assert found.theta == pytest.approx(_theta_by_linprog(rates, service, capacity), rel=1e-7)
    assert found.x.sum(axis=0) == pytest.approx(found.theta * rates)
    assert (found.x / service).sum(axis=1) == pytest.approx(capacity, rel=1e-6)
    assert (found.x >= 0).all()


def test_two_by_two_by_hand() -> None:
    """Each configuration takes the type it is good at: 10 against 1, both fully busy."""
    found = assign_rates([5.0, 5.0], [[10.0, 1.0], [1.0, 10.0]], [1.0, 1.0])
    assert found.theta == pytest.approx(2.0)
    assert found.x == pytest.approx(np.array([[10.0, 0.0], [0.0, 10.0]]))


def test_closed_form_equals_the_simplex() -> None:
    rng = np.random.default_rng(5)
    loads = np.exp(rng.normal(0, 1, (200, 2, 4)))
    capacity = rng.integers(0, 4, (200, 2)) * 0.9 + np.array([0.9, 0.0])
    fast, plain = solve_batch(loads, capacity), simplex_batch(loads, capacity)
    assert fast[0] == pytest.approx(plain[0], rel=1e-7)
    assert fast[1].sum(axis=1) == pytest.approx(np.ones((200, 4)))


def test_equal_rates_and_ties_do_not_cycle() -> None:
    theta, shares = simplex_batch(np.ones((3, 4, 4)), np.ones((3, 4)))
    assert theta == pytest.approx([1.0] * 3)
    assert shares.sum(axis=1) == pytest.approx(np.ones((3, 4)))


def test_a_type_nobody_can_serve_gives_no_headroom() -> None:
    assert assign_rates([1.0, 1.0], [[2.0, 0.0]], [1.0]).theta == 0.0
    found = assign_rates([1.0, 1.0], [[2.0, 0.0], [2.0, 2.0]], [1.0, 1.0])
    assert found.theta == pytest.approx(2.0)
    assert found.x[0, 1] == 0.0
