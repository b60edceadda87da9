"""Headroom by SLO rates, against brute force over all deployments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from controller.assignment import assign_rates
from controller.build import SLO_RATES, build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig
from controller.deployments import counts_of, list_counts
from controller.planner import Planner
from controller.predictor import Forecast
from controller.scoring import PlannerConfig
from controller.service_model import mean_latency_s, service_rates
from controller.slo_rates import SloRates
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    Routing,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
CENTRES = np.array([[50.0, 30.0], [80.0, 200.0], [600.0, 100.0]])
MIX = np.array([0.4, 0.3, 0.2, 0.1])
RHO = 0.9
PROFILES = SLO_RATES.parent / "profiles"


def _rates(cluster: ProfiledCluster, seed: int, types: tuple[int, ...] = (0, 1, 2)) -> SloRates:
    """A third of the entries 0, the others a part of the service rates; `types` can be served."""
    rng, configs = np.random.default_rng(seed), Planner(cluster, _typing(CENTRES)).configs
    able = rng.random((len(configs), 3)) > 0.35
    able[rng.integers(0, len(configs), 3), np.arange(3)] = True
    able[:, [j for j in range(3) if j not in types]] = False
    found = service_rates(cluster, configs, CENTRES) * rng.uniform(0.4, 1.0, able.shape) * able
    return SloRates(configs, _typing(CENTRES), {"interactive": found, "batch": 0.5 * found}, "")


def _typing(lengths: np.ndarray) -> WorkloadTyping:
    return WorkloadTyping(tuple(WorkloadType(f"{p}", p, o) for p, o in lengths.tolist()))


def _planner(
    cluster: ProfiledCluster, typing: WorkloadTyping, rates: SloRates, **settings: object
) -> Planner:
    config = PlannerConfig(capacity="slo", **settings)  # type: ignore[arg-type]
    return Planner(cluster, typing, config, None, rates)


def _service(planner: Planner) -> np.ndarray:
    return planner.scorer.headroom_rates(planner.scorer.lengths_key(None))


def _rows(planner: Planner, key: str, rates: np.ndarray) -> dict[str, Candidate]:
    deployment = dense_deployment(parse_deployment_key(key))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    snapshot = ClusterSnapshot(0.0, 0, deployment, routing, (), None)
    mid = tuple(rates.tolist())
    rows = planner.propose(snapshot, Forecast(mid, mid, mid, (0.0,) * len(mid)))
    return {name: row for row in rows for name in row.origin.split("+")}


def _brute_force(
    planner: Planner, rates: np.ndarray, maximal: bool = True
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Of all deployments, headroom by the SLO rates and latency by the service model at the
    routing of that headroom."""
    service, sizes = _service(planner), [c.num_devices for c in planner.configs]
    model = planner.scorer.model(planner.scorer.lengths_key(None))
    rates = planner.scorer.rates(planner.scorer.rates_key(rates))
    found = {}
    for row in list_counts(sizes, planner.cluster.spec.num_devices, maximal):
        used = np.flatnonzero(row)
        plan = assign_rates(rates, service[used], RHO * row[used])
        shares = plan.x / np.maximum(plan.x.sum(axis=0), 1e-12) * rates
        counts = row[used][None].astype(np.float64)
        latency_s = mean_latency_s(model, used[None], counts, shares[None])
        found[tuple(row.tolist())] = plan.theta, float(latency_s[0])
    return found


