from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controller.deployments import enumerate_counts, fill, size_of
from controller.flow_search import (
    changed,
    exact_assignment,
    merge,
    move,
    search_deployment,
    solve_flow,
    split,
    swap,
)
from controller.max_flow import flow_assignment
from controller.planner import Planner
from controller.solvers import SOLVERS, headrooms, solve_exhaustive, solver
from engine.cluster import WorkloadTyping
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
RHO = 0.9
SIZES = (4, 4, 2, 2, 1)  # tp4, pp4, tp2, pp2, tp1


def fleet(*counts: int) -> tuple[int, ...]:
    return counts


# -- moves ------------------------------------------------------------------------------


def test_move_gives_devices_of_the_redundant_replica_to_the_bottleneck() -> None:
    assert move(2, 0, SIZES) == [((2, 0), (3, 3)), ((2, 0), (4, 2)), ((2, 0), (5, 1))]
    after = set(changed(fleet(1, 0, 1, 0, 0), ((2, 0), (4, 2)), SIZES, 6))
    assert after == {
        fleet(*c) for c in ((1, 0, 1, 0, 0), (1, 0, 0, 1, 0), (0, 1, 1, 0, 0), (0, 1, 0, 1, 0))
    }


def test_merge_makes_one_of_two() -> None:
    assert merge(2, 3, SIZES) == [((2, 3), (4,))]
    after = list(changed(fleet(0, 0, 1, 1, 0), ((2, 3), (4,)), SIZES, 4))
    assert after == [fleet(1, 0, 0, 0, 0), fleet(0, 1, 0, 0, 0)]


def test_split_makes_two_of_one_of_them() -> None:
    assert split(0, 2, SIZES) == [((0,), (1, 3)), ((0,), (2, 2)), ((2,), (1, 1))]
    after = set(changed(fleet(1, 0, 0, 0, 0), ((0,), (2, 2)), SIZES, 4))
    assert after == {fleet(0, 0, 2, 0, 0), fleet(0, 0, 1, 1, 0), fleet(0, 0, 0, 2, 0)}


def test_swap_exchanges_devices_and_takes_any_strategies() -> None:
    assert swap(0, 2, SIZES) == [((0, 2), (2, 4))]
    after = set(changed(fleet(1, 0, 1, 0, 0), ((0, 2), (2, 4)), SIZES, 6))
    assert fleet(0, 1, 0, 1, 0) in after
    assert len(after) == 4


def test_a_size_without_a_configuration_is_no_way_on_and_idle_devices_are_filled() -> None:
    assert list(changed(fleet(1, 0, 1, 0, 0), ((2, 0), (3, 3)), SIZES, 6)) == []
    assert list(changed(fleet(0, 0, 2, 0, 0), ((2, 2), (4,)), SIZES, 5)) == [
        fleet(1, 0, 0, 0, 1),
        fleet(0, 1, 0, 0, 1),
    ]


