"""Exact assignment of requests to fixed replicas: the most traffic of a given mix they can take.

    max theta   s.t.  sum_c x_cj = theta * lambda_j          for each type j
                      sum_j x_cj / n_cj <= capacity_c        for each configuration c,  x >= 0

with n_cj the rate of type j that one replica of c sustains alone and capacity_c the count of its
replicas times the utilisation allowed. Identical replicas are exchangeable, so there is one row
per distinct configuration. OServe (arXiv 2602.12151, section 4) solves this by max-flow, which is
exact only if n_cj / n_cj' is the same for every c; the linear programme is exact always.

This is the plain path: planning itself solves them compiled (`controller.headroom_kernel`), and
tests hold both equal. Many small programmes are solved at once by a primal simplex on stacked
tableaux. In units f_cj = x_cj / lambda_j and a_cj = lambda_j / n_cj
the rows are theta - sum_c f_cj <= eps_j and sum_j a_cj f_cj <= capacity_c; all slacks basic is a
feasible start, and small distinct eps_j keep ties (and cycling) away. With one or two
configurations the optimum is known in closed form and no pivot is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

Floats = NDArray[np.float64]
PERTURBATION = 1e-10
TOLERANCE = 1e-11
MAX_PIVOTS = 200


@dataclass(frozen=True, slots=True)
class Assignment:
    """theta, the served multiple of the rates, and x[C, J], requests per second at theta."""

    theta: float
    x: Floats


def _tableau(loads: Floats, capacity: Floats) -> Floats:
    """[B, J + C + 1, 1 + CJ + J + C + 1]: demand rows, capacity rows, objective row last."""
    batch, configs, types = loads.shape
    rows = types + configs
    table = np.zeros((batch, rows + 1, 1 + configs * types + rows + 1))
    table[:, :types, 0] = 1.0
    flows = table[:, :, 1 : 1 + configs * types].reshape(batch, rows + 1, configs, types)
    for j in range(types):
        flows[:, j, :, j] = -1.0
    for c in range(configs):
        flows[:, types + c, c, :] = loads[:, c]
    table[:, :, 1 : 1 + configs * types] = flows.reshape(batch, rows + 1, configs * types)
    table[:, np.arange(rows), 1 + configs * types + np.arange(rows)] = 1.0
    table[:, :types, -1] = PERTURBATION * (1.0 + np.arange(types) / types)
    table[:, types:rows, -1] = capacity
    table[:, -1, 0] = -1.0
    return table


def _pivot(table: Floats, basis: NDArray[np.int64]) -> bool:
    """One simplex step of every programme in the stack; False when all are optimal."""
    batch = np.arange(len(table))
    entering = table[:, -1, :-1].argmin(axis=1)
    active = table[batch, -1, entering] < -TOLERANCE
    if not active.any():
        return False
    column = np.take_along_axis(table, entering[:, None, None], axis=2)[:, :, 0]
    positive = column[:, :-1] > TOLERANCE
    ratio = np.where(positive, table[:, :-1, -1] / np.where(positive, column[:, :-1], 1.0), np.inf)
    leaving = ratio.argmin(axis=1)
    active &= np.isfinite(ratio[batch, leaving])
    row = table[batch, leaving] / np.where(active, column[batch, leaving], 1.0)[:, None]
    column[batch, leaving] -= 1.0
    table -= np.where(active, 1.0, 0.0)[:, None, None] * column[:, :, None] * row[:, None, :]
    table[batch[active], leaving[active]] = row[active]
    basis[batch[active], leaving[active]] = entering[active]
    return bool(active.any())


def solve_batch(loads: Floats, capacity: Floats) -> tuple[Floats, Floats]:
    """Solve B programmes, the ones with at most two configurations in closed form.

    Arguments and results as of `simplex_batch`, to which it is equal.
    """
    batch, configs, types = loads.shape
    theta, shares = np.zeros(batch), np.zeros((batch, configs, types))
    used = capacity > 0.0
    finite = np.isfinite(loads).all(axis=(1, 2))
    few = finite & used[:, 0] & (used.sum(axis=1) == used[:, :2].sum(axis=1))
    if few.any():
        pair = min(configs, 2)
        theta[few], shares[few, :pair] = _solve_pairs(loads[few, :pair], capacity[few, :pair])
    if not few.all():
        theta[~few], shares[~few] = simplex_batch(loads[~few], capacity[~few])
    return theta, shares


def _solve_pairs(loads: Floats, capacity: Floats) -> tuple[Floats, Floats]:
    """Exact optimum for one or two configurations (the second may have no capacity).

    Types go to the first configuration in order of comparative advantage a_1j / a_2j until both
    are equally busy; one type is split. An exchange of any two flows out of that order frees
    capacity, so the order is optimal.
    """
    if loads.shape[1] == 1:
        return capacity[:, 0] / loads[:, 0].sum(axis=1), np.ones_like(loads)
    order = np.argsort(loads[:, 0] / loads[:, 1], axis=1)
    first = np.take_along_axis(loads[:, 0], order, axis=1) / capacity[:, :1]
    single = capacity[:, 1] <= 0.0
    second = np.take_along_axis(loads[:, 1], order, axis=1)
    second = second / np.where(single, 1.0, capacity[:, 1])[:, None]
    ahead = np.cumsum(first, axis=1) - first  # busyness of the first by the types before
    behind = np.cumsum(second[:, ::-1], axis=1)[:, ::-1]  # of the second by this and later ones
    split = np.clip((behind - ahead) / (first + second), 0.0, 1.0)
    split[single] = 1.0
    peak = np.maximum((split * first).sum(axis=1), ((1.0 - split) * second).sum(axis=1))
    shares = np.empty_like(loads)
    np.put_along_axis(shares[:, 0], order, split, axis=1)
    shares[:, 1] = 1.0 - shares[:, 0]
    return 1.0 / peak, shares


def simplex_batch(loads: Floats, capacity: Floats) -> tuple[Floats, Floats]:
    """Solve B programmes: loads[B, C, J] = lambda_j / n_cj (inf where c cannot serve j), and
    capacity[B, C] in replicas (0 where a row is unused).

    Returns theta[B] and the share f[B, C, J] of each type that goes to each configuration
    (columns sum to 1). theta is 0 where some type can be served by nobody.
    """
    batch = len(loads)
    able = np.isfinite(loads) & (capacity > 0.0)[:, :, None]
    possible = np.all(np.any(able, axis=1), axis=1)
    scale = np.where(able, loads, 0.0).sum(axis=(1, 2)) / np.maximum(able.sum(axis=(1, 2)), 1)
    scale = np.where(scale > 0.0, scale, 1.0)
    scaled = np.where(able, loads / scale[:, None, None], 1.0)
    table = _tableau(np.maximum(scaled, 1e-9), capacity)
    columns = np.concatenate([np.ones((batch, 1), bool), able.reshape(batch, -1)], axis=1)
    flows = table[:, :, : columns.shape[1]]
    flows *= columns[:, None, :]  # a forbidden column is all zero and never enters
    basis = np.tile(np.arange(columns.shape[1], table.shape[2] - 1), (batch, 1))
    for _ in range(MAX_PIVOTS):
        if not _pivot(table, basis):
            break
    shares = _shares(table, basis, able)
    used = np.where(able, scaled * shares, 0.0).sum(axis=2)
    peak = np.where(capacity > 0.0, used / np.where(capacity > 0.0, capacity, 1.0), 0.0)
    theta = np.where(possible, 1.0 / np.maximum(peak.max(axis=1), 1e-12) / scale, 0.0)
    return theta, shares


def _shares(table: Floats, basis: NDArray[np.int64], able: NDArray[np.bool_]) -> Floats:
    """Values of the flow variables, each type's scaled to sum to one."""
    batch, configs, types = able.shape
    values = np.zeros((batch, table.shape[2] - 1))
    np.put_along_axis(values, basis, table[:, :-1, -1], axis=1)
    flows = np.maximum(values[:, 1 : 1 + configs * types], 0.0).reshape(batch, configs, types)
    flows = np.where(flows > 1e-9, flows, 0.0)
    total = flows.sum(axis=1, keepdims=True)
    even = able / np.maximum(able.sum(axis=1, keepdims=True), 1)
    return np.asarray(np.where(total > 0.0, flows / np.where(total > 0.0, total, 1.0), even))


