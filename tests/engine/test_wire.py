"""Round trips over the wire, refusals of what is malformed, and the one error table."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import cluster as c
from engine import errors
from engine.errors import InvalidRequestError, TidewrightError
from engine.migration.plan import plan_switch
from engine.wire import ERROR_KEY, STATUS_OF, error_of, from_proto, name_of, status_of, to_proto
from protos import deployment_pb2 as pb

MESSAGES: dict[type[Any], type[Any]] = {
    c.ClusterSpec: pb.ClusterSpec,
    c.ClusterSnapshot: pb.ClusterSnapshot,
    c.SwitchPlan: pb.SwitchPlan,
    c.EventBatch: pb.EventBatch,
}
counts = st.integers(0, 2**31 - 1)
reals = st.floats(0, 1e9)
rates = st.floats(1e-6, 1e15)
text = st.text(max_size=20)


@st.composite
def deployments(draw: st.DrawFn) -> c.Deployment:
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4))
    return c.dense_deployment([c.ParallelConfig(*size) for size in sizes])


@st.composite
def routings(draw: st.DrawFn) -> c.Routing:
    ids = tuple(draw(st.lists(counts, max_size=4, unique=True)))
    if not ids or draw(st.booleans()):
        return c.Routing(ids)
    row = st.tuples(*[reals] * len(ids))
    weights = tuple(draw(st.lists(row, min_size=1, max_size=3)))
    edges = tuple(sorted(draw(st.lists(counts, max_size=3))))
    one = st.tuples(*[reals] * len(weights))
    return c.Routing(ids, weights, edges, tuple(draw(one) for _ in range(len(edges) + 1)))


tickets = st.builds(
    c.SwitchTicket,
    ticket_id=text,
    phase=st.sampled_from(c.SwitchPhase),
    from_key=text,
    to_key=text,
    from_epoch=counts,
    started_s=reals,
    updated_s=reals,
    decision_id=text,
    reason=text,
    phase_s=st.lists(st.tuples(text, reals), max_size=3).map(tuple),
)
outcomes = st.builds(
    c.RequestOutcome,
    request_id=text,
    status=st.sampled_from(c.RequestStatus),
    arrival_s=reals,
    first_token_s=st.none() | reals,
    finish_s=reals,
    prompt_tokens=counts,
    output_tokens=counts,
    replica_id=st.none() | counts,
)
events = st.builds(
    c.ClusterEvent,
    seq=counts,
    at_s=reals,
    kind=st.sampled_from(c.EventKind),
    arrival=st.none() | st.builds(c.Arrival, text, reals, counts, text, text),
    outcome=st.none() | outcomes,
    ticket=st.none() | tickets,
    device=st.none() | counts,
)
plans = st.builds(
    c.SwitchPlan,
    target=deployments(),
    expected_epoch=counts,
    transfers=st.lists(
        st.builds(
            c.Transfer, text, st.none() | st.integers(0, 1), counts, counts, counts, counts, counts
        ),
        max_size=3,
    ).map(tuple),
    kv=st.builds(c.KvCostParams, *[rates] * 3),
    weight_bytes=counts,
    lower_bound_bytes=counts,
    predicted_s=reals,
    lower_bound_s=reals,
    mode=st.sampled_from(c.SwitchMode),
    decision_id=text,
)
snapshots = st.builds(
    c.ClusterSnapshot,
    now_s=reals,
    epoch=counts,
    deployment=deployments(),
    routing=routings(),
    replicas=st.lists(
        st.builds(c.ReplicaStats, counts, reals, *[counts] * 8, st.booleans()), max_size=2
    ).map(tuple),
    switch=st.none() | tickets,
    dead_devices=st.lists(counts, max_size=2).map(tuple),
)
batches = st.builds(c.EventBatch, st.lists(events, max_size=3).map(tuple), counts, counts)


@given(st.one_of(plans, snapshots, batches))
def test_a_round_trip_changes_nothing(value: Any) -> None:
    message = to_proto(value, MESSAGES[type(value)]())
    again = MESSAGES[type(value)].FromString(message.SerializeToString())
    assert from_proto(type(value), again) == value


def test_a_cluster_spec_survives(tiny_spec: c.ClusterSpec) -> None:
    assert from_proto(c.ClusterSpec, to_proto(tiny_spec, pb.ClusterSpec())) == tiny_spec


def test_transfers_that_are_made_when_looked_at_travel_too(tiny_spec: c.ClusterSpec) -> None:
    current = c.dense_deployment(c.parse_deployment_key("2xtp2pp1"))
    target, kv = c.parse_deployment_key("4xtp1pp1"), c.KvCostParams(1e9, 1e3, 0.01)
    plan = plan_switch(tiny_spec, current, 3, target, kv)
    assert len(plan.transfers) > 0
    back = from_proto(c.SwitchPlan, to_proto(plan, pb.SwitchPlan()))
    assert list(back.transfers) == list(plan.transfers)
    assert (back.target, back.weight_bytes) == (plan.target, plan.weight_bytes)


def test_a_deployment_told_again_is_the_same_object() -> None:
    """And another one for another message, though it was read in between."""
    told = [c.dense_deployment([c.ParallelConfig(*size)]) for size in ((2, 1), (1, 2), (2, 1))]
    read = [
        from_proto(
            c.ClusterSnapshot,
            to_proto(
                c.ClusterSnapshot(at_s, 0, deployment, c.Routing(()), (), None),
                pb.ClusterSnapshot(),
            ),
        ).deployment
        for at_s, deployment in enumerate(told)
    ]
    assert read == told
    assert read[0] is read[2]


def test_what_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"SwitchPlan\.target is missing"):
        from_proto(c.SwitchPlan, pb.SwitchPlan())
    with pytest.raises(InvalidRequestError, match="phase is 0; expected one of PREPARE"):
        from_proto(c.SwitchTicket, pb.SwitchTicket())
    replica = pb.Replica(
        parallel=pb.ParallelConfig(tp=2, pp=1), placement=pb.Placement(devices=[0])
    )
    with pytest.raises(InvalidRequestError, match="needs 2 devices, its placement names 1"):
        from_proto(c.Replica, replica)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_make_no_sense_are_refused_by_name(value: float) -> None:
    for name in ("link_bytes_per_s", "prefill_tokens_per_s", "decode_step_s"):
        figures = dict.fromkeys(("link_bytes_per_s", "prefill_tokens_per_s", "decode_step_s"), 1.0)
        with pytest.raises(InvalidRequestError, match=name):
            from_proto(c.KvCostParams, pb.KvCostParams(**figures | {name: value}))
    kv = pb.KvCostParams(link_bytes_per_s=1.0, prefill_tokens_per_s=1.0, decode_step_s=1.0)
    plan = pb.SwitchPlan(target=pb.Deployment(), kv=kv, mode=pb.SWITCH_MODE_LIVE, predicted_s=value)
    with pytest.raises(InvalidRequestError, match="predicted_s"):
        from_proto(c.SwitchPlan, plan)
    rows = [pb.MatrixRow(values=[0.5, value])]
    posterior = [pb.MatrixRow(values=[1.0])]
    with pytest.raises(InvalidRequestError, match="routing weights"):
        from_proto(c.Routing, pb.Routing(replica_ids=[0, 1], weights=rows, posterior=posterior))


def test_a_subclass_travels_as_the_class_that_clients_know() -> None:
    class TooLongError(InvalidRequestError):
        pass

    error = TooLongError("long")
    assert status_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert name_of(error) == "InvalidRequestError"


class CallError(grpc.RpcError):
    """What a client gets, without a server."""

    def __init__(self, code: grpc.StatusCode, details: str, name: str | None) -> None:
        self._code, self._details = code, details
        self._metadata = () if name is None else ((ERROR_KEY, name),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


def test_every_error_has_a_status_and_comes_back_by_name() -> None:
    family = set(TidewrightError.__subclasses__())
    assert set(STATUS_OF) == family
    for kind in family:
        rebuilt = error_of(CallError(status_of(kind("why")), "why", kind.__name__))
        assert (type(rebuilt), str(rebuilt)) == (kind, "why")


def test_an_unreachable_server_is_unavailable() -> None:
    error = error_of(CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "late", None))
    assert isinstance(error, errors.UnavailableError)
