"""ControlService while the engine is slow, gone, or the watcher has seen another life."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
from served import Served

from engine.errors import InvalidRequestError, UnavailableError
from engine.profile import ProfiledCluster
from engine.wire import error_of
from protos import control_pb2 as pb


@pytest.fixture
def served(synthetic_cluster: ProfiledCluster) -> Iterator[Served]:
    found = Served(synthetic_cluster)
    try:
        yield found
    finally:
        found.close()


def test_state_and_records_are_answered_while_a_tick_waits_for_the_engine(served: Served) -> None:
    served.step()
    served.cluster.gate.clear()
    served.cluster.asked.clear()
    ticking = threading.Thread(target=served.loop.tick)
    ticking.start()
    assert served.cluster.asked.wait(30)
    assert served.state().next_seq == 2
    stream = served.stub.WatchDecisions(pb.WatchDecisionsRequest(from_seq=1), timeout=20)
    assert next(stream).record.seq == 1
    with pytest.raises(grpc.RpcError) as error:  # what needs its turn ends at its deadline
        served.stub.SetMode(pb.SetModeRequest(mode=pb.MODE_OFF), timeout=0.3)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.cluster.gate.set()
    assert next(stream).record.seq == 2
    ticking.join(30)
    stream.cancel()


def test_an_unreachable_engine_shows_in_the_state_and_fails_proposals(served: Served) -> None:
    served.step()
    assert served.state().engine_available
    served.cluster.is_gone = True
    served.step()
    state = served.state()
    assert not state.engine_available
    assert state.last_tick.status == pb.TICK_STATUS_UNAVAILABLE
    assert state.last_tick.reason == "made to be gone"
    assert state.deployment_key == "4xtp1pp1"  # the last that was seen
    with pytest.raises(grpc.RpcError) as error:
        served.stub.ProposeSwitch(pb.ProposeSwitchRequest(target_key="2xtp2pp1"), timeout=10)
    assert isinstance(error_of(error.value), UnavailableError)
    served.cluster.is_gone = False
    served.step()
    assert served.state().engine_available


def test_many_watchers_see_the_same(served: Served) -> None:
    for _ in range(3):
        served.step()
    watch = served.stub.WatchDecisions
    every = [watch(pb.WatchDecisionsRequest(from_seq=1), timeout=30) for _ in range(4)]
    seen = [[next(stream) for _ in range(3)] for stream in every]
    assert all([r.record.seq for r in s] == [1, 2, 3] for s in seen)
    assert all(r.num_lost == 0 for s in seen for r in s)
    for stream in every:
        stream.cancel()


def test_records_no_longer_kept_are_counted_as_lost(served: Served) -> None:
    for _ in range(5):
        served.step()
    with served.loop.lock:
        for _ in range(3):
            served.loop.records.popleft()
    stream = served.stub.WatchDecisions(pb.WatchDecisionsRequest(from_seq=2), timeout=20)
    first, second = next(stream), next(stream)
    assert (first.record.seq, first.num_lost) == (4, 2)
    assert (second.record.seq, second.num_lost) == (5, 0)
    stream.cancel()


@pytest.mark.parametrize("from_seq", [-1, 4, 500])
def test_a_seq_of_another_life_is_refused(served: Served, from_seq: int) -> None:
    for _ in range(2):
        served.step()
    stream = served.stub.WatchDecisions(pb.WatchDecisionsRequest(from_seq=from_seq), timeout=10)
    with pytest.raises(grpc.RpcError) as error:
        next(stream)
    assert isinstance(error_of(error.value), InvalidRequestError)
    assert "the next tick of this controller is 3" in str(error.value.details())


def test_the_present_deployment_is_refused_as_a_target(served: Served) -> None:
    served.step()
    request = pb.ProposeSwitchRequest(target_key="4xtp1pp1")
    reply = served.stub.ProposeSwitch(request, timeout=10)
    assert (reply.accepted, reply.applied) == (False, False)
    assert list(reply.vetoes) == ["already_deployed"]
    assert not reply.HasField("ticket")
