"""`python -m controller` from outside: steering a served surrogate with a real checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import torch
import trustme
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from controller.__main__ import main
from controller.access import issue_token
from controller.build import build_pipeline, pipeline_facts
from controller.control_channel import ClientAccess
from controller.decision import DecisionConfig
from controller.decision_log import read_log
from controller.remote_control import RemoteControl
from engine.cluster import (
    Request,
    Routing,
    SwitchPlan,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.grpc_server import start_server
from engine.profile import ProfiledCluster
from engine.wire import from_proto, to_proto
from envs.surrogate.cluster import SurrogateCluster
from policies.checkpoint import save_checkpoint
from policies.inference import NetworkConfig
from policies.networks import CandidateNetwork
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy
from protos import engine_pb2, engine_pb2_grpc

ROOT = Path(__file__).parents[2]
TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))
CONFIG = DecisionConfig(grid_s=0.25, min_dwell_s=1.0, max_candidates=6)
WAIT_S = 40.0
FRONT = ("--http-port", "0")


class SurrogateService(engine_pb2_grpc.EngineServiceServicer):
    """EngineService over a surrogate that follows the wall clock, with steady traffic."""

    def __init__(self, cluster: ProfiledCluster, tells_profile: bool = False) -> None:
        self._profile = cluster.profile if tells_profile else None
        self._surrogate = SurrogateCluster(
            cluster, dense_deployment(parse_deployment_key("4xtp1pp1"))
        )
        self._started_s, self._sent = time.monotonic(), 0

    def _at_present(self) -> SurrogateCluster:
        now_s = time.monotonic() - self._started_s
        while 0.1 * self._sent < now_s:
            at_s = max(0.1 * self._sent, self._surrogate.snapshot().now_s)
            self._surrogate.submit(Request(f"r{self._sent}", at_s, 80, 20))
            self._sent += 1
        self._surrogate.advance(now_s)
        return self._surrogate

    async def Describe(self, request: Any, context: Any) -> Any:
        response = engine_pb2.DescribeResponse(served_model_name="toy")
        to_proto(self._surrogate.spec, response.spec)
        if self._profile is not None:
            response.profile_json = json.dumps(self._profile.to_json())
        return response

    async def Snapshot(self, request: Any, context: Any) -> Any:
        response = engine_pb2.SnapshotResponse()
        to_proto(self._at_present().snapshot(), response.snapshot)
        return response

    async def ListEvents(self, request: Any, context: Any) -> Any:
        response = engine_pb2.ListEventsResponse()
        to_proto(self._at_present().events(request.cursor), response.batch)
        return response

    async def ApplySwitch(self, request: Any, context: Any) -> Any:
        response = engine_pb2.ApplySwitchResponse()
        ticket = self._at_present().apply(from_proto(SwitchPlan, request.plan))
        to_proto(ticket, response.ticket)
        yield response

    async def SetRouting(self, request: Any, context: Any) -> Any:
        self._at_present().set_routing(from_proto(Routing, request.routing))
        return engine_pb2.SetRoutingResponse()


class ServedEngine:
    """The service in a thread; `stop` and `start` again at the same port."""

    def __init__(self, cluster: ProfiledCluster, tells_profile: bool = False) -> None:
        self._cluster, self.port, self._tells_profile = cluster, 0, tells_profile
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, daemon=True)
        self._thread.start()
        self.start()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._events).result(30)

    def start(self) -> None:
        service = SurrogateService(self._cluster, self._tells_profile)

        def add(server: grpc.aio.Server) -> None:
            engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)

        name = "tidewright.engine.v1.EngineService"
        self._server, self.port = self._run(start_server(add, name, "127.0.0.1", self.port))

    def stop(self) -> None:
        self._run(self._server.stop(0))

    def close(self) -> None:
        self.stop()
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self._events.close()


@pytest.fixture
def engine(synthetic_cluster: ProfiledCluster) -> Iterator[ServedEngine]:
    served = ServedEngine(synthetic_cluster)
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def checkpoint(
    synthetic_cluster: ProfiledCluster, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained policy with everything that a trained one carries."""
    spec = build_pipeline(synthetic_cluster, TYPING, CONFIG).observation_spec
    torch.manual_seed(0)
    network_config = NetworkConfig(hidden_size=8)
    network = CandidateNetwork(spec, network_config)
    policy = PpoPolicy(spec, network, network_config, ObservationNormalizer(spec))
    adam = torch.optim.Adam(network.parameters())
    facts = pipeline_facts(synthetic_cluster, TYPING, CONFIG, "ewma2")
    return save_checkpoint(
        tmp_path_factory.mktemp("policy") / "run", policy, adam.state_dict(), facts
    )


