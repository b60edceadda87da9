"""The compiled kernel against the engine's own batch scheduler and router, stepped in Python."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import (
    Deployment,
    Request,
    RequestOutcome,
    Routing,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster, StepTimeModel
from engine.router import ReplicaLoad, pick, shares
from envs.surrogate import kernel, layout
from envs.surrogate.cluster import SurrogateCluster
from tests.envs.plain_cluster import PlainCluster


@pytest.fixture(scope="module")
def curved_cluster(small_cluster: ProfiledCluster) -> ProfiledCluster:
    """With attention pairs and a token term of knots: some steps are below the first, between two,
    and beyond the last."""
    steps = tuple(
        replace(
            model,
            per_pair_s=3e-7 / model.parallel.tp,
            token_knots=(3, 8, 20, 50),
            token_s=(1e-4, 2e-4, 1.5e-3, 3e-3),
        )
        for model in small_cluster.profile.steps
    )
    return replace(small_cluster, profile=replace(small_cluster.profile, steps=steps))


def draw_requests(rng: np.random.Generator, number: int, rate_per_s: float) -> list[Request]:
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, number))
    arrival_s[5:8] = arrival_s[5]  # some at one instant
    prompt = np.clip(rng.lognormal(3.5, 1.0, number), 1, 200).astype(int)
    output = np.clip(rng.lognormal(2.5, 1.0, number), 1, 80).astype(int)  # some hit the context
    return [
        Request(f"r{i}", float(arrival_s[i]), int(prompt[i]), int(output[i])) for i in range(number)
    ]


def simulate(
    cluster: ProfiledCluster,
    deployment: Deployment,
    routing: Routing,
    requests: list[Request],
    cuts_s: list[float],
) -> dict[str, RequestOutcome]:
    surrogate = SurrogateCluster(cluster, deployment)
    surrogate.set_routing(routing)
    for request in requests:
        surrogate.submit(request)
    for cut_s in [*sorted(cuts_s), 1e6]:
        surrogate.advance(cut_s)
        surrogate.check_integrity()
    found = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    assert len(found) == len(requests)
    return {outcome.request_id: outcome for outcome in found}


def skewed_routing(deployment: Deployment) -> Routing:
    ids = tuple(r.replica_id for r in deployment.replicas)
    rows = [np.arange(1, len(ids) + 1, dtype=float), np.arange(len(ids), dtype=float)[::-1]]
    rows[1] += 0.0 if len(ids) > 1 else 1.0  # one replica of share zero where there are several
    weights = tuple(tuple((row / row.sum()).tolist()) for row in rows)
    return Routing(ids, weights, (20, 60), ((1.0, 0.0), (0.5, 0.5), (0.1, 0.9)))


@pytest.mark.parametrize(
    "key", ["4xtp1pp1", "1xtp2pp1+2xtp1pp1", "1xtp4pp1", "2xtp1pp2", "1xtp1pp4", "1xtp2pp2"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_batch_scheduler(
    curved_cluster: ProfiledCluster, key: str, weighted: bool
) -> None:
    deployment = dense_deployment(parse_deployment_key(key))
    ids = tuple(r.replica_id for r in deployment.replicas)
    routing = skewed_routing(deployment) if weighted else Routing(ids)
    rng = np.random.default_rng(len(key) + weighted)
    requests = draw_requests(rng, 250, rate_per_s=90.0)
    expected = PlainCluster(curved_cluster, deployment, routing).run(requests)
    outcomes = simulate(curved_cluster, deployment, routing, requests, [0.5, 1.0, 1.37])
    preemptions = 0
    for name, (replica_id, token_times, preempted) in expected.items():
        outcome = outcomes[name]
        gaps = np.diff(token_times)
        assert outcome.replica_id == replica_id
        assert outcome.output_tokens == len(token_times)
        assert outcome.first_token_s == pytest.approx(token_times[0], abs=1e-9)
        assert outcome.finish_s == pytest.approx(token_times[-1], abs=1e-9)
        assert outcome.longest_gap_s == pytest.approx(gaps.max() if len(gaps) else 0.0, abs=1e-9)
        assert outcome.num_preemptions == preempted
        preemptions += preempted
    if key == "4xtp1pp1":
        assert preemptions > 0, "the load must be hard enough to preempt"


@settings(max_examples=40, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 2), st.integers(1, 9)), min_size=1),
    weighted=st.booleans(),
    needed=st.integers(1, 200),
)
def test_pick_equals_the_router(
    loads: list[tuple[int, float, int]], weighted: bool, needed: int
) -> None:
    ids = tuple(range(len(loads)))
    row = tuple(share for _, share, _ in loads)
    routing = Routing(ids, (row,), (), ((1.0,),)) if weighted else Routing(ids)
    blocks = [4 + 3 * (i % 4) for i in ids]
    seen = [ReplicaLoad(i, loads[i][2], loads[i][0], blocks[i] * 16) for i in ids]
    replicas = np.zeros(len(loads), layout.REPLICA)
    replicas["num_outstanding"] = [load[0] for load in loads]
    replicas["num_devices"] = [load[2] for load in loads]
    replicas["num_blocks"], replicas["is_open"] = blocks, 1
    shares = np.array([row if weighted else replicas["num_devices"]], np.float64)
    rows = np.arange(len(loads))
    found = kernel.pick_row(replicas, rows, shares, 16, 0, needed)
    assert found == (-1 if (wanted := pick(routing, seen, 10, needed)) is None else wanted)


def test_cutting_time_changes_nothing(small_cluster: ProfiledCluster) -> None:
    deployment = dense_deployment(parse_deployment_key("1xtp1pp2+2xtp1pp1"))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    rng = np.random.default_rng(3)
    requests = draw_requests(rng, 200, 60.0)
    whole = simulate(small_cluster, deployment, routing, requests, [])
    arrivals = [r.arrival_s for r in requests[::17]]
    cut = simulate(
        small_cluster, deployment, routing, requests, rng.uniform(0, 5, 60).tolist() + arrivals
    )
    assert whole == cut


@pytest.mark.parametrize("leader_computes", [False, True])
@pytest.mark.parametrize("rate_per_s", [8.0, 40.0, 200.0])
@pytest.mark.parametrize("key", ["4xtp1pp1", "1xtp4pp1", "2xtp1pp2", "1xtp1pp4", "1xtp1pp3"])
def test_coasting_and_cruising_change_nothing(
    curved_cluster: ProfiledCluster, key: str, rate_per_s: float, leader_computes: bool
) -> None:
    """To the last bit: a cluster that traces its steps makes every one of them."""
    steps = tuple(replace(s, leader_computes=leader_computes) for s in curved_cluster.profile.steps)
    cluster = replace(curved_cluster, profile=replace(curved_cluster.profile, steps=steps))
    deployment = dense_deployment(parse_deployment_key(key))
    rng = np.random.default_rng(7)
    requests = [
        replace(r, output_tokens=int(n))
        for r, n in zip(draw_requests(rng, 120, rate_per_s), rng.integers(1, 200, 120), strict=True)
    ]
    found, coasted, cruised = [], 0, 0
    for trace_items in (0, 1):
        surrogate = SurrogateCluster(cluster, deployment, trace_items=trace_items)
        for request in requests:
            surrogate.submit(request)
        for cut_s in np.arange(0.37, 60.0, 0.37).tolist():
            surrogate.advance(cut_s)
            surrogate.check_integrity()
            coasted = max(coasted, int(surrogate.state.batches["coasted"].max()))
            cruises = surrogate.state.replicas["cruise"]
            assert not cruises["is_on"].any()
            cruised = max(cruised, int((cruises["step"] * cruises["num_seqs"]).max()))
            found.append(surrogate.snapshot())
        found.append(surrogate.events(0))
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert surrogate.snapshot().num_finished == len(requests)
    is_pipeline = not key.endswith("pp1")
    assert is_pipeline or cruised > 10
    assert not is_pipeline or rate_per_s > 100 or coasted > 1
    if key == "4xtp1pp1" and rate_per_s > 100:
        assert sum(e.outcome.num_preemptions for e in found[-1].events if e.outcome) > 0


def test_one_request_by_hand(small_cluster: ProfiledCluster) -> None:
    """Prompt 100 in chunks of 64 and 36, then 3 decode steps of one token each."""
    deployment = dense_deployment(parse_deployment_key("1xtp1pp1"))
    request = Request("r0", 0.5, 100, 4)
    (outcome,) = simulate(small_cluster, deployment, Routing((0,)), [request], []).values()
    steps = small_cluster.profile.step_model(deployment.replicas[0].parallel)
    first_s = 0.5 + steps.step_s(64, 1, 64) + steps.step_s(36, 1, 100)
    rest = [steps.step_s(1, 1, context) for context in (101, 102, 103)]
    assert outcome.first_token_s == pytest.approx(first_s, abs=1e-12)
    assert outcome.finish_s == pytest.approx(first_s + sum(rest), abs=1e-12)
    assert outcome.longest_gap_s == pytest.approx(rest[-1], abs=1e-12)


def test_pipeline_overlaps_by_hand(small_cluster: ProfiledCluster) -> None:
    """Two single-token requests on pp=2: the second starts one stage after the first."""
    deployment = dense_deployment(parse_deployment_key("1xtp1pp2"))
    requests = [Request("a", 0.0, 1, 1), Request("b", 1e-4, 1, 1)]
    outcomes = simulate(small_cluster, deployment, Routing((0,)), requests, [])
    steps = small_cluster.profile.step_model(deployment.replicas[0].parallel)
    step_s = steps.step_s(1, 1, 1)
    assert outcomes["a"].finish_s == pytest.approx(step_s)
    assert outcomes["b"].finish_s == pytest.approx(step_s * (1 + steps.stage_share))


def test_a_leader_that_computes_sees_an_end_when_its_stage_is_done(
    small_cluster: ProfiledCluster,
) -> None:
    """a takes 1 s from 0; b takes 30 s from when a has left the first stage. So a ends while the
    leader computes, and is known to when b has left it too."""
    shared = 0.6
    steps = tuple(
        StepTimeModel(m.parallel, 0.0, 1.0, 0.0, 0.0, stage_share=shared, leader_computes=True)
        for m in small_cluster.profile.steps
    )
    cluster = replace(small_cluster, profile=replace(small_cluster.profile, steps=steps))
    deployment = dense_deployment(parse_deployment_key("1xtp1pp2"))
    requests = [Request("a", 0.0, 1, 1), Request("b", 1e-4, 30, 1)]
    outcomes = simulate(cluster, deployment, Routing((0,)), requests, [])
    assert outcomes["a"].finish_s == pytest.approx(shared + 30 * shared)
    assert outcomes["b"].finish_s == pytest.approx(shared + 30)


def test_routing_tables_are_the_routers_shares(small_cluster: ProfiledCluster) -> None:
    """To the last bit, per bucket, with replicas named in another order than the deployment's."""
    surrogate = SurrogateCluster(
        small_cluster, deployment := dense_deployment(parse_deployment_key("2xtp1pp1+1xtp2pp1"))
    )
    rng = np.random.default_rng(0)
    weights, posterior = rng.dirichlet([1.0] * 3, 4), rng.dirichlet([1.0] * 4, 3)
    routing = Routing(
        tuple(r.replica_id for r in reversed(deployment.replicas)),
        tuple(map(tuple, weights.tolist())),
        (10, 20),
        tuple(map(tuple, posterior.tolist())),
    )
    surrogate.set_routing(routing)
    loads = [ReplicaLoad(r.replica_id, r.parallel.num_devices, 0, 0) for r in deployment.replicas]
    wanted = [shares(routing, loads, prompt) for prompt in (10, 20, 21)]
    assert surrogate.rows.shares.tolist() == wanted
