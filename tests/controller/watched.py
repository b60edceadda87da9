"""A dashboard over the surrogate: loop, control service and HTTP front, stepped by a test."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from served import GRID_S, TYPING, Gated

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from controller.decision_log import DecisionLog
from controller.gate import Gate
from controller.history import History
from controller.http_front import RunningFront, start_http
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.policy_server import PolicyServer
from controller.records import Mode, TickRecord
from controller.roster import PolicyRoster
from controller.sessions import Sessions
from engine.certificates import Certificates
from engine.cluster import (
    ClusterSnapshot,
    EventBatch,
    Request,
    SwitchPlan,
    SwitchTicket,
    WorkloadTyping,
)
from engine.errors import UnavailableError
from engine.profile import ProfiledCluster
from policies.base import Policy
from policies.baselines import KeepPolicy

START_S = 1_760_000_000.0  # of the engine's clock, since 1970
CONFIG = DecisionConfig(grid_s=GRID_S, min_dwell_s=5.0)


class Shared(Gated):
    """The test steps it, the controller looks at it between ticks: one at a time."""

    def __init__(self, cluster: ProfiledCluster, key: str) -> None:
        self.lock = threading.RLock()
        super().__init__(cluster, key)

    def snapshot(self) -> ClusterSnapshot:
        if self.is_gone:
            raise UnavailableError("made to be gone")
        with self.lock:
            return super().snapshot()

    def advance(self, until_s: float) -> EventBatch:
        with self.lock:
            return super().advance(until_s)

    def submit(self, request: Request) -> None:
        with self.lock:
            super().submit(request)

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        with self.lock:
            return super().apply(plan)


class Watched:
    """Close it. `base` is the page's address; wall clock is the engine's, plus `late_s`."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        policy: Policy | None = None,
        typing: WorkloadTyping = TYPING,
        key: str = "4xtp1pp1",
        config: DecisionConfig = CONFIG,
        gate: Gate | None = None,
        names: tuple[str, ...] = (),
        policies: Path | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self.cluster, self.late_s = Shared(cluster, key), 0.0
        pipeline = build_pipeline(cluster, typing, config, "ewma2")
        self._typing, self.pipeline = typing, pipeline
        server = PolicyServer(policy or KeepPolicy(), KeepPolicy(), 10.0, deterministic=True)
        self.loop = ControlLoop(self.cluster, pipeline, server, DecisionLog(None, {}), Mode.ACTIVE)
        roster = PolicyRoster(pipeline, policies) if policies is not None else None
        self.operations, self.sessions = Operations(self.loop, roster), Sessions(pipeline, 10.0)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, daemon=True)
        self._thread.start()
        self.history = History(self.loop, self.wall_s)
        self._gate, self._names, self._certificates = gate, names, certificates
        self.port = 0
        self.front: RunningFront | None = None
        self.start_front()

    def start_front(self) -> None:
        """Again on the port that it had before."""
        operations, sessions = self.operations, self.sessions
        self.front = self._run(
            start_http(
                *(self.loop, operations, sessions, "127.0.0.1", self.port),
                *(self._names, self._gate, self._certificates, self.history),
            )
        )
        self.port = self.front.port

    def stop_front(self) -> None:
        if self.front is not None:
            self._run(self.front.close())
            self.front = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wall_s(self) -> float:
        return START_S + self.cluster._now_s + self.late_s

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._events).result(30)

    def step(self, per_type: tuple[int, ...] = (5,), tick: bool = True) -> TickRecord | None:
        """One interval with so many requests of each type, then a tick."""
        now_s = self.cluster.snapshot().now_s if not self.cluster.is_gone else 0.0
        if not self.cluster.is_gone:
            for kind, number in zip(self._typing.types, per_type, strict=False):
                for i in range(number):
                    at_s = now_s + GRID_S * (i + 0.5) / number
                    lengths = int(kind.prompt_tokens), int(kind.output_tokens)
                    self.cluster.submit(Request(f"{kind.name}-{at_s}", at_s, *lengths))
            self.cluster.advance(now_s + GRID_S)
        return self.loop.tick() if tick else None

    def advance(self, seconds: float) -> None:
        self.cluster.advance(self.cluster.snapshot().now_s + seconds)

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(self.base + path, headers=headers or {})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def close(self) -> None:
        self.stop_front()
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self._events.close()
        self.sessions.close()
        self.loop.trials.close()
        self.loop.policy_server.close()


def nodes(cluster: ProfiledCluster, per_node: int) -> ProfiledCluster:
    """The same pool with so many devices to a node."""
    return replace(cluster, spec=replace(cluster.spec, devices_per_node=per_node))