def assign_rates(rates: ArrayLike, service_rates: ArrayLike, capacity: ArrayLike) -> Assignment:
    """Solve one programme: rates[J] > 0 and service_rates[C, J] in requests per second (0 where a
    configuration cannot serve a type), capacity[C] in replicas times allowed utilisation."""
    lam, n = np.asarray(rates, np.float64), np.asarray(service_rates, np.float64)
    loads = np.where(n > 0.0, lam / np.where(n > 0.0, n, 1.0), np.inf)
    theta, shares = solve_batch(loads[None], np.asarray(capacity, np.float64)[None])
    return Assignment(float(theta[0]), theta[0] * lam * shares[0])


def admit(rates: Floats, service_rates: Floats, capacity: Floats, values: Floats) -> Floats:
    """[J] shares to admit of rates[J], such that the sum of share_j * values[j] is the most that
    the replicas can serve: the linear programme with share_j <= 1 in place of theta. Arguments as
    of `assign_rates`, values[J] > 0. Solver: HiGHS."""
    configs, types = service_rates.shape
    able = service_rates > 0.0
    loads = np.where(able, rates / np.where(able, service_rates, 1.0), 0.0)
    busy = np.zeros((configs, configs * types))
    for c in range(configs):
        busy[c, c * types : (c + 1) * types] = loads[c]
    found = linprog(
        -np.tile(values / values.sum(), configs),
        A_ub=np.vstack([busy, np.tile(np.eye(types), configs)]),
        b_ub=np.concatenate([capacity, np.ones(types)]),
        bounds=[(0.0, float(a)) for a in able.ravel()],
    )
    assert found.x is not None, found.message  # nothing admitted is feasible
    return np.asarray(np.clip(found.x.reshape(configs, types).sum(axis=0), 0.0, 1.0))
