from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from controller.assignment import simplex_batch
from controller.deployments import list_counts
from controller.headroom_kernel import (
    LEVELS,
    MANY,
    _least_load_s,
    _scratch,
    _solve,
    _tune_prices,
    best_each,
    least_latency,
    least_latency_or,
    load_floors,
    most_headroom,
    most_headroom_or,
    score,
)
from controller.library import Library, Space, dominated, has_library
from controller.milp import Pool
from controller.milp import most_headroom as by_milp
from controller.planner import Planner
from controller.scoring import MAX_LATENCY_S
from controller.service_model import ServiceModel, mean_latency_s
from engine.cluster import ParallelConfig, WorkloadTyping
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
CONFIGS = tuple(
    ParallelConfig(tp, pp) for tp, pp in ((4, 2), (4, 1), (2, 2), (1, 3), (2, 1), (1, 1))
)
RHO = 0.9


def _random_rates(rng: np.random.Generator, types: int) -> np.ndarray:
    sizes = np.array([c.num_devices for c in CONFIGS])[:, None]
    return sizes ** rng.uniform(0.8, 1.2) * np.exp(rng.normal(0.0, 0.3, (len(CONFIGS), types)))


def _plain(counts: np.ndarray, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return simplex_batch(np.broadcast_to(loads, (len(counts), *loads.shape)).copy(), RHO * counts)


def _tail_mean(thetas: np.ndarray, tail: float) -> np.ndarray:
    """[N] of thetas[N, S]: mean of the lowest max(tail S, 1), the last of them in part."""
    number = max(tail * thetas.shape[1], 1.0)
    weight = np.clip(number - np.arange(thetas.shape[1]), 0.0, 1.0)
    return np.asarray(np.sort(thetas, axis=1) @ weight / number)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(3, 10))
