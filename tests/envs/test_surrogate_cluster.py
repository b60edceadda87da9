"""Switches, forks, queue limits and randomisation of the surrogate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.cluster import (
    EventKind,
    KvCostParams,
    Request,
    RequestStatus,
    SwitchPhase,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.plan import link_seconds, plan_switch
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster

MIGRATE = KvCostParams(1e15, 1.0, 0.01)  # moving is free, computing dear
RECOMPUTE = KvCostParams(1.0, 1e15, 0.01)
KEYS = ("2xtp2pp1", "1xtp1pp4", "1xtp2pp1+2xtp1pp1", "1xtp2pp2", "4xtp1pp1", "1xtp1pp3+1xtp1pp1")


def build(cluster: ProfiledCluster, key: str = "4xtp1pp1", **options: float) -> SurrogateCluster:
    return SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)), **options)


def submit(surrogate: SurrogateCluster, lengths: list[tuple[int, int]], rate_per_s: float) -> None:
    start_s = surrogate.snapshot().now_s
    for i, (prompt, output) in enumerate(lengths):
        name = f"{start_s:.3f}-{i}"
        surrogate.submit(Request(name, start_s + i / rate_per_s, prompt, output))


def switch(surrogate: SurrogateCluster, key: str, kv: KvCostParams = MIGRATE) -> str:
    snapshot, target = surrogate.snapshot(), parse_deployment_key(key)
    plan = plan_switch(surrogate.spec, snapshot.deployment, snapshot.epoch, target, kv, 0.2)
    return surrogate.apply(plan).ticket_id


def test_switch_times_by_hand(small_cluster: ProfiledCluster) -> None:
    """Idle cluster: overhead, then the busiest port, then the bare pause."""
    surrogate, profile = build(small_cluster), small_cluster.profile
    surrogate.advance(3.0)
    snapshot, target = surrogate.snapshot(), parse_deployment_key("1xtp1pp4")
    plan = plan_switch(surrogate.spec, snapshot.deployment, 0, target, MIGRATE)
    ticket_id = surrogate.apply(plan).ticket_id
    weights_s = 3.0 + profile.switch_overhead_s
    weights_s += link_seconds(plan.transfers, profile.link_bytes_per_s)
    surrogate.advance(weights_s + profile.pause_overhead_s - 1e-6)
    assert surrogate.ticket(ticket_id).phase is SwitchPhase.TRANSFER
    assert surrogate.snapshot().epoch == 0
    surrogate.advance(weights_s + profile.pause_overhead_s + 1e-6)
    done = surrogate.ticket(ticket_id)
    assert done.phase is SwitchPhase.DONE
    assert done.updated_s == pytest.approx(weights_s + profile.pause_overhead_s)
    assert done.pause_s == pytest.approx(profile.pause_overhead_s)
    assert sum(s for _, s in done.phase_s) == pytest.approx(done.duration_s)
    assert surrogate.snapshot().epoch == 1


@pytest.mark.parametrize(("kv", "migrates"), [(MIGRATE, True), (RECOMPUTE, False)])
def test_running_sequences_are_bound_by_cost(
    small_cluster: ProfiledCluster, kv: KvCostParams, migrates: bool
) -> None:
    surrogate, model = build(small_cluster), small_cluster.spec.model
    submit(surrogate, [(40, 200)] * 4, 1e4)
    surrogate.advance(0.1)
    ticket_id = switch(surrogate, "2xtp2pp1", kv)
    surrogate.advance(60.0)
    done = surrogate.ticket(ticket_id)
    assert (done.num_migrated, done.num_recomputed) == ((4, 0) if migrates else (0, 4))
    outcomes = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    assert [o.num_moves for o in outcomes] == [1] * 4
    per_token = model.kv_bytes_per_token(model.num_layers, model.num_kv_heads)
    assert done.kv_bytes % per_token == 0
    assert (done.kv_bytes >= 4 * 40 * per_token) == migrates
    gaps = [o.longest_gap_s for o in outcomes]
    assert min(gaps) > small_cluster.profile.pause_overhead_s


def test_replicas_that_stay_are_never_paused(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster)
    submit(surrogate, [(20, 200)] * 4, 1e4)
    surrogate.advance(0.1)
    switch(surrogate, "1xtp2pp1+2xtp1pp1")
    surrogate.advance(60.0)
    outcomes = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    assert sorted(o.num_moves for o in outcomes) == [0, 0, 1, 1]
    for outcome in outcomes:
        paused = outcome.longest_gap_s > small_cluster.profile.pause_overhead_s
        assert paused == (outcome.num_moves == 1)


def test_many_switches_under_overload_lose_nothing(small_cluster: ProfiledCluster) -> None:
    rng, surrogate = np.random.default_rng(0), build(small_cluster)
    total = 0
    for i in range(24):
        number = int(rng.integers(0, 200))
        lengths = zip(rng.integers(1, 220, number), rng.integers(1, 60, number), strict=True)
        submit(surrogate, [(int(p), int(o)) for p, o in lengths], 150.0)
        total += number
        if not surrogate.snapshot().switch_in_flight:
            kv = MIGRATE if rng.random() < 0.7 else RECOMPUTE
            ticket_id = switch(surrogate, KEYS[i % len(KEYS)], kv)
        for part in range(8):
            surrogate.advance(surrogate.snapshot().now_s + float(rng.uniform(0.0, 0.2)))
            surrogate.check_integrity()
            if i % 3 == 2 and part == i // 3 % 4:  # in every phase of a switch sooner or later
                surrogate.cancel(ticket_id)
                surrogate.check_integrity()
        surrogate.advance(max(surrogate.snapshot().now_s, 1.4 * (i + 1)))
    surrogate.advance(1e4)
    surrogate.check_integrity()
    events = surrogate.events(0).events
    ended = [e.outcome for e in events if e.outcome is not None]
    assert len({o.request_id for o in ended}) == len(ended) == total
    assert {o.status for o in ended} == {RequestStatus.FINISHED}
    assert [e.at_s for e in events] == sorted(e.at_s for e in events)
    phases = {e.ticket.phase for e in events if e.kind is EventKind.SWITCH and e.ticket}
    assert {SwitchPhase.DONE, SwitchPhase.CANCELLED} <= phases


def test_full_switch_holds_arrivals_back(small_cluster: ProfiledCluster) -> None:
    """Every replica leaves, so what arrives in the pause waits, and is served after it."""
    slow = replace(small_cluster, profile=replace(small_cluster.profile, pause_overhead_s=5.0))
    surrogate = build(slow)
    switch(surrogate, "1xtp4pp1")
    surrogate.advance(1.0)
    submit(surrogate, [(10, 2)] * 3, 1e3)
    surrogate.advance(2.0)
    assert surrogate.snapshot().num_queued_unrouted == 3
    surrogate.check_integrity()
    surrogate.advance(30.0)
    assert surrogate.snapshot().num_finished == 3


def test_cancelling_wakes_a_replica_that_had_no_blocks_left(
    small_cluster: ProfiledCluster,
) -> None:
    """Three sequences of 13 blocks each reserve 39 of the 40 blocks of the one replica that
    stays; its own sequence cannot grow past its first block until the switch is cancelled."""
    slow = replace(small_cluster, profile=replace(small_cluster.profile, pause_overhead_s=5.0))
    surrogate = build(slow)
    ticket_id = switch(surrogate, "1xtp1pp1")
    submit(surrogate, [(5, 15), (170, 60), (170, 60), (170, 60)], 1e9)  # the first goes soon
    surrogate.submit(Request("stays", 0.19, 10, 30))
    surrogate.advance(2.0)
    stats = surrogate.snapshot().replicas[0]
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 1, 39)
    surrogate.cancel(ticket_id)
    surrogate.check_integrity()
    surrogate.advance(30.0)
    assert surrogate.snapshot().num_finished == 5


def test_fork_goes_its_own_way(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster)
    submit(surrogate, [(50, 30)] * 40, 80.0)
    surrogate.advance(0.3)
    switch(surrogate, "2xtp2pp1")
    surrogate.advance(0.42)
    twin, other = surrogate.fork(), surrogate.fork()
    other.submit(Request("extra", 0.5, 200, 40))
    for fork in (twin, other):
        fork.advance(20.0)
        fork.check_integrity()
    assert surrogate.snapshot().now_s == 0.42
    assert surrogate.snapshot().switch_in_flight
    surrogate.advance(20.0)
    assert surrogate.events(0) == twin.events(0)
    assert surrogate.snapshot() == twin.snapshot()
    assert other.snapshot().num_finished == 41


def test_full_queue_rejects(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster, max_queue=5)
    submit(surrogate, [(10, 10)] * 8, 1e5)
    surrogate.advance(30.0)
    outcomes = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    statuses = [o.status for o in outcomes]
    assert statuses.count(RequestStatus.REJECTED) == 3
    assert statuses.count(RequestStatus.FINISHED) == 5
    assert surrogate.snapshot().num_rejected == 3


def test_spread_is_seeded_and_off_by_default(small_cluster: ProfiledCluster) -> None:
    def finish_s(seed: int, spread: float) -> float:
        surrogate = build(small_cluster, seed=seed, spread=spread)
        submit(surrogate, [(50, 30)], 1.0)
        surrogate.advance(10.0)
        return next(e.outcome.finish_s for e in surrogate.events(0).events if e.outcome)

    assert finish_s(1, 0.0) == finish_s(2, 0.0)
    assert finish_s(1, 0.2) == finish_s(1, 0.2)
    assert finish_s(1, 0.2) != finish_s(2, 0.2)


def test_impossible_starts_are_refused(small_cluster: ProfiledCluster) -> None:
    with pytest.raises(InfeasibleError):
        build(small_cluster, "5xtp1pp1")
    tight = replace(small_cluster, spec=replace(small_cluster.spec, device_memory_bytes=10_000))
    with pytest.raises(InfeasibleError):
        build(tight)
    unprofiled = replace(
        small_cluster, profile=replace(small_cluster.profile, steps=small_cluster.profile.steps[1:])
    )
    with pytest.raises(InvalidRequestError):
        build(unprofiled)


def test_single_server_queue_matches_theory(small_cluster: ProfiledCluster) -> None:
    """One sequence at a time, one-token requests: an M/D/1 queue. Each wait is Lindley's
    w' = max(0, w + s - gap); their mean is rho s / (2 (1 - rho)) (Pollaczek-Khinchine), within
    four standard errors, from 40 batch means."""
    spec = replace(small_cluster.spec, max_num_seqs=1)
    surrogate = build(ProfiledCluster(spec, small_cluster.profile), "1xtp1pp1")
    parallel = parse_deployment_key("1xtp1pp1")[0]
    service_s = small_cluster.profile.step_model(parallel).step_s(20, 1, 20)
    rho, number = 0.7, 40_000
    gaps = np.random.default_rng(5).exponential(service_s / rho, number)
    for i, arrival_s in enumerate(np.cumsum(gaps).tolist()):
        surrogate.submit(Request(f"r{i}", arrival_s, 20, 1))
    surrogate.advance(1e5)
    outcomes = [e.outcome for e in surrogate.events(0).events if e.outcome]
    waits_s = np.array([o.finish_s - o.arrival_s for o in outcomes]) - service_s
    walk = np.concatenate([[0.0], np.cumsum(service_s - gaps[1:])])
    np.testing.assert_allclose(waits_s, walk - np.minimum.accumulate(walk), atol=1e-8)
    expected_s = rho * service_s / (2 * (1 - rho))
    error_s = waits_s.reshape(40, -1).mean(1).std(ddof=1) / np.sqrt(40)
    assert abs(waits_s.mean() - expected_s) < 4 * error_s < 0.25 * expected_s