@pytest.mark.parametrize("missing", [move, merge, split, swap])
def test_every_move_is_needed(
    missing: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates of which only one kind of move away from the start lies the optimum."""
    starts = {  # sizes, rates of the one type, devices, start, optimum
        "move": ((1, 2, 3), (0.05, 0.1, 6.0), 4, fleet(0, 2, 0), fleet(1, 0, 1)),
        "merge": ((1, 2), (1.0, 3.0), 2, fleet(2, 0), fleet(0, 1)),
        "split": ((1, 2), (2.0, 3.0), 2, fleet(0, 1), fleet(2, 0)),
        "swap": ((1, 1), (1.0, 2.0), 2, fleet(2, 0), fleet(0, 2)),
    }
    sizes, service, devices, start, best = starts[missing.__name__]
    loads = 1.0 / np.array(service)[:, None]

    def found() -> tuple[int, ...]:
        rng = np.random.default_rng(0)
        return search_deployment(loads, sizes, devices, RHO, rng, start).counts

    assert found() == best
    kept = tuple(m for m in (move, merge, split, swap) if m is not missing)
    monkeypatch.setattr("controller.flow_search.MOVES", kept)
    if sum(start) > 1:  # a lone replica is always split
        assert found() == start


# -- search -----------------------------------------------------------------------------


def _loads(
    cluster: ProfiledCluster, typing: WorkloadTyping, seed: int
) -> tuple[np.ndarray, list[int]]:
    planner = Planner(cluster, typing)
    mix = np.random.default_rng(seed).dirichlet(np.ones(len(typing.types))) + 0.01
    return mix / planner.service_rates(), [c.num_devices for c in planner.configs]


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_search_fills_the_pool_and_never_beats_exhaustive(
    make_cluster: MakeCluster, four_types: WorkloadTyping, devices: int, seed: int
) -> None:
    loads, sizes = _loads(make_cluster(devices, devices), four_types, seed)
    plan = search_deployment(loads, sizes, devices, RHO, np.random.default_rng(seed))
    best = solve_exhaustive(loads, sizes, devices, RHO)
    with_exact_routing, most = headrooms(loads, [plan.counts, best], RHO)
    assert size_of(plan.counts, sizes) <= devices
    assert fill(plan.counts, sizes, devices) == plan.counts
    assert plan.assignment.theta <= with_exact_routing * (1 + 1e-9) <= most * (1 + 2e-9)
    assert with_exact_routing > 0.8 * most


@pytest.mark.parametrize("seed", range(4))
def test_search_by_the_exact_assignment_never_beats_exhaustive(
    make_cluster: MakeCluster, four_types: WorkloadTyping, seed: int
) -> None:
    loads, sizes = _loads(make_cluster(8, 8), four_types, seed)
    rng = np.random.default_rng(seed)
    plan = search_deployment(loads, sizes, 8, RHO, rng, assign=exact_assignment)
    best = solve_exhaustive(loads, sizes, 8, RHO)
    found, most = headrooms(loads, [plan.counts, best], RHO)
    assert plan.assignment.theta == pytest.approx(found)
    assert plan.assignment.busy.max() == pytest.approx(1.0)
    assert 0.9 * most < found <= most * (1 + 1e-9)


def test_only_the_exact_assignment_sees_unlike_replicas_pay() -> None:
    """Two kinds of one device, each four times as fast at one of two types: two alike serve 2 /
    1.25 times the rates, and so two unlike ones seem to by their flow; kept apart they serve 4."""
    loads = np.array([[1.0, 1 / 4], [1 / 4, 1.0]])
    exact = SOLVERS["oserve_exact"](loads, (1, 1), 2, 1.0)
    by_flow = search_deployment(loads, (1, 1), 2, 1.0, np.random.default_rng(0))
    assert exact == SOLVERS["exact"](loads, (1, 1), 2, 1.0) == (1, 1)
    assert by_flow.counts in ((2, 0), (0, 2))
    assert by_flow.assignment.theta == pytest.approx(1.6)
    assert headrooms(loads, [exact], 1.0) == pytest.approx([4.0])


def test_search_is_deterministic_by_seed(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    loads, sizes = _loads(make_cluster(16, 8), four_types, 5)
    found = [solve_flow(loads, sizes, 16, RHO, seed=s) for s in (0, 0, 1, 1)]
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_search_gains_on_its_start(make_cluster: MakeCluster, four_types: WorkloadTyping) -> None:
    loads, sizes = _loads(make_cluster(8, 8), four_types, 3)
    start = fill((0,) * len(sizes), sizes, 8)
    alone = flow_assignment(loads[np.flatnonzero(start)], RHO * np.ones(1)).theta
    found = search_deployment(loads, sizes, 8, RHO, np.random.default_rng(0), start)
    assert found.assignment.theta > alone


# -- every deployment in turn -----------------------------------------------------------


def test_exhaustive_is_the_best_of_all(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    """And batches of different widths, padded, are scored as one by one."""
    loads, sizes = _loads(make_cluster(4, 4), four_types, 0)
    every = list(enumerate_counts(sizes, 4))
    one_by_one = [headrooms(loads, [c], RHO)[0] for c in every]
    assert headrooms(loads, every, RHO) == pytest.approx(one_by_one)
    assert solve_exhaustive(loads, sizes, 4, RHO) == every[int(np.argmax(one_by_one))]


def test_solvers_agree_where_there_is_nothing_to_choose() -> None:
    loads = np.array([[0.5, 0.25]])
    assert {name: solver(name)(loads, [2], 6, RHO) for name in SOLVERS} == dict.fromkeys(
        SOLVERS, (3,)
    )


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(
        InvalidRequestError, match="expected one of exact, oserve, oserve_exact, exhaustive"
    ):
        solver("best")
