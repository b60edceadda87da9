"""What must hold of any simulation: conservation, Little's law, limits with a closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import (
    Binding,
    KvCostParams,
    ParallelConfig,
    Request,
    RequestStatus,
    SwitchMode,
    SwitchPhase,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.plan import plan_switch
from engine.profile import Crowding, ProfiledCluster
from envs.scenarios import DeviceFailure
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.latency import linear_profile

KEYS = ("2xtp2pp1", "1xtp1pp4", "1xtp2pp1+2xtp1pp1", "4xtp1pp1", "1xtp1pp3+1xtp1pp1")


CROWDING = Crowding(((1.5, 1.0), (2.0, 1.1), (3.0, 2.5)), ((1.0, 1.0), (2.0, 1.3)))
COSTS = {  # what becomes of a sequence whose replica goes, unless nothing of it is computed
    Binding.MIGRATE: KvCostParams(1e15, 1.0, 0.01),
    Binding.RECOMPUTE: KvCostParams(1.0, 1e15, 0.01),
    Binding.DRAIN: KvCostParams(1.0, 1.0, 0.004),
}


def start_switch(
    surrogate: SurrogateCluster, key: str, kv: KvCostParams, mode: SwitchMode = SwitchMode.LIVE
) -> str:
    state, target = surrogate.snapshot(), parse_deployment_key(key)
    plan = plan_switch(surrogate.spec, state.deployment, state.epoch, target, kv, 0.2)
    return surrogate.apply(replace(plan, mode=mode)).ticket_id


def test_work_conservation_and_littles_law(small_cluster: ProfiledCluster) -> None:
    """A replica (pp=1) that holds a sequence has a step in flight, and one without has none; and
    the time integral of the number in the system is the sum of the sojourn times."""
    deployment = dense_deployment(parse_deployment_key("2xtp1pp1+1xtp2pp1"))
    surrogate = SurrogateCluster(small_cluster, deployment, trace_items=100_000)
    rng = np.random.default_rng(2)
    arrival_s = np.cumsum(rng.exponential(0.03, 300))
    for i, at_s in enumerate(arrival_s.tolist()):
        surrogate.submit(Request(f"r{i}", at_s, *rng.integers(1, 90, 2).tolist()))
    surrogate.advance(1e4)
    ends = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    trace = surrogate.trace()
    busy_s = held_s = 0.0
    for row, replica in enumerate(deployment.replicas):
        steps = np.unique(trace[trace["row"] == row][["start_s", "end_s"]])
        assert (steps["start_s"][1:] >= steps["end_s"][:-1]).all(), "pp=1: one step at a time"
        busy_s += float((steps["end_s"] - steps["start_s"]).sum())
        mine = sorted((o.arrival_s, o.finish_s) for o in ends if o.replica_id == replica.replica_id)
        until_s = 0.0
        for start_s, end_s in mine:  # length of the union of the stays
            held_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
    assert busy_s == pytest.approx(held_s, rel=1e-9)
    changes = [(e.at_s, 1 if e.arrival else -1) for e in surrogate.events(0).events]
    times, steps = np.array([t for t, _ in changes]), np.array([s for _, s in changes])
    area = float((np.cumsum(steps)[:-1] * np.diff(times)).sum())
    assert area == pytest.approx(sum(o.finish_s - o.arrival_s for o in ends), rel=1e-9)


@pytest.mark.parametrize(
    ("lengths", "chances"), [((60,), (1.0,)), ((10, 240), (0.8, 0.2))], ids=["equal", "two kinds"]
)
def test_large_batches_share_the_processor(
    small_cluster: ProfiledCluster, lengths: tuple[int, ...], chances: tuple[float, ...]
) -> None:
    """A step costs a constant per sequence and nothing else: M/G/1 processor sharing in steps of a
    token. Mean response is E[S] / (1 - rho) whatever the distribution of S; within four standard
    errors (from 40 batch means) and two tokens of the mean length, the grain of the steps."""
    one, rho, number, per_seq_s = ParallelConfig(1, 1), 0.6, 40_000, 1e-3
    spec = replace(
        small_cluster.spec,
        max_num_seqs=512,
        max_num_batched_tokens=512,
        device_memory_bytes=2_000_000_000,
    )
    profile = linear_profile([one], 0.0, 0.0, per_seq_s)
    surrogate = SurrogateCluster(
        ProfiledCluster(spec, profile), dense_deployment([one]), columns=True
    )
    rng = np.random.default_rng(8)
    mean_tokens = float(np.dot(lengths, chances))
    service_s = mean_tokens * per_seq_s
    arrival_s = np.cumsum(rng.exponential(service_s / rho, number))
    tokens = rng.choice(lengths, number, p=chances)
    surrogate.submit_columns(arrival_s, np.ones(number, np.int64), tokens)
    surrogate.advance(arrival_s[-1] + 1e3)
    ended = surrogate.take_columns()
    assert len(ended.finish_s) == number
    response_s = (ended.finish_s - ended.ended_arrival_s)[np.argsort(ended.index)]
    means = response_s.reshape(40, -1).mean(1)
    tolerance = 4 * means.std(ddof=1) / np.sqrt(40) + 2 * service_s / mean_tokens
    assert abs(response_s.mean() - service_s / (1 - rho)) < tolerance
    assert tolerance < 0.25 * service_s / (1 - rho), "the run is long enough to tell"


def test_switches_roll_back_with_the_probability(small_cluster: ProfiledCluster) -> None:
    """Within three standard deviations; the old deployment serves on, and forks draw the same."""
    kv, number = KvCostParams(1e9, 1e4, 0.01), 300
    surrogate = SurrogateCluster(
        small_cluster, dense_deployment([ParallelConfig(1, 1)] * 4), rollback_probability=0.3
    )
    phases, keys = [], ("2xtp2pp1", "4xtp1pp1")
    for i in range(number):
        before = surrogate.snapshot().deployment
        ticket_id = start_switch(surrogate, keys[before.key == keys[0]], kv)
        twin = surrogate.fork()
        for cluster in (surrogate, twin):
            cluster.advance(10.0 * (i + 1))
        ticket = surrogate.ticket(ticket_id)
        assert ticket == twin.ticket(ticket_id)
        phases.append(ticket.phase)
        if ticket.phase is SwitchPhase.ROLLED_BACK:
            assert surrogate.snapshot().deployment == before
            assert "failed as drawn" in ticket.reason
            assert ticket.duration_s > 0
    failed = phases.count(SwitchPhase.ROLLED_BACK)
    assert phases.count(SwitchPhase.DONE) == number - failed
    assert abs(failed - 0.3 * number) < 3 * np.sqrt(number * 0.3 * 0.7)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    first=st.sampled_from(KEYS),
    switches=st.lists(
        st.tuples(
            st.floats(0, 3),
            st.sampled_from(KEYS),
            st.sampled_from(Binding),
            st.sampled_from(SwitchMode),
            st.booleans(),
        ),
        max_size=6,
    ),
    headroom_bytes=st.sampled_from([None, 0, 1_000_000]),
    link_bytes_per_s=st.sampled_from([2e8, 1e7]),
    crowding=st.sampled_from([Crowding(), CROWDING]),
    losses=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 3), st.floats(0.01, 3)), max_size=3),
)
def test_nothing_is_lost(
    small_cluster: ProfiledCluster,
    seed: int,
    first: str,
    switches: list[tuple[float, str, Binding, SwitchMode, bool]],
    headroom_bytes: int | None,
    link_bytes_per_s: float,
    crowding: Crowding,
    losses: list[tuple[float, int, float]],
) -> None:
    """Under switches at any instant, live or in place, with memory for both generations or not,
    cancelled or rolled back or not, and devices that are lost and come back: every request ends
    once, refused only where no replica was there, else with the tokens that it was to make, counted
    once each in the steps that made them."""
    rng = np.random.default_rng(seed)
    steps = tuple(
        replace(s, busy_cores=1.0, crowding_exponent=1.2) for s in small_cluster.profile.steps
    )
    profile = replace(
        small_cluster.profile, crowding=crowding, steps=steps, link_bytes_per_s=link_bytes_per_s
    )
    surrogate = SurrogateCluster(
        ProfiledCluster(replace(small_cluster.spec, switch_headroom_bytes=headroom_bytes), profile),
        dense_deployment(parse_deployment_key(first)),
        seed=seed,
        rollback_probability=0.3,
        trace_items=200_000,
    )
    surrogate.schedule_failures([DeviceFailure(at, d, at + gone) for at, d, gone in losses])
    wanted = {}
    for i, at_s in enumerate(np.cumsum(rng.exponential(0.015, 150)).tolist()):
        prompt, output = int(rng.integers(1, 190)), int(rng.integers(1, 60))
        surrogate.submit(Request(f"r{i}", at_s, prompt, output))
        wanted[f"r{i}"] = (prompt, output)
    for at_s, key, binding, mode, cancels in sorted(switches):
        surrogate.advance(max(at_s, surrogate.snapshot().now_s))
        surrogate.check_integrity()
        now = surrogate.snapshot()
        if not now.switch_in_flight and not now.dead_devices and now.deployment.replicas:
            ticket_id = start_switch(surrogate, key, COSTS[binding], mode)
            for _ in range(4):
                surrogate.advance(surrogate.snapshot().now_s + float(rng.uniform(0, 0.15)))
                surrogate.check_integrity()
            if cancels:
                surrogate.cancel(ticket_id)
                surrogate.check_integrity()
    surrogate.advance(1e4)
    surrogate.check_integrity()
    ends = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    assert sorted(o.request_id for o in ends) == sorted(wanted)
    refused = [o for o in ends if o.status is RequestStatus.REJECTED]
    assert losses or not refused
    ends = [o for o in ends if o not in refused]
    assert {o.status for o in ends} <= {RequestStatus.FINISHED}
    trace = surrogate.trace()
    last = np.zeros(len(wanted), np.int64)
    np.maximum.at(last, trace["index"], trace["start"] + trace["tokens"])
    for outcome in ends:
        prompt, output = wanted[outcome.request_id]
        assert outcome.output_tokens == min(output, small_cluster.spec.model.max_model_len - prompt)
        index = int(outcome.request_id[1:])
        assert last[index] == prompt + outcome.output_tokens - 1, "the last token is never an input"