def test_best_of_the_library_equals_the_best_of_the_milp(
    seed: int, types: int, devices: int
) -> None:
    rng = np.random.default_rng(seed)
    rates, mix = _random_rates(rng, types), rng.dirichlet(np.full(types, 0.5)) + 0.01
    library, loads = Library(CONFIGS, Space((devices,), devices)), mix / rates
    contenders = library.contenders(rates)
    index, value, _ = most_headroom(contenders, loads[None], RHO, 0.0)
    sizes = [c.num_devices for c in CONFIGS]
    exact = by_milp(loads[None], Pool(sizes, devices, RHO))
    assert exact is not None
    theta, _ = _plain(np.array([exact, contenders[index]]), loads)
    assert value == pytest.approx(theta[0], rel=1e-6)
    assert value == pytest.approx(theta[1], rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_search_and_dominance_lose_nothing(seed: int, types: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    rates, mixes = _random_rates(rng, types), rng.dirichlet(np.ones(types), 4) + 0.01
    library = Library(CONFIGS, Space((8,), 8))
    thetas = np.array([_plain(library.counts, mix / rates)[0] for mix in mixes]).T
    values = _tail_mean(thetas, tail)
    for listed in (library.counts, library.contenders(rates)):
        found = most_headroom(listed, mixes[:, None] / rates, RHO, tail)
        assert found[1] == pytest.approx(values.max(), rel=1e-8)
    first = int(np.argmax(values >= values.max() * (1.0 - 1e-10)))
    index = most_headroom(library.counts, mixes[:, None] / rates, RHO, tail)[0]
    assert index <= first
    assert values[index] == pytest.approx(values[first], rel=1e-8)


@pytest.mark.parametrize("load", [0.2, 0.9, 1.1])
@pytest.mark.parametrize("tail", [0.0, 0.5])
def test_picks_in_one_call_equal_single_ones(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float, tail: float
) -> None:
    scorer = Planner(make_cluster(8, 4), four_types).scorer
    key, rng = scorer.lengths_key(None), np.random.default_rng(0)
    library = Library(scorer.configs, Space((8,), 8))
    listed, contenders = library.counts, library.contenders(scorer.headroom_rates(key))
    alike, roomy = listed[::3], listed[1::3]
    model = scorer.model(key).arrays
    floors = load_floors(model, RHO, 1)
    for present in listed[:: len(listed) // 8]:
        mixes = rng.dirichlet(np.ones(4), 5) + 0.02
        rates = load * scorer.most_headroom(listed, mixes[:1], key)[1] * mixes
        loads = scorer.loads(rates, key)
        lists, latencies = (listed, contenders, alike, roomy), (model, floors, False, 1e4)
        assert best_each(*lists, present, loads, rates, RHO, tail, *latencies) == (
            most_headroom_or(contenders, present, loads[:1], RHO, 0.0),
            most_headroom_or(contenders, present, loads[1:2], RHO, 0.0),
            most_headroom_or(contenders, present, loads[2:], RHO, tail),
            least_latency_or(listed, present, loads[0], rates[0], RHO, *latencies),
            least_latency_or(listed, present, loads[1], rates[1], RHO, *latencies),
            most_headroom(alike, loads[:1], RHO, 0.0)[0],
            most_headroom(roomy, loads[:1], RHO, 0.0)[0],
        )


@pytest.mark.parametrize("load", [0.2, 0.9, 1.5])
def test_what_each_rule_picks_is_what_it_picks_alone(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float
) -> None:
    """Also where no deployment has headroom 1, so that the fastest are those with the most."""
    planner = Planner(make_cluster(8, 4), four_types)
    scorer, optima, space = planner.scorer, planner.optima, Space((8,), 8)
    lengths_key, rng = scorer.lengths_key(None), np.random.default_rng(0)
    for counts in optima.library(space).counts[::7]:
        search = optima.search(space, lengths_key, tuple(map(int, counts)))
        mixes = rng.dirichlet(np.ones(4), 4) + 0.02
        mixes *= load * scorer.most_headroom(search.listed, mixes[:1], lengths_key)[1]
        keys = [scorer.rates_key(mix) for mix in mixes]
        rates = np.array([scorer.rates(key) for key in keys])
        demand = scorer.demand(rates, lengths_key)
        assert optima.best_each(search, demand, 0.0, search.listed[:3])[:5] == (
            *(optima.most_headroom(search, part) for part in (rates[:1], rates[1:2], rates[2:])),
            *(optima.least_latency(search, key) for key in keys[:2]),
        )


def test_scores_at_several_rates_equal_those_at_each(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    """And of what serves nothing."""
    scorer = Planner(make_cluster(8, 4), four_types).scorer
    counts = Library(scorer.configs, Space((8,), 8)).counts
    counts = np.concatenate([counts, np.zeros((1, counts.shape[1]))])
    key, mixes = scorer.lengths_key(None), np.random.default_rng(0).dirichlet(np.ones(4), 3)
    keys = [scorer.rates_key(100.0 * mix) for mix in mixes]
    for rates_key, found in zip(keys, scorer.score(counts, keys, key), strict=True):
        rates = scorer.rates(rates_key)
        loads = scorer.loads(rates, key)
        theta, latency_s, shares = score(counts, loads, rates, RHO, scorer.model(key).arrays)
        assert found.headroom.tolist() == theta.tolist()
        assert found.latency_s[:-1].tolist() == np.minimum(latency_s[:-1], MAX_LATENCY_S).tolist()
        assert found.latency_s[-1] == MAX_LATENCY_S
        assert found.shares.tolist() == shares.tolist()


def test_dominated_by_hand() -> None:
    """Two of size 2 do more of everything than one of size 4; one of size 3 is good at one type."""
    rates = np.array([[3.9, 3.9], [9.0, 0.1], [2.0, 2.0]])
    assert dominated((4, 3, 2), rates).tolist() == [True, False, False]
    rates[0] = 4.1, 3.0
    assert dominated((4, 3, 2), rates).tolist() == [False, False, False]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_dominated_equals_trying_every_multiset(seed: int, types: int) -> None:
    sizes = [c.num_devices for c in CONFIGS]
    rates = np.round(_random_rates(np.random.default_rng(seed), types), 1)  # so that some are equal
    every = list_counts(sizes, max(sizes), maximal=False)
    expected = []
    for c, size in enumerate(sizes):
        options = every[(every @ sizes <= size) & (every[:, c] == 0)]
        better = (options @ rates >= rates[c]).all(axis=1)
        alone = (options.sum(axis=1) == 1) & (options @ rates == rates[c]).all(axis=1)
        expected.append(bool((better & ~(alone & (options.argmax(axis=1) > c))).any()))
    assert dominated(sizes, rates).tolist() == expected


def test_of_equal_configurations_the_first_stays() -> None:
    assert dominated((2, 2), np.ones((2, 3))).tolist() == [False, True]


def test_where_nodes_bind_a_group_cannot_take_the_place_of_stages() -> None:
    sizes, groups, rates = (2, 2), (1, 2), np.array([[1.0], [2.0]])
    assert dominated(sizes, rates).tolist() == [True, False]
    assert dominated(sizes, rates, groups).tolist() == [False, False]
    assert dominated(sizes, rates[::-1], groups).tolist() == [False, True]


@pytest.mark.parametrize("load", [0.2, 0.9, 1.1])
def test_the_present_deployment_wins_ties_and_no_more(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float
) -> None:
    """Beside the searches that know of no present deployment, and scores."""
    planner = Planner(make_cluster(8, 4), four_types)
    scorer, key, rng = planner.scorer, planner.scorer.lengths_key(None), np.random.default_rng(0)
    counts = Library(planner.configs, Space((8,), 8)).counts
    for mix in rng.dirichlet(np.ones(4), 3) + 0.02:
        index, most = scorer.most_headroom(counts, mix[None], key)
        rates = scorer.rates(scorer.rates_key(load * most * mix))
        index, most = scorer.most_headroom(counts, rates[None], key)
        arrays = scorer.model(key).arrays
        loads = scorer.loads(rates, key)
        fastest, _ = least_latency(counts, loads, rates, RHO, arrays, False)
        for i in {0, len(counts) // 2, index, max(fastest, 0)}:
            found = scorer.most_headroom_or(counts, counts[i], rates[None], key)
            own = scorer.most_headroom(counts[i : i + 1], rates[None], key)[1]
            assert found == (None if own >= most * (1 - 1e-9) else index)
            found = scorer.least_latency_or(counts, counts[i], rates, key)
            theta, latency_s, _ = score(counts[[i, fastest]], loads, rates, RHO, arrays)
            is_as_good = theta[0] >= 1.0 and latency_s[0] <= latency_s[1] * (1 + 1e-9)
            assert found == (None if fastest >= 0 and is_as_good else fastest)


def test_contenders_on_fewer_devices_are_all_deployments_of_what_is_not_dominated() -> None:
    library = Library(CONFIGS, Space((6,), 6))
    rates = _random_rates(np.random.default_rng(0), 3)
    unfit, every = (
        dominated([c.num_devices for c in CONFIGS], rates),
        library.contenders(rates, maximal=False),
    )
    assert not every[:, unfit].any()
    used = every @ np.array([c.num_devices for c in CONFIGS])
    assert used.min() == 1
    assert used.max() == 6
    assert (np.diff(used) >= 0).all()
    assert len(np.unique(every, axis=0)) == len(every)


# -- latency ------------------------------------------------------------------------------


def _service(planner: Planner) -> ServiceModel:
    return planner.scorer.model(planner.scorer.lengths_key(None))


@pytest.mark.parametrize("devices", [4, 8, 16])
@pytest.mark.parametrize("load", [0.05, 0.3, 0.6, 0.9, 0.99, 1.1])
def test_least_latency_equals_scoring_the_whole_library(
    make_cluster: MakeCluster, four_types: WorkloadTyping, devices: int, load: float
) -> None:
    planner = Planner(make_cluster(devices, 4), four_types)
    model, rng = _service(planner), np.random.default_rng(devices)
    library = Library(planner.configs, Space((devices,), devices))
    rows = np.broadcast_to(np.arange(len(planner.configs)), library.counts.shape)
    for _ in range(3):
        mix = rng.dirichlet(np.ones(4)) + 0.02
        theta, _ = _plain(library.counts, mix / model.rates)
        rates = load * theta.max() * mix
        theta, shares = _plain(library.counts, rates / model.rates)
        latency_s = mean_latency_s(model, rows, library.counts, shares * rates)
        index, solved = least_latency(
            library.counts, rates / model.rates, rates, RHO, model.arrays, False
        )
        if load > 1.0:
            assert index == -1
            continue
        allowed = np.where(theta >= 1.0, latency_s, np.inf)
        assert theta[index] >= 1.0
        assert latency_s[index] == pytest.approx(allowed.min(), rel=1e-6)
        assert solved <= len(library.counts)


# -- types that some configurations cannot serve ------------------------------------------


def _with_gaps(rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
    """About a third of the service rates 0, the others less by up to a half."""
    able = rng.random(rates.shape) > 0.35
    able[rng.integers(0, len(rates), rates.shape[1]), np.arange(rates.shape[1])] = True
    return np.where(able, rates * rng.uniform(0.5, 1.0, rates.shape), 0.0)


def _loads(rates: np.ndarray, service: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.asarray(rates / service)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]))
def test_headroom_with_gaps_equals_the_plain_simplex(seed: int, types: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    service = _with_gaps(rng, _random_rates(rng, types))
    mixes = rng.dirichlet(np.ones(types), 3) + 0.01
    library = Library(CONFIGS, Space((8,), 8))
    thetas = np.array([_plain(library.counts, _loads(mix, service))[0] for mix in mixes]).T
    values = _tail_mean(thetas, tail)
    assume(values.max() > 0.0)  # some deployment serves every type
    loads = np.array([_loads(mix, service) for mix in mixes])
    for listed in (library.counts, library.contenders(service)):
        found = most_headroom(listed, loads, RHO, tail)
        assert found[1] == pytest.approx(values.max(), rel=1e-8)
    exact = by_milp(loads, Pool([c.num_devices for c in CONFIGS], 8, RHO), tail)
    which = np.flatnonzero((library.counts == np.array(exact)).all(axis=1))
    assert values[which[0]] == pytest.approx(values.max(), rel=1e-6)


def test_headroom_is_0_where_nobody_serves_a_type_and_the_first_is_taken() -> None:
    rates = _random_rates(np.random.default_rng(1), 3)
    rates[:, 1] = 0.0
    library = Library(CONFIGS, Space((8,), 8))
    found = most_headroom(library.counts, _loads(np.ones(3), rates)[None], RHO, 0.0)
    assert found[:2] == (0, 0.0)
    assert found[2] < len(library.counts) / 10


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9, 0.99, 1.1])
def test_scores_and_least_latency_at_other_rates_equal_the_plain_path(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float
) -> None:
    planner = Planner(make_cluster(8, 4), four_types)
    model, rng = _service(planner), np.random.default_rng(int(100 * load))
    counts = Library(planner.configs, Space((8,), 8)).counts
    rows = np.broadcast_to(np.arange(len(planner.configs)), counts.shape)
    for _ in range(6):
        service, mix = _with_gaps(rng, model.rates), rng.dirichlet(np.ones(4)) + 0.02
        best = _plain(counts, _loads(mix, service))[0].max()
        rates = load * best * mix
        loads = _loads(rates, service)
        plain, _ = _plain(counts, loads)
        theta, latency_s, shares = score(counts, loads, rates, RHO, model.arrays)
        assert theta == pytest.approx(plain, rel=1e-7, abs=1e-9)
        assert shares.sum(axis=1) == pytest.approx(np.ones((len(counts), 4)))
        assert np.all(shares[theta > 0.0][:, service == 0.0] == 0.0)
        busy = np.where(shares > 0.0, np.where(service > 0.0, loads, 0.0) * shares, 0.0).sum(axis=2)
        served = theta > 0.0
        assert (theta[:, None] * busy <= RHO * counts * (1 + 1e-7))[served].all()
        assert latency_s == pytest.approx(mean_latency_s(model, rows, counts, shares * rates))
        index, _ = least_latency(counts, loads, rates, RHO, model.arrays, True)
        if load > 1.0:
            assert index == -1
            continue
        assert latency_s[index] == latency_s[theta >= 1.0].min()


@pytest.mark.parametrize("load", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_least_latency_in_a_long_list_equals_scoring_all(
    make_cluster: MakeCluster, four_types: WorkloadTyping, load: float
) -> None:
    planner = Planner(make_cluster(24, 4), four_types)
    model, rng = _service(planner), np.random.default_rng(int(100 * load))
    counts = Library(planner.configs, Space((24,), 24)).counts
    assert len(counts) > MANY  # mixes are told apart and prices are tuned
    for concentration in (0.3, 1.0, 3.0):
        mix = rng.dirichlet(np.full(4, concentration)) + 0.02
        rates = load * most_headroom(counts, (mix / model.rates)[None], RHO, 0.0)[1] * mix
        theta, latency_s, _ = score(counts, rates / model.rates, rates, RHO, model.arrays)
        args = (counts, rates / model.rates, rates, RHO, model.arrays, False)
        index, solved = least_latency(*args)
        allowed = np.where(theta >= 1.0, latency_s, np.inf)
        assert index == np.flatnonzero(allowed <= allowed.min() * (1 + 1e-9))[0]
        assert solved < len(counts)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 4, 16]))
def test_no_mix_takes_less_than_the_floors_say(
    make_cluster: MakeCluster, four_types: WorkloadTyping, seed: int, parts: int
) -> None:
    """One replica, random mixes at random utilisation and prices, by the plain path."""
    rng = np.random.default_rng(seed)
    model = _service(Planner(make_cluster(8, 4), four_types))
    floors = load_floors(model.arrays, RHO, parts)
    alone_s = (model.steps * (model.base_s[:, None] + model.added_s)).mean(axis=0)
    prices = alone_s * rng.uniform(0.0, 3.0, 4)
    least = np.empty((LEVELS, len(model.configs)))
    _least_load_s(floors, 0, LEVELS - 1, prices, least)
    busy = RHO * rng.uniform(0.01, 1.0, 200)
    mixes = rng.dirichlet(np.full(4, 0.3), 200)
    for c in range(len(model.configs)):
        flows = busy[:, None] * mixes * model.rates[c]
        rows = np.full((200, 1), c)
        latency_s = mean_latency_s(model, rows, np.ones((200, 1)), flows[:, None])
        adds = (latency_s * flows.sum(axis=1) - flows @ prices) / busy
        level = np.minimum((busy / RHO * LEVELS).astype(int), LEVELS - 1)
        assert (adds >= least[level, c] - 1e-9 * np.abs(adds)).all()


def test_tuned_prices_say_more_and_never_too_much(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    planner = Planner(make_cluster(8, 4), four_types)
    model, rng = _service(planner), np.random.default_rng(0)
    counts, floors = (
        Library(planner.configs, Space((8,), 8)).counts,
        load_floors(model.arrays, RHO, 16),
    )
    raised = 0
    for _ in range(10):
        mix = rng.dirichlet(np.ones(4)) + 0.02
        loads = (mix / model.rates)[None]
        rates = rng.uniform(0.2, 0.9) * most_headroom(counts, loads, RHO, 0.0)[1] * mix
        row = counts[rng.integers(len(counts))]
        (theta,), (latency_s,), _ = score(row[None], rates / model.rates, rates, RHO, model.arrays)
        if theta < 1.0:
            continue
        total_s, level = latency_s * rates.sum(), min(int(LEVELS / theta), LEVELS - 1)
        prices, least = np.full(4, latency_s), np.empty((LEVELS, len(row)))
        values = []
        for _ in range(2):
            _least_load_s(floors, 0, LEVELS - 1, prices, least)
            values.append(prices @ rates + RHO / theta * (row @ least[level]))
            _tune_prices(floors, row, rates, RHO, theta, total_s, prices)
        assert values[0] <= values[1] <= total_s * (1 + 1e-9)
        raised += values[1] > values[0]
    assert raised


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_scores_equal_the_plain_simplex_and_latency(
    make_cluster: MakeCluster, four_types: WorkloadTyping, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    planner = Planner(make_cluster(8, 4), four_types)
    model = _service(planner)
    counts = rng.integers(0, 3, (12, len(planner.configs))).astype(np.float64)
    counts[:, -1] += 1
    rates = rng.dirichlet(np.ones(4)) * rng.uniform(0.5, 10.0) + 0.05
    theta, latency_s, shares = score(counts, rates / model.rates, rates, RHO, model.arrays)
    plain, _ = _plain(counts, rates / model.rates)
    rows = np.broadcast_to(np.arange(len(planner.configs)), counts.shape)
    assert theta == pytest.approx(plain, rel=1e-8)
    assert shares.sum(axis=1) == pytest.approx(np.ones((12, 4)))
    assert latency_s == pytest.approx(mean_latency_s(model, rows, counts, shares * rates))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 4))
def test_prices_of_a_solved_deployment_say_its_headroom(seed: int, types: int, used: int) -> None:
    """By duality: no prices bound it below its headroom, and these meet it. With equal ratios of
    loads, where several optima are as good, too."""
    rng = np.random.default_rng(seed)
    loads = np.exp(rng.normal(0.0, 1.0, (6, types)))
    loads[1] = np.where(rng.random(types) < 0.3, 2.0 * loads[0], loads[1])
    capacity = np.zeros(6)
    capacity[:used] = RHO * rng.integers(1, 5, used)
    shares, prices = np.empty((6, types)), np.empty(types)
    theta = _solve(loads, capacity, *_scratch(6, types), shares, prices)
    plain, _ = simplex_batch(loads[None], capacity[None])
    bound = capacity @ (prices / loads).max(axis=1)
    assert theta == pytest.approx(plain[0], rel=1e-8)
    assert bound == pytest.approx(theta, rel=1e-7)
    assert prices.sum() == pytest.approx(1.0)
    assert shares.sum(axis=0) == pytest.approx(np.ones(types))
    assert ((loads * shares).sum(axis=1) <= capacity / theta * (1 + 1e-9)).all()


def test_large_pools_have_no_library() -> None:
    assert has_library(CONFIGS, Space((8, 8), 16))
    assert not has_library(CONFIGS, Space((8,) * 5, 40))
    many = tuple(ParallelConfig(tp, pp) for tp in range(1, 9) for pp in range(1, 9))
    assert not has_library(many, Space((32,), 32))
