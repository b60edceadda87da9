"""Settings of the planner: who finds the optimum, and deployments of equal replicas only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from controller.deployments import configs_of, counts_of, size_of
from controller.library import list_homogeneous
from controller.packing import packs
from controller.planner import Planner
from controller.predictor import Forecast
from controller.scoring import PlannerConfig
from controller.solvers import SOLVERS, SolverName
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    ParallelConfig,
    Routing,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
RATES = np.array([4.0, 2.5, 2.5, 1.0])
RIVALS: tuple[SolverName, ...] = ("oserve", "oserve_exact", "exhaustive")


def _forecast(rates: np.ndarray, spread: float = 1.3) -> Forecast:
    mid = tuple(rates.tolist())
    return Forecast(mid, mid, tuple((rates * spread).tolist()), (0.0,) * len(mid))


def _snapshot(key: str, dead_devices: tuple[int, ...] = ()) -> ClusterSnapshot:
    deployment = dense_deployment(parse_deployment_key(key))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    plain = ClusterSnapshot(0.0, 0, deployment, routing, (), None)
    return replace(plain, dead_devices=dead_devices)


def _by_rule(rows: tuple[Candidate, ...]) -> dict[str, Candidate]:
    return {name: row for row in rows for name in row.origin.split("+")}


def _in_halves(cluster: ProfiledCluster) -> ProfiledCluster:
    """With nodes of four devices."""
    return replace(cluster, spec=replace(cluster.spec, devices_per_node=4))


# -- who finds the optimum --------------------------------------------------------------


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("dead", "most"), [((), 0), ((1, 6), 0), ((), 5)])
def test_the_candidate_is_what_the_solver_finds(
    make_cluster: MakeCluster,
    four_types: WorkloadTyping,
    name: SolverName,
    dead: tuple[int, ...],
    most: int,
) -> None:
    config = PlannerConfig(planner=name, max_devices=most)
    planner, exact = (Planner(make_cluster(8, 4), four_types, c) for c in (config, None))
    sizes = [c.num_devices for c in planner.configs]
    devices = min(8 - len(dead), most or 8)
    for seed in range(4):
        mix = np.random.default_rng(seed).dirichlet(np.ones(4)) + 0.02
        key = planner.scorer.rates_key(mix)
        loads = planner.scorer.rates((0, *key[1:])) / planner.service_rates()
        found = SOLVERS[name](loads, sizes, devices, planner.config.max_utilisation)
        rows = planner.propose(_snapshot("8xtp1pp1", dead), _forecast(mix))
        row = _by_rule(rows)["optimum"]
        assert counts_of(row.configs, planner.configs) == found
        assert sum(c.num_devices for c in row.configs) <= devices
        if not dead:
            assert planner.optimum(mix * 3.0) == row.configs  # the mix alone decides
            best = exact.estimate(exact.optimum(mix, devices), mix).headroom
            assert row.headroom <= best * (1 + 1e-9)
            if name == "exhaustive":
                assert row.headroom == pytest.approx(best, rel=1e-9)


def test_other_rules_stay_as_they_are(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    cluster, snapshot = make_cluster(8, 4), _snapshot("8xtp1pp1")
    mine, theirs = (
        _by_rule(Planner(cluster, four_types, c).propose(snapshot, _forecast(RATES)))
        for c in (None, PlannerConfig(planner="oserve"))
    )
    assert set(theirs) == set(mine)
    for name in set(mine) - {"optimum", "keep"}:
        assert replace(theirs[name], origin="") == replace(mine[name], origin="")


@pytest.mark.parametrize("name", RIVALS)
def test_what_does_not_fit_into_the_nodes_is_cut_and_filled(
    make_cluster: MakeCluster, four_types: WorkloadTyping, name: SolverName
) -> None:
    """Three devices are alive in either node: no group of four fits, where six devices are left."""
    config = PlannerConfig(planner=name)
    planner = Planner(_in_halves(make_cluster(8, 4)), four_types, config)
    optima, cut = planner.optima, 0
    sizes, nodes = [c.num_devices for c in planner.configs], planner._space((0, 4)).nodes
    assert nodes == (3, 3)
    for seed in range(12):
        mix = np.random.default_rng(seed).dirichlet(np.full(4, 0.3)) + 0.02
        key, lengths_key = planner.scorer.rates_key(mix), planner.scorer.lengths_key(None)
        counts = optima.by_planner(planner._space((0, 4)), key, lengths_key)
        loads = planner.scorer.rates((0, *key[1:])) / planner.service_rates()
        meant = SOLVERS[name](loads, sizes, 6, planner.config.max_utilisation)
        assert packs(np.array([counts]), planner.configs, nodes)[0]
        assert size_of(counts, sizes) <= 6
        for c in range(len(counts)):  # nothing is left idle
            more = np.array([counts]) + (np.arange(len(counts)) == c)
            fits = packs(more, planner.configs, nodes)[0] and more[0] @ sizes <= 6
            assert not fits
        fits = packs(np.array([meant]), planner.configs, nodes)[0]
        assert (counts == meant) == fits
        cut += not fits
    assert cut or name != "exhaustive"


def test_cutting_by_hand(make_cluster: MakeCluster, four_types: WorkloadTyping) -> None:
    """Of a group of four and two of one device, in nodes of three, the two stay; a replica of four
    stages comes for the group, since it is the largest that fits beside them."""
    planner = Planner(_in_halves(make_cluster(8, 4)), four_types, PlannerConfig(planner="oserve"))
    counts = counts_of(parse_deployment_key("1xtp4pp1+2xtp1pp1"), planner.configs)
    found = planner.optima._packed(counts, planner._space((0, 4)))
    assert counts_of(parse_deployment_key("1xtp2pp2+2xtp1pp1"), planner.configs) == found
    assert planner.optima._packed(found, planner._space((0, 4))) == found


def test_rivals_are_for_goodput_of_unlike_replicas(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    with pytest.raises(InvalidRequestError, match="one of exact, oserve, oserve_exact"):
        PlannerConfig(planner="greedy")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="needs objective 'goodput'"):
        PlannerConfig(planner="oserve", objective="latency")
    with pytest.raises(InvalidRequestError, match="homogeneous false"):
        PlannerConfig(planner="exhaustive", homogeneous=True)
    with pytest.raises(InvalidRequestError, match="at most 32 devices"):
        Planner(make_cluster(40, 4), four_types, PlannerConfig(planner="exhaustive"))


def test_decision_settings_are_handed_on(
    synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping
) -> None:
    for config in (DecisionConfig(planner="oserve"), DecisionConfig(homogeneous=True)):
        planning = build_pipeline(synthetic_cluster, four_types, config).planner.config
        given = asdict(config)
        assert {k: v for k, v in asdict(planning).items() if k in given}.items() <= given.items()


# -- equal replicas -----------------------------------------------------------------------


@pytest.mark.parametrize("devices", [4, 7])
def test_homogeneous_deployments_by_brute_force(
    make_cluster: MakeCluster, four_types: WorkloadTyping, devices: int
) -> None:
    planner = Planner(_in_halves(make_cluster(8, 4)), four_types)
    space = planner._space(tuple(range(8 - devices)))
    for maximal in (True, False):
        want = set()
        for c, parallel in enumerate(planner.configs):
            fitting = []
            for n in range(1, 9):
                row = np.zeros((1, len(planner.configs)), np.int64)
                row[0, c] = n
                if n * parallel.num_devices <= devices and packs(row, planner.configs, space.nodes):
                    fitting.append(tuple(row[0].tolist()))
            want |= set(fitting[-1:] if maximal else fitting)
        found = list_homogeneous(planner.configs, space, maximal).tolist()
        assert len(found) == len(want)
        assert set(map(tuple, found)) == want


@pytest.mark.parametrize("devices", [8, 40])
@pytest.mark.parametrize("objective", ["goodput", "latency", "cost"])
def test_every_candidate_is_homogeneous_and_the_best_of_those(
    make_cluster: MakeCluster, four_types: WorkloadTyping, devices: int, objective: str
) -> None:
    config = PlannerConfig(objective=objective, homogeneous=True, give_back=True)  # type: ignore[arg-type]
    default = parse_deployment_key(f"1xtp4pp1+{devices - 4}xtp1pp1")
    planner = Planner(make_cluster(devices, 8), four_types, config, default)
    scale, present = devices / 8, f"1xtp2pp1+{devices - 2}xtp1pp1"
    for last in (parse_deployment_key(f"{devices // 2}xtp2pp1"), default):
        rows = planner.propose(
            _snapshot(present), _forecast(RATES * scale), last, None, [tuple(RATES)]
        )
        by_rule = _by_rule(rows)
        assert rows[0].key == present
        assert all(len(set(row.configs)) == 1 for row in rows[1:])
        assert "default" not in by_rule  # it is mixed
        assert ("undo" in by_rule) == (last != default)
        for row in rows[1:]:
            idle = devices - sum(c.num_devices for c in row.configs)
            given_back = {"fewest_devices", "optimum"} & set(row.origin.split("+"))
            assert idle < row.configs[0].num_devices or given_back
    every = [
        configs_of(tuple(row), planner.configs)
        for row in list_homogeneous(planner.configs, planner._space(())).tolist()
    ]
    estimates = [planner.estimate(c, RATES * scale) for c in every]
    most = max(e.headroom for e in estimates)
    fastest = min((e.latency_s for e in estimates if e.headroom >= 1.0), default=None)
    assert fastest is not None
    assert by_rule["optimum_q90"].headroom == pytest.approx(most, rel=1e-9)
    assert by_rule["lowest_latency"].latency_s == pytest.approx(fastest, rel=1e-9)
    if objective == "goodput":
        assert by_rule["optimum"].headroom == pytest.approx(most, rel=1e-9)
        assert planner.optimum(RATES * scale) == by_rule["optimum"].configs
    fewest = by_rule["optimum" if objective == "cost" else "fewest_devices"]
    used = [
        n * c.num_devices
        for c in planner.configs
        for n in range(1, devices // c.num_devices + 1)
        if planner.estimate([c] * n, RATES * scale * 1.3).headroom >= 1.0
    ]
    assert sum(c.num_devices for c in fewest.configs) == min(used)


def test_the_present_deployment_stays_where_no_homogeneous_one_is_better(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    cluster = make_cluster(8, 4)
    best = Planner(cluster, four_types).optimum(np.array([8.0, 0.1, 4.0, 0.5]))
    assert len(set(best)) > 1
    key = "+".join(f"{best.count(c)}xtp{c.tp}pp{c.pp}" for c in dict.fromkeys(best))
    alike = Planner(cluster, four_types, PlannerConfig(homogeneous=True))
    rows = alike.propose(_snapshot(key), _forecast(np.array([8.0, 0.1, 4.0, 0.5])))
    assert "optimum" in rows[0].origin.split("+")


def test_dead_devices_leave_fewer_equal_replicas(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    planner = Planner(_in_halves(make_cluster(8, 4)), four_types, PlannerConfig(homogeneous=True))
    rows = planner.propose(_snapshot("4xtp2pp1", (0, 4)), _forecast(RATES * 0.05))
    assert len(rows) > 1
    for row in rows[1:]:
        (only,) = set(row.configs)
        assert only != ParallelConfig(4, 1)
        assert len(row.configs) == (2 if only.tp == 2 and only.pp == 1 else 6 // only.num_devices)
