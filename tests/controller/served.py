"""A control service over the surrogate, in a thread; a test steps engine and loop."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from controller.decision_log import DecisionLog
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.policy_server import PolicyServer
from controller.records import Mode
from controller.roster import PolicyRoster
from controller.security import Security
from controller.service import start_grpc
from controller.sessions import Sessions
from engine.cluster import (
    EventBatch,
    Request,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import UnavailableError
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.baselines import KeepPolicy
from protos import control_pb2 as pb
from protos import control_pb2_grpc

TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))
GRID_S = 5.0


class Gated(SurrogateCluster):
    """An engine whose events can be held back, or that can be gone."""

    is_gone = False

    def __init__(self, cluster: ProfiledCluster, key: str = "4xtp1pp1") -> None:
        super().__init__(cluster, dense_deployment(parse_deployment_key(key)))
        self.asked, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def events(self, cursor: int) -> EventBatch:
        if self.is_gone:
            raise UnavailableError("made to be gone")
        self.asked.set()
        assert self.gate.wait(30)
        return super().events(cursor)


class Served:
    """A control service in a thread; the test steps the engine and the loop."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        policies: Path | None = None,
        security: Security | None = None,
        verdicts: Path | None = None,
    ) -> None:
        self.cluster = Gated(cluster)
        pipeline = build_pipeline(cluster, TYPING, DecisionConfig(grid_s=GRID_S, min_dwell_s=5.0))
        server = PolicyServer(KeepPolicy(), KeepPolicy(), 10.0, deterministic=True)
        log = DecisionLog(None, {})
        self.loop = ControlLoop(self.cluster, pipeline, server, log, Mode.ACTIVE)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, daemon=True)
        self._thread.start()
        roster = PolicyRoster(pipeline, policies or Path("none"), (), verdicts)
        self.operations = Operations(self.loop, roster)
        self.sessions = Sessions(pipeline, 10.0)
        self.security = security or Security()
        served = start_grpc(
            self.loop, self.operations, self.sessions, "127.0.0.1", 0, self.security
        )
        self._server, self.port = self._run(served)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._events).result(30)

    def step(self, requests: int = 5) -> None:
        now_s = self.cluster.snapshot().now_s
        for i in range(requests):
            at_s = now_s + GRID_S * i / requests
            self.cluster.submit(Request(f"{now_s}-{i}", at_s, 64, 20))
        self.cluster.advance(now_s + GRID_S)
        self.loop.tick()

    def state(self) -> Any:
        return self.stub.GetState(pb.GetStateRequest(), timeout=10)

    def close(self) -> None:
        self.cluster.gate.set()
        self._channel.close()
        self._run(self._server.stop(0))
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self._events.close()
        self.sessions.close()
        self.loop.trials.close()
        self.loop.policy_server.close()
