"""Devices that are lost and come back, and switches that fail, on the surrogate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.cluster import (
    HEAL_TIMEOUT_S,
    EventKind,
    KvCostParams,
    Request,
    RequestOutcome,
    RequestStatus,
    SwitchPhase,
    SwitchPlan,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError, SwitchInProgressError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from engine.shards import rank_weight_bytes
from envs.experiment import build_env, build_experiment
from envs.experiment_config import read_config
from envs.scenarios import DeviceFailure, FailureDrivable
from envs.surrogate.cluster import SurrogateCluster

ROOT = Path(__file__).parents[2]
KV = KvCostParams(1e15, 1.0, 0.01)


def build(
    cluster: ProfiledCluster, key: str, *failures: DeviceFailure, **options: float
) -> SurrogateCluster:
    surrogate = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)), **options)  # type: ignore[arg-type]
    surrogate.schedule_failures(failures)
    return surrogate


def submit(surrogate: SurrogateCluster, number: int, gap_s: float, from_s: float = 0.0) -> None:
    for i in range(number):
        surrogate.submit(Request(f"{from_s}-{i}", from_s + (i + 1) * gap_s, 60, 40))


def plan_for(surrogate: SurrogateCluster, key: str) -> SwitchPlan:
    seen = surrogate.snapshot()
    return plan_switch(
        surrogate.spec,
        seen.deployment,
        seen.epoch,
        parse_deployment_key(key),
        KV,
        dead_devices=seen.dead_devices,
    )


def outcomes_of(surrogate: SurrogateCluster) -> list[RequestOutcome]:
    return [e.outcome for e in surrogate.events(0).events if e.outcome is not None]


def load_seconds(cluster: ProfiledCluster, key: str) -> float:
    most = max(
        rank_weight_bytes(cluster.spec.model, parallel, rank)
        for parallel in parse_deployment_key(key)
        for rank in range(parallel.num_devices)
    )
    return cluster.profile.switch_overhead_s + most / cluster.profile.link_bytes_per_s


def test_requests_of_a_lost_replica_start_over_elsewhere(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster, "4xtp1pp1", DeviceFailure(0.1, 2, 5.0))
    assert isinstance(surrogate, FailureDrivable)
    submit(surrogate, 8, 1e-3)
    surrogate.advance(0.1)
    before = surrogate.snapshot()
    assert (before.epoch, before.dead_devices) == (0, ())  # it is lost just after that instant
    surrogate.advance(0.11)
    surrogate.check_integrity()
    seen = surrogate.snapshot()
    assert (seen.epoch, seen.dead_devices, seen.deployment.key) == (1, (2,), "3xtp1pp1")
    assert seen.routing.replica_ids == (0, 1, 3)
    assert sum(r.num_running + r.num_waiting for r in seen.replicas) == 8
    surrogate.advance(60.0)
    outcomes = outcomes_of(surrogate)
    assert [o.output_tokens for o in outcomes] == [40] * 8
    moved = [o for o in outcomes if o.num_moves]
    assert len(moved) == before.replicas[2].num_running == 2
    for outcome in moved:  # what it had said before stays said
        assert outcome.first_token_s is not None
        assert outcome.first_token_s < 0.1
        assert outcome.replica_id in (0, 1, 3)
    told = [(e.kind, e.at_s, e.device) for e in surrogate.events(0).events if e.device is not None]
    assert told == [(EventKind.DEVICE_LOST, 0.1, 2), (EventKind.DEVICE_JOINED, 5.0, 2)]
    assert surrogate.snapshot().deployment.key == "3xtp1pp1"  # what to do is the controller's


def test_dead_devices_may_not_be_used_until_they_are_back(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster, "1xtp1pp1", DeviceFailure(1.0, 3, 4.0))
    wide = plan_for(surrogate, "4xtp1pp1")
    surrogate.advance(2.0)
    with pytest.raises(InfeasibleError, match=r"devices \[3\], which are dead"):
        surrogate.apply(wide)
    surrogate.advance(5.0)
    surrogate.apply(wide)
    surrogate.advance(20.0)
    assert surrogate.snapshot().deployment.key == "4xtp1pp1"


@pytest.mark.parametrize(
    ("device", "phase", "reason", "left"),
    [
        (1, SwitchPhase.ROLLED_BACK, "worker 1 is lost", "1xtp1pp1"),
        (2, SwitchPhase.ROLLED_BACK, "worker 2 is lost", "2xtp1pp1"),
        (3, SwitchPhase.CANCELLED, "cancelled on request", "2xtp1pp1"),
    ],
)
@pytest.mark.parametrize("at_s", np.linspace(0.51, 1.1, 7).tolist())
def test_a_loss_ends_the_running_switch(
    small_cluster: ProfiledCluster,
    device: int,
    phase: SwitchPhase,
    reason: str,
    left: str,
    at_s: float,
) -> None:
    """In each of its phases."""
    slow = replace(small_cluster.profile, switch_overhead_s=0.4, pause_overhead_s=0.4)
    cluster = replace(small_cluster, profile=slow)
    surrogate = build(cluster, "2xtp1pp1", DeviceFailure(at_s, device, 90.0))
    submit(surrogate, 12, 0.08)
    surrogate.advance(0.5)
    plan = plan_for(surrogate, "1xtp2pp1+1xtp1pp1")
    assert plan.target.devices == {0, 1, 2}
    surrogate.apply(plan)
    surrogate.advance(1.2)
    surrogate.check_integrity()
    ticket = surrogate.snapshot().switch
    assert ticket is not None
    assert (ticket.phase, ticket.reason, ticket.updated_s) == (phase, reason, at_s)
    assert surrogate.snapshot().deployment.key == left
    surrogate.advance(60.0)
    surrogate.check_integrity()
    assert [o.status for o in outcomes_of(surrogate)] == [RequestStatus.FINISHED] * 12


def test_an_engine_without_replicas_loads_them_again(small_cluster: ProfiledCluster) -> None:
    """What it had waits, what comes is refused."""
    surrogate = build(small_cluster, "1xtp4pp1", DeviceFailure(0.2, 1, 20.0))
    submit(surrogate, 6, 1e-3)
    submit(surrogate, 3, 1.0, from_s=5.0)
    surrogate.advance(19.0)
    surrogate.check_integrity()
    seen = surrogate.snapshot()
    assert (seen.deployment.replicas, seen.epoch, seen.num_queued_unrouted) == ((), 1, 6)
    assert (seen.num_arrived, seen.num_rejected) == (9, 3)
    loaded_s = 20.0 + load_seconds(small_cluster, "1xtp4pp1")
    surrogate.advance(loaded_s)
    assert surrogate.snapshot().num_queued_unrouted == 6
    with pytest.raises(SwitchInProgressError, match="1xtp4pp1 is being loaded"):
        surrogate.apply(plan_for(surrogate, "4xtp1pp1"))
    surrogate.advance(loaded_s + 1e-6)
    seen = surrogate.snapshot()
    assert (seen.deployment.key, seen.epoch, seen.num_queued_unrouted) == ("1xtp4pp1", 2, 0)
    surrogate.advance(60.0)
    done = [o for o in outcomes_of(surrogate) if o.status is RequestStatus.FINISHED]
    assert [(o.num_moves, o.output_tokens) for o in done] == [(1, 40)] * 6
    assert min(o.longest_gap_s for o in done) > 19.0


@pytest.mark.parametrize("columns", [False, True])
def test_past_the_deadline_what_waits_fails(small_cluster: ProfiledCluster, columns: bool) -> None:
    surrogate = build(small_cluster, "1xtp4pp1", DeviceFailure(0.2, 1, 100.0), columns=columns)
    if columns:
        surrogate.submit_columns(np.full(6, 0.01), np.full(6, 60), np.full(6, 40))
    else:
        submit(surrogate, 6, 1e-3)
    surrogate.advance(0.2 + HEAL_TIMEOUT_S)
    assert surrogate.snapshot().num_queued_unrouted == 6
    surrogate.advance(99.0)
    surrogate.check_integrity()
    assert surrogate.snapshot().num_queued_unrouted == 0
    if columns:
        ended = surrogate.take_columns()
        assert ended.finished.tolist() == [False] * 6
        assert ended.finish_s.tolist() == [0.2 + HEAL_TIMEOUT_S] * 6
    else:
        ends = [(o.status, o.finish_s, o.replica_id) for o in outcomes_of(surrogate)]
        assert ends == [(RequestStatus.FAILED, 0.2 + HEAL_TIMEOUT_S, None)] * 6
    surrogate.advance(110.0)
    assert surrogate.snapshot().deployment.key == "1xtp4pp1"


def test_past_the_deadline_part_of_it_is_loaded(small_cluster: ProfiledCluster) -> None:
    losses = DeviceFailure(1.0, 0, 5.0), DeviceFailure(2.0, 2, 300.0)
    surrogate = build(small_cluster, "2xtp2pp1", *losses)
    surrogate.advance(2.0 + HEAL_TIMEOUT_S)
    assert surrogate.snapshot().deployment.replicas == ()
    surrogate.advance(2.1 + HEAL_TIMEOUT_S + load_seconds(small_cluster, "1xtp2pp1"))
    (replica,) = surrogate.snapshot().deployment.replicas
    assert replica.placement.devices == (0, 1)


def test_a_controller_may_be_faster_than_healing(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster, "1xtp4pp1", DeviceFailure(0.2, 1, 50.0))
    submit(surrogate, 6, 1e-3)
    surrogate.advance(1.0)
    surrogate.apply(plan_for(surrogate, "3xtp1pp1"))
    surrogate.advance(40.0)
    surrogate.check_integrity()
    assert surrogate.snapshot().num_finished == 6
    surrogate.advance(120.0)
    assert surrogate.snapshot().deployment.key == "3xtp1pp1"


def test_cutting_time_and_forking_change_nothing(small_cluster: ProfiledCluster) -> None:
    losses = [DeviceFailure(0.2 + i, i % 4, 0.9 + i) for i in range(4)]

    def run(cuts_s: list[float], fork: bool) -> SurrogateCluster:
        surrogate = build(small_cluster, "2xtp1pp1+1xtp2pp1", *losses)
        submit(surrogate, 60, 0.03)
        for cut_s in [*cuts_s, 200.0]:
            surrogate.advance(cut_s)
            surrogate = surrogate.fork() if fork else surrogate
        return surrogate

    whole = run([], False)
    cuts_s = sorted([*np.random.default_rng(0).uniform(0, 5, 50).tolist(), 0.2, 0.9, 1.2])
    for fork in (False, True):
        cut = run(cuts_s, fork)
        assert cut.events(0) == whole.events(0)
        assert cut.snapshot() == whole.snapshot()


def test_a_simulator_knows_no_failure_to_come(small_cluster: ProfiledCluster) -> None:
    surrogate = build(small_cluster, "4xtp1pp1", DeviceFailure(1.0, 0, 9.0))
    other = surrogate.fork(lambda prompt, output: output + 1)
    other.advance(20.0)
    assert other.snapshot().dead_devices == ()
    oracle = surrogate.fork()
    oracle.advance(2.0)
    assert oracle.snapshot().dead_devices == (0,)


# ---------------------------------------------------------------- switches that fail


def test_a_switch_that_fails_spends_its_time(small_cluster: ProfiledCluster) -> None:
    ends = {}
    for probability in (0.0, 1.0):
        surrogate = build(small_cluster, "4xtp1pp1", rollback_probability=probability)
        submit(surrogate, 12, 0.02)
        surrogate.advance(0.1)
        surrogate.apply(plan_for(surrogate, "2xtp2pp1"))
        surrogate.advance(60.0)
        surrogate.check_integrity()
        ticket = surrogate.snapshot().switch
        assert ticket is not None
        ends[ticket.phase] = (ticket.updated_s, ticket.pause_s)
        assert surrogate.snapshot().num_finished == 12
        moves = {o.num_moves for o in outcomes_of(surrogate)}
    (failed_s, failed_pause_s), (done_s, pause_s) = (
        ends[SwitchPhase.ROLLED_BACK],
        ends[SwitchPhase.DONE],
    )
    assert 0.1 < failed_s < done_s
    assert failed_pause_s == 0.0 < small_cluster.profile.pause_overhead_s < pause_s
    assert "failed as drawn" in ticket.reason
    assert (surrogate.snapshot().deployment.key, surrogate.snapshot().epoch) == ("4xtp1pp1", 0)
    assert moves == {0}


# ---------------------------------------------------------------- an episode


def test_an_episode_of_the_published_ranges_with_failures() -> None:
    """Far more of them than published; a random policy goes through all of it."""
    path = ROOT / "configs" / "scenarios.yaml"
    published = read_config(path, {}).scenario
    assert published is not None
    assert published.failure_gap_s[0] > 0
    options = {"env.episode_s": 1800.0, "scenario.failure_gap_s": [60.0, 90.0]}
    env = build_env(build_experiment(read_config(path, options)))

    def run(seed: int) -> tuple[list[float], set[int], int]:
        env.reset(seed=seed)
        rng, over, rewards, dead, none_left = np.random.default_rng(seed), False, [], set(), 0
        while not over:
            legal = np.flatnonzero(env.action_masks())
            _, reward, _, over, _ = env.step(int(rng.choice(legal)))
            rewards.append(reward)
            assert isinstance(env.cluster, SurrogateCluster)
            env.cluster.check_integrity()
            snapshot = env.cluster.snapshot()
            dead |= set(snapshot.dead_devices)
            none_left += not snapshot.deployment.replicas
            assert not snapshot.deployment.devices & set(snapshot.dead_devices)
        return rewards, dead, none_left

    runs = [run(seed) for seed in range(3)]
    assert runs[0] == run(0)
    assert set.union(*(dead for _, dead, _ in runs)) == {0, 1, 2, 3}
    assert sum(none_left for _, _, none_left in runs) > 0
