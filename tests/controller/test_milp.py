from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from controller.assignment import admit, assign_rates
from controller.deployments import Counts, configs_of, list_counts, size_of
from controller.library import Space, list_deployments
from controller.milp import (
    LATENCY_LEVELS,
    Pool,
    change_costs,
    fewest_devices,
    least_latency,
    most_headroom,
    most_served,
    solve_milp,
)
from controller.planner import Planner
from controller.solvers import solve_exhaustive
from engine.cluster import (
    ParallelConfig,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.plan import switch_cost
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
SIZES, DEVICES, RHO = (4, 3, 2, 1), 8, 0.9


def _random_service(rng: np.random.Generator, types: int) -> np.ndarray:
    """Larger replicas sustain more, unevenly by type."""
    return np.array(SIZES)[:, None] * np.exp(rng.normal(0.0, 0.4, (len(SIZES), types)))


def _thetas(counts: Counts, mixes: np.ndarray, service: np.ndarray) -> np.ndarray:
    used = np.array(counts) > 0
    capacity = RHO * np.array(counts)[used]
    return np.array([assign_rates(mix, service[used], capacity).theta for mix in mixes])


def _tail_mean(values: np.ndarray, tail: float) -> float:
    """Mean of the lowest `tail` of the values' distribution."""
    weight = np.full(len(values), 1.0 / len(values))
    left, total, share = max(tail, 1.0 / len(values)), 0.0, 0.0
    for value, w in zip(np.sort(values), weight, strict=True):
        part = min(w, left - share)
        total, share = total + part * value, share + part
    return total / share


def _all(maximal: bool = True) -> Iterator[Counts]:
    yield from map(tuple, list_counts(SIZES, DEVICES, maximal).tolist())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4, 0.7, 1.0]))
