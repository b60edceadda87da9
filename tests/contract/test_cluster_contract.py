"""What every `Cluster` promises, whoever implements it. Time may be simulated or real."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from engine.cluster import (
    Cluster,
    ClusterEvent,
    Deployment,
    Drivable,
    EventKind,
    KvCostParams,
    ParallelConfig,
    Request,
    RequestOutcome,
    RequestStatus,
    Routing,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import (
    InfeasibleError,
    NotFoundError,
    StaleEpochError,
    SwitchInProgressError,
)
from engine.migration.plan import plan_switch

LIMIT_S = 60.0  # on the cluster's clock
SLICE_S = 0.1
KV = KvCostParams(link_bytes_per_s=1e9, prefill_tokens_per_s=5e3, decode_step_s=0.01)
_numbers = itertools.count()


def wait_until(cluster: Drivable, condition: Callable[[], bool]) -> None:
    deadline_s = cluster.snapshot().now_s + LIMIT_S
    while not condition():
        now_s = cluster.snapshot().now_s
        assert now_s < deadline_s, f"not within {LIMIT_S} s"
        cluster.advance(now_s + SLICE_S)


def submit(
    cluster: Drivable, lengths: Sequence[tuple[int, int]], spacing_s: float = 0.0
) -> list[Request]:
    start_s = cluster.snapshot().now_s + 0.01
    requests = [
        Request(f"c{next(_numbers)}", start_s + i * spacing_s, prompt, output)
        for i, (prompt, output) in enumerate(lengths)
    ]
    for request in requests:
        cluster.submit(request)
    return requests


def end_of_log(cluster: Cluster) -> int:
    return cluster.events(0).next_cursor


def outcomes_since(cluster: Cluster, cursor: int) -> list[RequestOutcome]:
    return [e.outcome for e in cluster.events(cursor).events if e.outcome is not None]


def run_to_end(cluster: Drivable, cursor: int, number: int) -> list[RequestOutcome]:
    wait_until(cluster, lambda: len(outcomes_since(cluster, cursor)) >= number)
    return outcomes_since(cluster, cursor)


def plan_to(cluster: Cluster, key: str) -> SwitchPlan:
    snapshot = cluster.snapshot()
    target = parse_deployment_key(key)
    return plan_switch(cluster.spec, snapshot.deployment, snapshot.epoch, target, KV)


def another_key(cluster: Cluster) -> str:
    present = cluster.snapshot().deployment.key
    return "1xtp2pp1+2xtp1pp1" if present != "1xtp2pp1+2xtp1pp1" else "2xtp2pp1"


def finish_switch(cluster: Drivable, ticket: SwitchTicket) -> SwitchTicket:
    wait_until(cluster, lambda: cluster.ticket(ticket.ticket_id).phase.is_terminal)
    return cluster.ticket(ticket.ticket_id)


def check_outcomes(requests: Sequence[Request], outcomes: Sequence[RequestOutcome]) -> None:
    """Each request ended exactly once, finished, with all of its tokens."""
    assert sorted(o.request_id for o in outcomes) == sorted(r.request_id for r in requests)
    wanted = {r.request_id: r for r in requests}
    for outcome in outcomes:
        request = wanted[outcome.request_id]
        assert outcome.status is RequestStatus.FINISHED, outcome
        assert outcome.prompt_tokens == request.prompt_tokens
        assert outcome.output_tokens == request.output_tokens
        assert outcome.first_token_s is not None
        assert outcome.arrival_s <= outcome.first_token_s <= outcome.finish_s


MIXED = [(20, 12), (3, 1), (90, 30), (150, 5), (7, 40), (64, 16), (1, 2), (33, 21)]


def test_is_drivable(cluster: Drivable) -> None:
    assert isinstance(cluster, Drivable)


def test_snapshot_is_consistent(cluster: Drivable) -> None:
    snapshot, spec = cluster.snapshot(), cluster.spec
    ids = [r.replica_id for r in snapshot.deployment.replicas]
    assert snapshot.deployment.devices <= set(range(spec.num_devices))
    assert sorted(snapshot.routing.replica_ids) == sorted(ids)
    assert {s.replica_id for s in snapshot.replicas} <= set(ids)
    for stats in snapshot.replicas:
        assert 0 <= stats.kv_blocks_used <= stats.kv_blocks_total
        assert stats.measured_at_s <= snapshot.now_s
    assert snapshot.num_arrived >= snapshot.num_finished + snapshot.num_rejected


def test_clock_reaches_what_advance_was_told(cluster: Drivable) -> None:
    until_s = cluster.snapshot().now_s + 0.3
    cluster.advance(until_s)
    assert cluster.snapshot().now_s >= until_s


def test_every_request_ends_once_with_all_its_tokens(cluster: Drivable) -> None:
    cursor, before = end_of_log(cluster), cluster.snapshot()
    requests = submit(cluster, MIXED, spacing_s=0.02)
    outcomes = run_to_end(cluster, cursor, len(requests))
    check_outcomes(requests, outcomes)
    ids = {r.replica_id for r in cluster.snapshot().deployment.replicas}
    assert {o.replica_id for o in outcomes} <= ids
    after = cluster.snapshot()
    assert after.num_arrived - before.num_arrived == len(requests)
    assert after.num_finished - before.num_finished == len(requests)


def test_arrivals_come_first_and_hide_the_output_length(cluster: Drivable) -> None:
    cursor = end_of_log(cluster)
    requests = submit(cluster, [(12, 6), (30, 2)])
    run_to_end(cluster, cursor, len(requests))
    events = cluster.events(cursor).events
    for request in requests:
        (arrived,) = [e for e in events if e.arrival and e.arrival.request_id == request.request_id]
        (ended,) = [e for e in events if e.outcome and e.outcome.request_id == request.request_id]
        assert arrived.seq < ended.seq
        assert (arrived.kind, ended.kind) == (EventKind.ARRIVED, EventKind.ENDED)
        assert arrived.arrival is not None
        assert arrived.arrival.prompt_tokens == request.prompt_tokens
        assert not hasattr(arrived.arrival, "output_tokens")
        assert arrived.outcome is None


def test_a_prompt_beyond_the_context_is_rejected(cluster: Drivable) -> None:
    cursor, rejected = end_of_log(cluster), cluster.snapshot().num_rejected
    submit(cluster, [(cluster.spec.model.max_model_len, 4)])
    (outcome,) = run_to_end(cluster, cursor, 1)
    assert outcome.status is RequestStatus.REJECTED
    assert outcome.output_tokens == 0
    assert cluster.snapshot().num_rejected == rejected + 1


def test_output_ends_with_the_context(cluster: Drivable) -> None:
    cursor, longest = end_of_log(cluster), cluster.spec.model.max_model_len
    submit(cluster, [(longest - 3, 50)])
    (outcome,) = run_to_end(cluster, cursor, 1)
    assert (outcome.status, outcome.output_tokens) == (RequestStatus.FINISHED, 3)


def test_cursor_reads_each_event_once(cluster: Drivable) -> None:
    cursor = end_of_log(cluster)
    requests = submit(cluster, [(9, 8)] * 4)
    seen: list[ClusterEvent] = []

    def read() -> bool:
        nonlocal cursor
        batch = cluster.events(cursor)
        assert batch.num_lost == 0
        assert batch.next_cursor == cursor + len(batch.events)
        cursor = batch.next_cursor
        seen.extend(batch.events)
        return sum(e.outcome is not None for e in seen) >= len(requests)

    wait_until(cluster, read)
    assert [e.seq for e in seen] == list(range(seen[0].seq, cursor))
    assert cluster.events(cursor).events == ()
    assert cluster.events(seen[2].seq).events[: len(seen) - 2] == tuple(seen[2:])


def test_routing_must_name_the_present_replicas(cluster: Drivable) -> None:
    present = cluster.snapshot().routing.replica_ids
    with pytest.raises(StaleEpochError):
        cluster.set_routing(Routing((*present, max(present) + 1)))
    with pytest.raises(StaleEpochError):
        cluster.set_routing(Routing(present[1:]))
    cluster.set_routing(Routing(present))
    assert cluster.snapshot().routing == Routing(present)


def test_routing_weights_are_obeyed(cluster: Drivable) -> None:
    ids = cluster.snapshot().routing.replica_ids
    only = ids[-1]
    weights = (tuple(float(i == only) for i in ids),)
    cursor = end_of_log(cluster)
    cluster.set_routing(Routing(ids, weights, (), ((1.0,),)))
    requests = submit(cluster, [(10, 5)] * 3)
    outcomes = run_to_end(cluster, cursor, len(requests))
    cluster.set_routing(Routing(ids))
    assert {o.replica_id for o in outcomes} == {only}


def test_plans_for_another_epoch_are_refused(cluster: Drivable) -> None:
    plan = plan_to(cluster, another_key(cluster))
    with pytest.raises(StaleEpochError):
        cluster.apply(replace(plan, expected_epoch=plan.expected_epoch + 1))


@pytest.mark.parametrize(
    "target",
    [
        dense_deployment([ParallelConfig(1, 1)] * 5),
        dense_deployment([ParallelConfig(3, 1)]),
        Deployment(()),
    ],
    ids=["too many devices", "heads do not divide", "nothing"],
)
def test_infeasible_plans_are_refused(cluster: Drivable, target: Deployment) -> None:
    before = cluster.snapshot()
    with pytest.raises(InfeasibleError):
        cluster.apply(replace(plan_to(cluster, another_key(cluster)), target=target))
    after = cluster.snapshot()
    assert (after.epoch, after.deployment) == (before.epoch, before.deployment)
    assert not after.switch_in_flight


def test_unknown_tickets(cluster: Drivable) -> None:
    with pytest.raises(NotFoundError):
        cluster.ticket("switch-9999")
    with pytest.raises(NotFoundError):
        cluster.cancel("switch-9999")


def test_switch_under_load_loses_nothing(cluster: Drivable) -> None:
    cursor, before = end_of_log(cluster), cluster.snapshot()
    requests = submit(cluster, [(30, 220)] * 6 + [(60, 40)] * 4)
    wait_until(cluster, lambda: sum(s.num_running for s in cluster.snapshot().replicas) >= 6)
    plan = replace(plan_to(cluster, another_key(cluster)), decision_id="d1")
    ticket = cluster.apply(plan)
    assert not ticket.phase.is_terminal
    assert cluster.snapshot().switch_in_flight
    with pytest.raises(SwitchInProgressError):
        cluster.apply(plan)
    requests += submit(cluster, [(16, 8)] * 4, spacing_s=0.02)

    done = finish_switch(cluster, ticket)
    after = cluster.snapshot()
    assert done.phase is SwitchPhase.DONE, done.reason
    assert (done.from_key, done.to_key) == (before.deployment.key, plan.target.key)
    assert done.decision_id == "d1"
    assert done.weight_bytes == plan.weight_bytes
    assert after.epoch == before.epoch + 1
    assert after.deployment == plan.target
    assert after.routing == Routing(tuple(r.replica_id for r in plan.target.replicas))
    assert not after.switch_in_flight

    outcomes = run_to_end(cluster, cursor, len(requests))
    check_outcomes(requests, outcomes)
    moved = sum(o.num_moves for o in outcomes)
    assert moved == done.num_migrated + done.num_recomputed + done.num_drained > 0
    phases = [e.ticket.phase for e in cluster.events(cursor).events if e.ticket is not None]
    order = list(SwitchPhase)
    assert phases == sorted(phases, key=order.index)
    assert phases[-1] is SwitchPhase.DONE


def test_cancelled_switch_keeps_the_old_deployment(cluster: Drivable) -> None:
    cursor, before = end_of_log(cluster), cluster.snapshot()
    requests = submit(cluster, [(20, 60)] * 4)
    cluster.advance(before.now_s + 0.1)
    ticket = cluster.apply(plan_to(cluster, another_key(cluster)))
    cluster.cancel(ticket.ticket_id)
    done = finish_switch(cluster, ticket)
    assert done.phase is SwitchPhase.CANCELLED
    assert done.reason
    after = cluster.snapshot()
    assert (after.epoch, after.deployment) == (before.epoch, before.deployment)
    check_outcomes(requests, run_to_end(cluster, cursor, len(requests)))
    assert cluster.cancel(ticket.ticket_id) == done


def _replica_choices(cluster: Drivable, lengths: Sequence[tuple[int, int]]) -> list[int | None]:
    cursor = end_of_log(cluster)
    requests = submit(cluster, lengths)
    outcomes = {o.request_id: o for o in run_to_end(cluster, cursor, len(requests))}
    return [outcomes[r.request_id].replica_id for r in requests]


def test_routing_is_blind_to_output_lengths(cluster: Drivable) -> None:
    prompts = [10, 80, 25, 140, 60, 7, 100, 33, 90, 15]
    outputs = [60, 30, 45, 35, 55, 32, 50, 40, 38, 58]  # none ends before all have arrived
    ids = cluster.snapshot().routing.replica_ids
    uneven = (tuple(1.0 + i for i in range(len(ids))), (1.0,) * len(ids))
    weights = tuple(tuple(w / sum(row) for w in row) for row in uneven)
    cluster.set_routing(Routing(ids, weights, (50,), ((0.9, 0.1), (0.2, 0.8))))
    chosen = _replica_choices(cluster, list(zip(prompts, outputs, strict=True)))
    permuted = _replica_choices(cluster, list(zip(prompts, reversed(outputs), strict=True)))
    cluster.set_routing(Routing(ids))
    assert len(set(chosen)) > 1
    assert chosen == permuted
