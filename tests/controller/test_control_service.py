"""ControlService over a real channel, and `python -m controller` from outside."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from controller.decision_log import DecisionLog
from controller.loop import ControlLoop
from controller.policy_server import PolicyServer
from controller.records import Mode
from controller.service import start_grpc
from engine.cluster import Request, WorkloadType, WorkloadTyping, dense_deployment
from engine.cluster import parse_deployment_key as parse
from engine.errors import InfeasibleError, InvalidRequestError, UnavailableError
from engine.profile import ProfiledCluster
from engine.wire import error_of
from envs.surrogate.cluster import SurrogateCluster
from policies.baselines import KeepPolicy
from protos import control_pb2 as pb
from protos import control_pb2_grpc

TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))


class Service:
    """A control service in a thread over a surrogate that the test steps."""

    def __init__(self, cluster: ProfiledCluster) -> None:
        self.cluster = SurrogateCluster(cluster, dense_deployment(parse("4xtp1pp1")))
        pipeline = build_pipeline(cluster, TYPING, DecisionConfig(grid_s=5.0, min_dwell_s=5.0))
        server = PolicyServer(KeepPolicy(), KeepPolicy(), 5.0, deterministic=True)
        rng = np.random.default_rng(0)
        log = DecisionLog(None, {})
        self.loop = ControlLoop(self.cluster, pipeline, server, log, Mode.ACTIVE, rng)
        self.events = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.events.run_forever, daemon=True)
        self.thread.start()
        self.server, self.port = self.run(start_grpc(self.loop, "127.0.0.1", 0))
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = control_pb2_grpc.ControlServiceStub(self.channel)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.events).result(30)

    def step(self) -> None:
        now_s = self.cluster.snapshot().now_s
        for i in range(5):
            self.cluster.submit(Request(f"{now_s}-{i}", now_s + i, 64, 20))
        self.cluster.advance(now_s + 5.0)
        self.loop.tick()

    def close(self) -> None:
        self.channel.close()
        self.run(self.server.stop(0))
        self.events.call_soon_threadsafe(self.events.stop)
        self.thread.join(10)
        self.events.close()
        self.loop.policy_server.close()


@pytest.fixture
def service(synthetic_cluster: ProfiledCluster) -> Iterator[Service]:
    found = Service(synthetic_cluster)
    try:
        yield found
    finally:
        found.close()


def test_state_before_and_after_ticks(service: Service) -> None:
    state = service.stub.GetState(pb.GetStateRequest(), timeout=10)
    assert (state.mode, state.policy, state.next_seq) == (pb.MODE_ACTIVE, "keep", 1)
    assert not state.HasField("deployment")
    service.step()
    state = service.stub.GetState(pb.GetStateRequest(), timeout=10)
    assert state.deployment_key == "4xtp1pp1"
    assert state.last_tick.status == pb.TICK_STATUS_DECIDED
    assert state.last_tick.candidates[0].legal
    assert [r.type for r in state.last_tick.rates] == ["short", "long"]
    assert state.counters.num_decisions == 1


def test_watching_resumes_where_it_was_left(service: Service) -> None:
    for _ in range(3):
        service.step()
    stream = service.stub.WatchDecisions(pb.WatchDecisionsRequest(from_seq=2), timeout=20)
    assert [next(stream).record.seq for _ in range(2)] == [2, 3]
    service.step()
    assert next(stream).record.seq == 4
    stream.cancel()


def test_proposals_dry_and_real(service: Service) -> None:
    for _ in range(2):
        service.step()
    ask = pb.ProposeSwitchRequest(target_key="2xtp2pp1", dry_run=True)
    dry = service.stub.ProposeSwitch(ask, timeout=10)
    assert (dry.accepted, dry.applied) == (True, False)
    assert dry.predicted_s > 0
    assert dry.lower_bound_bytes == dry.weight_bytes
    real = service.stub.ProposeSwitch(pb.ProposeSwitchRequest(target_key="2xtp2pp1"), timeout=10)
    assert real.applied
    assert real.ticket.decision_id == real.decision_id
    service.step()
    state = service.stub.GetState(pb.GetStateRequest(), timeout=10)
    assert state.deployment_key == "2xtp2pp1"
    assert [t.to_key for t in state.switches] == ["2xtp2pp1"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [("", InvalidRequestError), ("9xtp1pp1", InfeasibleError), ("x", InfeasibleError)],
)
def test_bad_proposals_come_back_by_name(service: Service, key: str, kind: type[Exception]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        service.stub.ProposeSwitch(pb.ProposeSwitchRequest(target_key=key), timeout=10)
    assert isinstance(error_of(error.value), kind)


def test_modes_change_and_nonsense_is_refused(service: Service) -> None:
    reply = service.stub.SetMode(pb.SetModeRequest(mode=pb.MODE_OFF), timeout=10)
    assert (reply.mode, reply.previous) == (pb.MODE_OFF, pb.MODE_ACTIVE)
    service.step()
    state = service.stub.GetState(pb.GetStateRequest(), timeout=10)
    assert state.last_tick.status == pb.TICK_STATUS_OBSERVED
    with pytest.raises(grpc.RpcError) as error:
        service.stub.SetMode(pb.SetModeRequest(), timeout=10)
    assert isinstance(error_of(error.value), InvalidRequestError)


def test_health_serves_and_a_taken_port_is_refused(service: Service) -> None:
    request = health_pb2.HealthCheckRequest(service="tidewright.control.v1.ControlService")
    reply = health_pb2_grpc.HealthStub(service.channel).Check(request, timeout=10)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(UnavailableError, match="in use"):
        service.run(start_grpc(service.loop, "127.0.0.1", service.port))


# -------------------------------------------------------------------------------- the process


def run_controller(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--grpc-port", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_every_option_with_its_default() -> None:
    text = run_controller("--help").stdout
    for option in ("--engine", "--policy", "--mode", "--policy-deadline-s", "--log"):
        assert option in text
    assert "(default: 0.5)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "/nowhere"], "no policy checkpoint at /nowhere"),
        (["--mode", "sideways"], "mode"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_2(arguments: list[str], message: str) -> None:
    done = run_controller(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_engine_is_one_sentence_and_exit_2() -> None:
    artifact = Path(__file__).parents[2] / "policies" / "artifacts" / "demo"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        done = run_controller(
            "--engine", target, "--policy", str(artifact), "--engine-timeout-s", "1"
        )
    assert done.returncode == 2
    assert f"no engine answers at {target}" in done.stderr