def test_scenarios_equal_enumeration(seed: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    service, mixes = _random_service(rng, 3), rng.dirichlet(np.full(3, 0.5), 4) + 0.02
    mixes *= rng.uniform(0.5, 2.0, (4, 1))
    found = most_headroom(mixes[:, None] / service, Pool(SIZES, DEVICES, RHO), tail)
    assert found is not None
    best = max(_tail_mean(_thetas(c, mixes, service), tail) for c in _all())
    assert _tail_mean(_thetas(found, mixes, service), tail) == pytest.approx(best, rel=1e-6)


def test_the_robust_optimum_has_the_best_worst_case_and_the_mean_optimum_the_best_mean() -> None:
    rng = np.random.default_rng(3)
    service, mixes = _random_service(rng, 4), rng.dirichlet(np.full(4, 0.3), 6) + 0.01
    loads, pool = mixes[:, None] / service, Pool(SIZES, DEVICES, RHO)
    plans = [most_headroom(loads, pool, tail) for tail in (0.0, 0.5, 1.0)]
    thetas = [_thetas(p, mixes, service) for p in plans if p is not None]
    assert plans[0] != plans[2]
    assert thetas[0].min() >= thetas[1].min() - 1e-9
    assert thetas[1].min() >= thetas[2].min() - 1e-9
    assert thetas[2].mean() >= thetas[1].mean() - 1e-9 >= thetas[0].mean() - 2e-9


@pytest.mark.parametrize("seed", range(4))
def test_minimum_capacity_equals_enumeration(seed: int) -> None:
    """The most headroom of one mix while another keeps a floor."""
    rng = np.random.default_rng(seed)
    service, mixes = _random_service(rng, 3), rng.dirichlet(np.full(3, 0.4), 2) + 0.02
    every = {c: _thetas(c, mixes, service) for c in _all()}
    floor = float(np.quantile([t[1] for t in every.values()], 0.8))
    loads, pool = mixes[:, None] / service, Pool(SIZES, DEVICES, RHO)
    doubled = np.concatenate([loads[:1] * 1e-3, loads[1:]])  # the second mix never decides alone
    found = most_headroom(doubled, pool, 1.0, floors=(0.0, floor * (1 - 1e-6)))
    assert found is not None
    worth = {c: 1e3 * t[0] + t[1] for c, t in every.items() if t[1] >= floor * (1 - 1e-6)}
    assert worth[found] == pytest.approx(max(worth.values()), rel=1e-6)
    assert most_headroom(loads, pool, floors=(0.0, 1e3)) is None


@pytest.mark.parametrize("seed", range(6))
def test_fewest_devices_equals_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    service, mix = _random_service(rng, 3), rng.dirichlet(np.ones(3))
    mix *= rng.uniform(1.0, 8.0) / (mix / service[-1]).sum()
    every = {c: float(_thetas(c, mix[None], service)[0]) for c in _all(maximal=False)}
    enough = [c for c, theta in every.items() if theta >= 1.0]
    found = fewest_devices((mix / service)[None], Pool(SIZES, DEVICES, RHO))
    if not enough:
        assert found is None
        return
    least = min(size_of(c, SIZES) for c in enough)
    assert found is not None
    assert size_of(found, SIZES) == least
    best = max(every[c] for c in enough if size_of(c, SIZES) == least)
    assert every[found] == pytest.approx(best, rel=1e-6)


def _served_by_linprog(
    rates: np.ndarray, service: np.ndarray, capacity: np.ndarray, values: np.ndarray
) -> float:
    """In requests per second x[C, J], where `admit` has shares."""
    configs, types = service.shape
    busy = np.zeros((configs, configs * types))
    for c in range(configs):
        busy[c, c * types : (c + 1) * types] = 1.0 / service[c]
    limit = np.tile(np.eye(types), configs)
    found = linprog(
        -np.tile(values / rates, configs),
        A_ub=np.vstack([busy, limit]),
        b_ub=np.concatenate([capacity, rates]),
    )
    return float(-found.fun)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_admission_equals_linprog(seed: int) -> None:
    rng = np.random.default_rng(seed)
    service, rates = _random_service(rng, 4), rng.uniform(1.0, 6.0, 4)
    capacity, values = RHO * rng.integers(0, 3, 4), rng.uniform(0.5, 2.0, 4) * rates
    shares = admit(rates, service, capacity, values)
    most = _served_by_linprog(rates, service, capacity, values)
    assert shares @ values == pytest.approx(most, rel=1e-7, abs=1e-9)
    assert ((shares >= 0.0) & (shares <= 1.0)).all()
    used = capacity > 0
    if used.any() and (shares > 0.0).all():
        admitted = assign_rates(shares * rates, service[used], capacity[used])
        assert admitted.theta >= 1.0 - 1e-7


def test_admission_of_one_configuration_takes_the_worthiest_work_first() -> None:
    """Two replica-seconds: the first type is worth 3 for each, the second 2, the third 1."""
    service, rates = np.array([[1.0, 2.0, 4.0]]), np.array([1.0, 2.0, 4.0])
    shares = admit(rates, service, np.array([1.5]), np.array([3.0, 2.0, 1.0]))
    assert shares == pytest.approx([1.0, 0.5, 0.0])
    assert admit(rates, service, np.array([3.0]), rates) == pytest.approx(np.ones(3))


@pytest.mark.parametrize("seed", range(4))
def test_most_served_equals_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    service, rates = _random_service(rng, 3), rng.uniform(3.0, 9.0, 3)
    values = rng.uniform(0.5, 3.0, 3) * rates
    found = most_served(rates / service, values, Pool(SIZES, DEVICES, RHO))

    def worth(counts: Counts) -> float:
        return float(admit(rates, service, RHO * np.array(counts), values) @ values)

    assert worth(found) == pytest.approx(max(map(worth, _all())), rel=1e-6)


# -- types that some configurations cannot serve ------------------------------------------


def _with_gaps(rng: np.random.Generator, types: int) -> np.ndarray:
    """Service rates, about a third of them 0; every type can be served somewhere."""
    service = _random_service(rng, types)
    able = rng.random(service.shape) > 0.35
    able[rng.integers(0, len(SIZES), types), np.arange(types)] = True
    return np.where(able, service, 0.0)


def _loads(mixes: np.ndarray, service: np.ndarray) -> np.ndarray:
    """[S, C, J] inf where the service rate is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(mixes[:, None] / service)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.6, 1.0]))
def test_headroom_with_gaps_equals_enumeration(seed: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    service, mixes = _with_gaps(rng, 3), rng.dirichlet(np.full(3, 0.5), 3) + 0.02
    loads = _loads(mixes, service)
    found = most_headroom(loads, Pool(SIZES, DEVICES, RHO), tail)
    assert found is not None
    best = max(_tail_mean(_thetas(c, mixes, service), tail) for c in _all())
    assert best > 0.0
    assert _tail_mean(_thetas(found, mixes, service), tail) == pytest.approx(best, rel=1e-6)
    one = solve_milp(loads[0], SIZES, DEVICES, RHO)
    every = solve_exhaustive(loads[0], SIZES, DEVICES, RHO)
    values = [_thetas(c, mixes[:1], service)[0] for c in (one, every)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_devices_and_admission_with_gaps_equal_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    service, mix = _with_gaps(rng, 3), rng.uniform(0.2, 1.2, 3)
    loads, pool = _loads(mix[None], service), Pool(SIZES, DEVICES, RHO)
    thetas = {c: _thetas(c, mix[None], service)[0] for c in _all(maximal=False)}
    enough = [size_of(c, SIZES) for c, theta in thetas.items() if theta >= 1.0]
    fewest = fewest_devices(loads, pool)
    assert (fewest is None) == (not enough)
    if fewest is not None:
        assert size_of(fewest, SIZES) == min(enough)
        assert thetas[fewest] >= 1.0 - 1e-9
    rates, values = 8.0 * mix, rng.uniform(0.5, 3.0, 3)
    found = most_served(8.0 * loads[0], values, pool)
    worth = [admit(rates, service, RHO * np.array(c), values) @ values for c in (found, *_all())]
    assert worth[0] == pytest.approx(max(worth), rel=1e-6)


def test_a_type_that_nobody_can_serve_leaves_no_headroom() -> None:
    service = _random_service(np.random.default_rng(5), 3)
    service[:, 1] = 0.0
    mix, pool = np.ones((1, 3)), Pool(SIZES, DEVICES, RHO)
    loads = _loads(mix, service)
    found = most_headroom(loads, pool)
    assert found is not None
    assert size_of(found, SIZES) == DEVICES
    assert _thetas(found, mix, service)[0] == 0.0
    assert size_of(solve_exhaustive(loads[0], SIZES, DEVICES, RHO), SIZES) == DEVICES
    assert most_headroom(loads, pool, floors=(1e-3,)) is None
    assert fewest_devices(loads, pool) is None
    assert least_latency(loads[0], np.ones((len(LATENCY_LEVELS), *service.shape)), pool) is None
    assert size_of(most_served(loads[0], np.ones(3), pool), SIZES) == DEVICES
    two = np.concatenate([loads, _loads(mix, np.where(service > 0.0, service, 1.0))])
    mean = most_headroom(two, pool, tail=1.0)  # the other mix still decides
    assert mean is not None
    exact = most_headroom(two[1:], pool)
    assert exact is not None
    filled = np.where(service > 0.0, service, 1.0)
    values = [_thetas(c, mix, filled)[0] for c in (mean, exact)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def _least_latency_of(counts: Counts, loads: np.ndarray, cost_s: np.ndarray) -> float:
    """The programme of `least_latency` for counts that are given; inf where it has no solution."""
    levels, configs, types = cost_s.shape
    able, flows = np.isfinite(loads), cost_s.size
    width = flows + levels * configs
    where = np.arange(flows).reshape(cost_s.shape)
    busy = flows + np.arange(levels * configs).reshape(levels, configs)
    each, most, limits = np.zeros((types, width)), [], []
    for j in range(types):
        each[j, where[:, :, j].ravel()] = 1.0
    for c, count in enumerate(counts):
        total = np.zeros(width)
        total[busy[:, c]] = 1.0
        most.append(total)
        limits.append(float(count))
        for level, share in enumerate(LATENCY_LEVELS):
            row = np.zeros(width)
            row[where[level, c]] = np.where(able[c], loads[c], 0.0)
            row[busy[level, c]] = -RHO * share
            most.append(row)
            limits.append(0.0)
    upper = np.append(np.where(able, np.inf, 0.0)[None].repeat(levels, 0).ravel(), np.inf)
    found = linprog(
        np.append(cost_s.ravel(), np.zeros(width - flows)),
        A_ub=np.array(most),
        b_ub=limits,
        A_eq=each,
        b_eq=np.ones(types),
        bounds=[(0.0, upper[min(i, flows)]) for i in range(width)],
    )
    return float(found.fun) if found.status == 0 else np.inf


@pytest.mark.parametrize("seed", range(4))
def test_least_latency_with_gaps_equals_enumeration(seed: int) -> None:
    rng, devices = np.random.default_rng(seed), 5
    service, mix = _with_gaps(rng, 2), rng.uniform(0.2, 0.6, 2)
    loads = _loads(mix[None], service)[0]
    cost_s = np.cumsum(rng.uniform(0.1, 1.0, (len(LATENCY_LEVELS), *service.shape)), axis=0)
    found = least_latency(loads, cost_s, Pool(SIZES, devices, RHO))
    every = [tuple(c) for c in list_counts(SIZES, devices).tolist()]
    values = [_least_latency_of(c, loads, cost_s) for c in every]
    assert min(values) < np.inf
    assert found is not None
    assert _least_latency_of(found, loads, cost_s) == pytest.approx(min(values), rel=1e-6)


# -- nodes --------------------------------------------------------------------------------

NODE_CONFIGS = (
    ParallelConfig(4, 1),
    ParallelConfig(3, 2),
    ParallelConfig(3, 1),
    ParallelConfig(2, 1),
    ParallelConfig(1, 2),
)


@pytest.mark.parametrize("nodes", [(4, 4), (4, 3), (5, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_packing_equals_exhaustive_search(nodes: tuple[int, ...], seed: int) -> None:
    """`list_deployments` is compared with all assignments of groups to nodes in test_packing."""
    rng, devices = np.random.default_rng(seed), sum(nodes)
    sizes = np.array([c.num_devices for c in NODE_CONFIGS])
    service = sizes[:, None] * np.exp(rng.normal(0.0, 0.4, (len(sizes), 3)))
    mix = rng.dirichlet(np.ones(3)) + 0.05
    pool = Pool(sizes.tolist(), devices, RHO, NODE_CONFIGS, nodes)
    found = most_headroom((mix / service)[None], pool)
    listed = list_deployments(NODE_CONFIGS, Space(nodes, devices)).tolist()
    every = {tuple(c): float(_thetas(tuple(c), mix[None], service)[0]) for c in listed}
    assert found in every
    assert every[found] == pytest.approx(max(every.values()), rel=1e-6)


# -- switching ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["8xtp1pp1", "2xtp2pp2", "2xtp4pp1", "1xtp4pp1+2xtp2pp1"])
def test_within_a_byte_budget_equals_enumeration_by_exact_costs(
    make_cluster: MakeCluster, four_types: WorkloadTyping, key: str
) -> None:
    cluster = make_cluster(8, 4)
    planner = Planner(cluster, four_types)
    configs, service = planner.configs, planner.service_rates()
    sizes, current = [c.num_devices for c in configs], dense_deployment(parse_deployment_key(key))
    mix = np.array([0.1, 0.2, 0.3, 0.4])
    every = {}
    for counts in map(tuple, list_counts(sizes, 8, maximal=False).tolist()):
        nbytes = switch_cost(cluster.spec, current, configs_of(counts, configs)).weight_bytes
        every[counts] = nbytes, float(_thetas(counts, mix[None], service)[0])
    largest = max(nbytes for nbytes, _ in every.values())
    values = []
    for budget in (0.0, 0.1 * largest, 0.3 * largest, largest):
        changes = change_costs(cluster.spec, current, configs, budget)
        pool = Pool(sizes, 8, RHO, changes=changes)
        found = most_headroom((mix / service)[None], pool)
        assert found is not None
        assert every[found][0] <= budget * (1.0 + 1e-6)
        best = max(theta for nbytes, theta in every.values() if nbytes <= budget)
        assert every[found][1] == pytest.approx(best, rel=1e-6)
        values.append(best)
    assert values == sorted(values)


# -- latency ------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.05, 0.4, 0.8])
def test_least_latency_is_close_to_the_exact_least(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float
) -> None:
    planner = Planner(make_cluster(8, 4), four_types)
    scorer, sizes = planner.scorer, [c.num_devices for c in planner.configs]
    mix = np.array([0.4, 0.3, 0.2, 0.1])
    rates = load * planner.estimate(planner.optimum(mix), mix).headroom * mix
    key, lengths_key = scorer.rates_key(rates), scorer.lengths_key(None)
    levels = scorer.latency_levels(lengths_key)
    assert levels.shape[0] == len(LATENCY_LEVELS)
    assert (np.diff(levels, axis=0) >= 0.0).all()
    rates = scorer.rates(key)
    loads = rates / planner.service_rates()
    found = least_latency(loads, rates * levels, Pool(sizes, 8, RHO))
    assert found is not None
    listed = np.array([found, *list_counts(sizes, 8).tolist()], np.float64)
    (scores,) = scorer.score(listed, [key], lengths_key)
    least_s = scores.latency_s[scores.headroom >= 1.0].min()
    assert scores.latency_s[0] <= 1.1 * least_s
    assert least_latency(loads * 30.0, rates * levels, Pool(sizes, 8, RHO)) is None