class Collector:
    """What an OpenTelemetry collector does: takes spans over gRPC."""

    def __init__(self) -> None:
        self._spans: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self._spans += [span.name for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def names(self) -> set[str]:
        return set(self._spans)

    def close(self) -> None:
        self._server.stop(0).wait(10)


class Controller:
    """The process, its ready line, and a client."""

    def __init__(
        self, *arguments: str, cwd: Path = ROOT, access: ClientAccess | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "controller", *arguments, "--grpc-port", "0", *FRONT],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        found = re.search(r"grpc 127\.0\.0\.1:(\d+)", self.ready)
        if found is None:
            self.process.kill()
            raise AssertionError(self.process.communicate()[1])
        self.page = re.search(r"dashboard (http://\S+)", self.ready)
        self.target = f"127.0.0.1:{found[1]}"
        self.control = RemoteControl(self.target, timeout_s=10.0, access=access)

    def wait_for(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        deadline_s = time.monotonic() + WAIT_S
        while not condition(ticks := self.control.ticks(1)):
            assert time.monotonic() < deadline_s, ticks[-3:]
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        return ticks

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def close(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def test_it_steers_survives_a_restart_of_the_engine_and_ends_cleanly(
    engine: ServedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "controller.yaml"
    log = tmp_path / "log.jsonl"
    config.write_text(
        f"engine: 127.0.0.1:{engine.port}\npolicy: {checkpoint}\n"
        f"deterministic: false\nseed: 5\nengine_timeout_s: 2\nlog: {log}\n"
    )
    controller = Controller("--config", str(config), "--mode", "active")
    try:
        assert "policy ppo mode active grid 0.25 s" in controller.ready
        ticks = controller.wait_for(lambda ticks: any(t.ticket for t in ticks))
        switched = next(t for t in ticks if t.ticket)
        assert switched.ticket.decision_id == switched.decision_id
        engine.stop()
        controller.wait_for(lambda ticks: ticks[-1].status == "unavailable")
        engine.start()
        ticks = controller.wait_for(lambda ticks: ticks[-1].status == "decided")
        assert [t.seq for t in ticks] == list(range(1, len(ticks) + 1))
        assert not [t for t in ticks if t.status == "failed"]
        code, out, err = controller.end(signal.SIGTERM)
    finally:
        controller.close()
    assert code == 0, err
    assert re.search(r"controller stopped: \d+ ticks, \d+ decisions, \d+ switches done", out)
    contents = read_log(log)
    assert contents.skipped == ()
    header, first = contents.records[0], contents.records[1]
    assert (header["record"], header["policy"], header["seed"]) == ("header", "ppo", 5)
    assert first["record"] == "interval"
    decisions = [r for r in contents.records if r["record"] == "decision"]
    assert {r["policy"] for r in decisions} == {"ppo"}
    assert all(0 < r["propensity"] <= 1 for r in decisions)


def test_interrupted_in_advisory_mode_it_has_applied_nothing(
    engine: ServedEngine, checkpoint: Path
) -> None:
    arguments = ("--engine", f"127.0.0.1:{engine.port}", "--policy", str(checkpoint))
    controller = Controller(*arguments, "--mode", "advisory", "--rule", "myopic")
    try:
        assert "policy myopic mode advisory" in controller.ready
        ticks = controller.wait_for(lambda ticks: len(ticks) >= 4)
        assert {t.deployment_key for t in ticks} == {"4xtp1pp1"}
        assert not [t for t in ticks if t.ticket]
        assert controller.page is not None
        with urlopen(f"{controller.page[1]}/api/events", timeout=20) as events:
            assert events.readline().startswith(b"retry")  # a page that watches keeps nobody up
            code, out, err = controller.end(signal.SIGINT)
    finally:
        controller.close()
    assert (code, "0 switches done, 0 failed" in out) == (0, True)
    assert "Traceback" not in err


def test_a_rule_needs_no_checkpoint_and_the_commands_reach_it(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    """The engine serves its own profile; nothing else is there."""
    engine = ServedEngine(synthetic_cluster, tells_profile=True)
    given = ("run", "--engine", f"127.0.0.1:{engine.port}", "--rule", "hysteresis")
    controller = Controller(*given, cwd=tmp_path)
    try:
        assert "policy hysteresis mode active grid 15 s" in controller.ready
        controller.wait_for(lambda ticks: len(ticks) >= 1)
        command = [sys.executable, "-m", "controller", "state", "--json"]
        done = subprocess.run(
            [*command, "--control", controller.target],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=ROOT,
        )
        state = json.loads(done.stdout)
        assert (state["policy"], state["deployment_key"]) == ("hysteresis", "4xtp1pp1")
        assert {r["type"] for r in state["last_tick"]["rates"]} == {
            *("short_short", "short_long", "long_short", "long_long")
        }
    finally:
        controller.close()
        engine.close()


def test_without_profile_and_checkpoint_a_rule_says_what_it_needs(
    engine: ServedEngine, tmp_path: Path
) -> None:
    given = ("--engine", f"127.0.0.1:{engine.port}", "--rule", "keep", "--grpc-port", "0")
    assert "give step times with --profile" in refused(*given, "--policy", str(tmp_path))


def test_a_command_without_a_controller_is_told_in_one_sentence() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{bound.getsockname()[1]}"
        told = refused("state", "--control", target, "--timeout-s", "2")
    assert "does not answer" in told


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "controller", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_checkpoint_of_other_features_is_refused(
    engine: ServedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["decision"]["grid_s"] = 60.0
    (other / "manifest.json").write_text(json.dumps(manifest))
    target = ("--engine", f"127.0.0.1:{engine.port}", "--grpc-port", "0")
    assert "was trained on observation" in refused(*target, "--policy", str(other))


def test_it_does_not_start_with_a_policy_that_passed_no_gate(
    engine: ServedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    target = ("--engine", f"127.0.0.1:{engine.port}", "--grpc-port", "0")
    told = refused(*target, "--policy", str(checkpoint), "--require-gate", str(tmp_path))
    assert "may not decide: 0 verdicts in" in told
    assert "python evaluate.py ope LOG" in told


def test_a_taken_port_and_an_unwritable_log_are_refused(
    engine: ServedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    base = ("--engine", f"127.0.0.1:{engine.port}", "--policy", str(checkpoint))
    taken = refused(*base, "--grpc-port", str(engine.port))
    assert f"gRPC port {engine.port} on 127.0.0.1 cannot be bound" in taken
    (tmp_path / "file").write_text("")
    blocked = refused(*base, "--grpc-port", "0", "--log", str(tmp_path / "file" / "log"))
    assert "cannot be written" in blocked


def test_no_engine_is_told_with_how_to_start_one(checkpoint: Path) -> None:
    with socket.socket() as bound:  # bound but not listening: refuses at once
        bound.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{bound.getsockname()[1]}"
        given = ("--engine", target, "--policy", str(checkpoint), "--engine-timeout-s", "1")
        assert f"no engine answers at {target}" in refused(*given)


def test_an_unknown_key_is_named_with_what_was_meant(tmp_path: Path) -> None:
    config = tmp_path / "controller.yaml"
    config.write_text("polcy: x\n")
    assert "unknown key 'polcy'" in refused("--config", str(config))


def test_guarded_and_watched_it_is_reached_with_a_certificate_and_a_token(
    engine: ServedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    """TLS, an access file, the audit log, metrics and traces, all of one process."""
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    (tmp_path / "server.pem").chmod(0o600)
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(issue_token(tmp_path / "access", "alice", "operate"))
    access = ClientAccess(tls_ca=tmp_path / "ca.pem", token_file=token)
    collector = Collector()
    controller = Controller(
        *("--engine", f"127.0.0.1:{engine.port}", "--policy", str(checkpoint)),
        *("--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server.pem")),
        *("--access", str(tmp_path / "access"), "--audit", str(tmp_path / "audit.jsonl")),
        *("--metrics-port", "0", "--otlp-traces-endpoint", collector.endpoint),
        access=access,
    )
    try:
        controller.wait_for(lambda ticks: len(ticks) >= 3)
        controller.control.hold(60.0, "night")
        found = re.search(r"metrics (127\.0\.0\.1:\d+)", controller.ready)
        assert found is not None
        with urllib.request.urlopen(f"http://{found[1]}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        assert re.search(r'tidewright_ticks_total{status="decided"} [3-9]', text)
        assert 'tidewright_control_calls_total{code="OK",method="Hold"} 1.0' in text
        code, _, err = controller.end(signal.SIGTERM)
        names = collector.names()
    finally:
        controller.close()
        collector.close()
    assert code == 0, err
    assert names >= {"decision", "snapshot", "forecast", "propose", "act", "review", "apply"}
    (call,) = [r for r in read_log(tmp_path / "audit.jsonl").records if r["record"] == "call"]
    assert (call["caller"], call["method"].rpartition("/")[2], call["status"]) == (
        *("alice", "Hold"),
        "OK",
    )
    assert token.read_text() not in (tmp_path / "audit.jsonl").read_text() + err


def test_it_does_not_start_where_others_could_steer_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--host", "0.0.0.0", "--grpc-port", "0", "--policy", str(checkpoint)])
    assert error.value.code == 2
    assert "--insecure" in capsys.readouterr().err