def test_rates_at_other_lengths_keep_the_share_of_the_nearest_centre(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(4, 4)
    rates = _rates(cluster, 0)
    lengths = np.array([[700.0, 60.0], [45.0, 33.0], [90.0, 260.0], [50.0, 30.0]])
    planner = _planner(cluster, _typing(lengths), rates, length_step=1e-6)
    own = service_rates(cluster, rates.configs, lengths)
    at_centres = service_rates(cluster, rates.configs, CENTRES)
    for j, centre in enumerate((2, 0, 1, 0)):
        want = rates.rates["interactive"][:, centre] / at_centres[:, centre] * own[:, j]
        assert _service(planner)[:, j] == pytest.approx(want, rel=1e-4)
    assert _service(planner)[:, 3] == pytest.approx(rates.rates["interactive"][:, 0], rel=1e-4)
    batch = _planner(cluster, _typing(lengths), rates, length_step=1e-6, slo_class="batch")
    assert _service(batch) == pytest.approx(0.5 * _service(planner))
    assert planner.service_rates() == pytest.approx(own, rel=1e-4)  # of the model, as ever


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_optimum_and_lowest_latency_equal_brute_force(
    make_cluster: MakeCluster, four_types: WorkloadTyping, seed: int, load: float
) -> None:
    cluster = make_cluster(8, 4)
    planner = _planner(cluster, four_types, _rates(cluster, seed), rate_step=1e-6)
    rates = load * MIX * planner.estimate(planner.optimum(MIX), MIX).headroom
    every = _brute_force(planner, rates)
    rows = _rows(planner, "8xtp1pp1", rates)
    optimum, fastest = rows["optimum"], rows["lowest_latency"]
    best = max(theta for theta, _ in every.values())
    assert best == pytest.approx(1.0 / load, rel=1e-4)
    assert optimum.headroom == pytest.approx(best, rel=1e-6)
    least_s = min(latency_s for theta, latency_s in every.values() if theta >= 1.0)
    assert fastest.latency_s <= least_s * (1 + 1e-6)
    theta, latency_s = every[counts_of(fastest.configs, planner.configs)]
    assert theta >= 1.0
    assert fastest.latency_s == pytest.approx(latency_s, rel=1e-4)
    for row in (optimum, fastest):  # nothing goes where it misses its targets
        for j in range(4):
            for r, parallel in enumerate(row.configs):
                if _service(planner)[planner.configs.index(parallel), j] == 0.0:
                    assert row.routing[j][r] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_fewest_devices_equal_brute_force(
    make_cluster: MakeCluster, four_types: WorkloadTyping, seed: int
) -> None:
    cluster = make_cluster(8, 4)
    planner = _planner(cluster, four_types, _rates(cluster, seed), objective="cost")
    rates = 0.45 * MIX * max(theta for theta, _ in _brute_force(planner, MIX).values())
    sizes = np.array([c.num_devices for c in planner.configs])
    every = _brute_force(planner, rates, maximal=False)
    least = min(sizes @ np.array(c) for c, (theta, _) in every.items() if theta >= 1.0)
    found = planner.optimum(rates)
    assert sum(c.num_devices for c in found) == least
    assert planner.estimate(found, rates).headroom >= 1.0


@pytest.mark.parametrize("objective", ["goodput", "latency", "cost"])
def test_pools_without_a_library(
    make_cluster: MakeCluster, four_types: WorkloadTyping, objective: str
) -> None:
    cluster = make_cluster(40, 4)
    planner = _planner(cluster, four_types, _rates(cluster, 2), objective=objective)
    plain = _planner(cluster, four_types, _rates(cluster, 2))
    rates = 0.5 * MIX * plain.estimate(plain.optimum(MIX), MIX).headroom
    optimum = _rows(planner, "40xtp1pp1", rates)["optimum"]
    assert optimum.headroom >= 1.0
    if objective == "goodput":
        assert optimum.headroom == pytest.approx(2.0, rel=0.03)
    if objective == "cost":
        used = sum(c.num_devices for c in optimum.configs)
        assert used < 40
        assert plain.estimate(plain.optimum(rates, used - 1), rates).headroom < 1.0
    alike = _planner(cluster, four_types, _rates(cluster, 2), homogeneous=True)
    assert len(set(alike.optimum(rates))) == 1


@pytest.mark.parametrize("name", ["oserve", "oserve_exact", "exhaustive"])
def test_rival_planners_take_the_same_rates(
    make_cluster: MakeCluster, four_types: WorkloadTyping, name: str
) -> None:
    cluster = make_cluster(8, 4)
    for seed in range(6):
        exact = _planner(cluster, four_types, _rates(cluster, seed))
        rival = _planner(cluster, four_types, _rates(cluster, seed), planner=name)
        best = exact.estimate(exact.optimum(MIX), MIX).headroom
        found = exact.estimate(rival.optimum(MIX), MIX).headroom
        assert found <= best * (1 + 1e-9)
        assert name != "exhaustive" or found == pytest.approx(best, rel=1e-9)


def test_a_type_that_nobody_serves_in_time_leaves_no_headroom(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    """The present deployment stays, and what is late anyhow is routed for throughput."""
    cluster = make_cluster(8, 4)
    planner = _planner(cluster, four_types, _rates(cluster, 1, types=(0, 1)))
    plain = Planner(cluster, four_types)
    rows = _rows(planner, "2xtp2pp1+4xtp1pp1", 4.0 * MIX)
    keep = rows["keep"]
    assert rows["optimum"] is rows["lowest_latency"] is keep
    assert {row.headroom for row in rows.values()} == {0.0}
    for row in rows.values():
        estimate = plain.estimate(row.configs, 4.0 * MIX)
        assert row.routing == estimate.routing
        assert row.latency_s == estimate.latency_s


def test_what_is_missing_is_named(make_cluster: MakeCluster, four_types: WorkloadTyping) -> None:
    cluster = make_cluster(8, 4)
    rates = _rates(cluster, 0)
    with pytest.raises(InvalidRequestError, match="needs SLO rates and got none"):
        Planner(cluster, four_types, PlannerConfig(capacity="slo"))
    with pytest.raises(InvalidRequestError, match="a capacity of throughput, slo"):
        PlannerConfig(capacity="goodput")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="not for 'urgent'"):
        _planner(cluster, four_types, rates, slo_class="urgent")
    fewer = replace(rates, configs=rates.configs[1:])
    with pytest.raises(InvalidRequestError, match=r"run python -m envs\.slo_rates PROFILE"):
        _planner(cluster, four_types, fewer)
    with pytest.raises(InvalidRequestError, match=r"SLO rates of toy .*envs\.slo_rates PROFILE"):
        build_pipeline(cluster, four_types, DecisionConfig(capacity="slo"))


@pytest.mark.parametrize("devices", [8, 16])
def test_shipped_rates_serve_pools_of_any_size(devices: int) -> None:
    cluster = load_profiled_cluster(PROFILES / "h100-llama-2-70b.json")
    cluster = replace(cluster, spec=replace(cluster.spec, num_devices=devices))
    typing = _typing(np.array([[400.0, 150.0], [1500.0, 300.0]]))
    planner = build_pipeline(cluster, typing, DecisionConfig(capacity="slo")).planner
    plain = build_pipeline(cluster, typing, DecisionConfig()).planner
    assert (_service(planner) <= 1.001 * plain.service_rates()).all()
    assert (_service(planner) == 0.0).any()
    best = planner.estimate(planner.optimum([1.0, 2.0]), [1.0, 2.0]).headroom
    ignored = planner.estimate(plain.optimum([1.0, 2.0]), [1.0, 2.0]).headroom
    assert best > max(ignored, 0.0)
