"""The best plan that is cheap to reach, against brute force by exact costs of all deployments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controller.deployments import configs_of, list_counts
from controller.planner import Planner
from controller.predictor import Forecast
from controller.scoring import PlannerConfig
from controller.switch_costs import SwitchCosts
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    Routing,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.plan import SwitchCost, switch_cost
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
RATES = np.array([4.0, 2.5, 2.5, 1.0])


def _cheap(planner: Planner, key: str, rates: np.ndarray) -> Candidate:
    deployment = dense_deployment(parse_deployment_key(key))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    snapshot = ClusterSnapshot(0.0, 0, deployment, routing, (), None)
    mid = tuple(rates.tolist())
    rows = planner.propose(snapshot, Forecast(mid, mid, mid, (0.0,) * len(mid)))
    return next(row for row in rows if "cheap_switch" in row.origin.split("+"))


def _costs(planner: Planner, key: str, maximal: bool = True) -> dict[tuple[int, ...], SwitchCost]:
    spec, sizes = planner.cluster.spec, [c.num_devices for c in planner.configs]
    current = dense_deployment(parse_deployment_key(key))
    listed = list_counts(sizes, spec.num_devices, maximal).tolist()
    return {
        tuple(c): switch_cost(spec, current, configs_of(tuple(c), planner.configs)) for c in listed
    }


def _headrooms(planner: Planner, listed: list[tuple[int, ...]], rates: np.ndarray) -> np.ndarray:
    key, lengths_key = planner.scorer.rates_key(rates), planner.scorer.lengths_key(None)
    return planner.scorer.score(np.array(listed, np.float64), [key], lengths_key)[0].headroom


KEYS_8 = ("8xtp1pp1", "2xtp4pp1", "1xtp4pp1+2xtp1pp2", "2xtp2pp2")
KEYS_64 = ("32xtp2pp1", "10xtp2pp1+10xtp1pp2+24xtp1pp1")


@pytest.mark.parametrize(
    ("devices", "largest", "keys"), [(8, 4, KEYS_8), (64, 2, KEYS_64)], ids=["8", "64"]
)
def test_the_best_within_either_budget(
    make_cluster: MakeCluster,
    four_types: WorkloadTyping,
    devices: int,
    largest: int,
    keys: tuple[str, ...],
) -> None:
    """In a library, and by the programme in eight nodes of eight devices."""
    cluster, rates, seen = make_cluster(devices, largest), RATES * devices / 8, set()
    plain = Planner(cluster, four_types)
    assert (plain.optima.library(plain._space(())) is None) == (devices > 32)
    for key in keys:
        costs = _costs(plain, key)
        listed = list(costs)
        headroom = _headrooms(plain, listed, rates)
        nbytes = np.array([c.weight_bytes for c in costs.values()])
        seconds = np.array([c.seconds for c in costs.values()])
        for of_bytes, of_seconds in ((0.0, 0.0), (0.2, 0.0), (0.5, 0.0), (0.0, 0.4), (0.3, 0.2)):
            most, longest = int(of_bytes * nbytes.max()), of_seconds * seconds.max()
            config = PlannerConfig(switch_budget_bytes=most, switch_budget_s=longest)
            found = _cheap(Planner(cluster, four_types, config), key, rates)
            cheap = (nbytes <= most) | (seconds <= longest)
            assert found.headroom == pytest.approx(headroom[cheap].max(), rel=1e-6)
            overhead_s = cluster.profile.switch_overhead_s
            assert found.weight_bytes <= most or found.switch_s <= overhead_s + longest
            seen.add((key, found.key))
    assert len(seen) > len(keys)  # the budgets matter


@pytest.mark.parametrize("key", ["8xtp1pp1", "2xtp4pp1", "1xtp4pp1+2xtp1pp2"])
def test_bounds_are_below_the_exact_costs(
    make_cluster: MakeCluster, four_types: WorkloadTyping, key: str
) -> None:
    planner = Planner(make_cluster(8, 4), four_types)
    current = dense_deployment(parse_deployment_key(key))
    switches = SwitchCosts(planner.cluster.spec, current, planner.configs)
    costs = _costs(planner, key, maximal=False)
    nbytes, seconds = switches.least(np.array(list(costs), np.float64))
    assert (nbytes <= [c.weight_bytes for c in costs.values()]).all()
    assert (seconds <= np.array([c.seconds for c in costs.values()]) * (1 + 1e-12)).all()
    assert (seconds > 0.0).any() == (key != "8xtp1pp1")  # whose devices hold everything


def test_far_from_the_present_the_programme_finds_what_neighbours_do_not(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    """Half of the bytes to the optimum lead to a deployment that is neither near the present one
    nor near the optimum."""
    cluster, rates = make_cluster(64, 4), RATES * 8
    costs = switch_cost(
        cluster.spec,
        dense_deployment(parse_deployment_key("16xtp2pp2")),
        Planner(cluster, four_types).optimum(rates),
    )
    planner = Planner(
        cluster, four_types, PlannerConfig(switch_budget_bytes=costs.weight_bytes // 2)
    )
    found = _cheap(planner, "16xtp2pp2", rates)
    assert 0 < found.weight_bytes <= costs.weight_bytes // 2
    key, lengths_key = planner.scorer.rates_key(rates), planner.scorer.lengths_key(None)
    live = tuple(16 if (c.tp, c.pp) == (2, 2) else 0 for c in planner.configs)
    search = planner.optima.search(planner._space(()), lengths_key, live, (key,))
    current = dense_deployment(parse_deployment_key("16xtp2pp2"))
    near = [
        row
        for row in search.listed.astype(int).tolist()
        if switch_cost(cluster.spec, current, configs_of(tuple(row), planner.configs)).weight_bytes
        <= costs.weight_bytes // 2
    ]
    assert found.headroom > _headrooms(planner, [tuple(r) for r in near], rates).max()
