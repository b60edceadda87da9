"""`python -m controlling.service`, in benchmarks/: a control service over an engine that only tells
of itself. Each line on its standard input is a tick; it answers with when the tick was published.

The policy is the folder given, or hysteresis. Ticks come when asked for, so that what is measured
is the service alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import uvloop

from controller.decision_log import DecisionLog
from controller.heap import settle_heap
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.policy_server import PolicyServer
from controller.records import Mode
from controller.service import start_grpc
from controller.sessions import Sessions
from controlling.setting import ToldEngine, pipeline_of, pool
from engine.cluster import ClusterSpec, EventBatch, Routing
from policies.artifact import load_shipped
from policies.base import Policy
from policies.baselines import HysteresisPolicy

DEADLINE_S = 10.0


class ToldCluster(ToldEngine):
    """As much of a `Cluster` as an advisory loop asks for."""

    @property
    def spec(self) -> ClusterSpec:
        return self.cluster.spec

    def events(self, cursor: int) -> EventBatch:  # type: ignore[override]
        return EventBatch(super().events(15.0), cursor + 1, 0)

    def set_routing(self, routing: Routing) -> None:
        """Advisory."""


async def main(num_devices: int, key: str, folder: str) -> None:
    cluster = ToldCluster(pool(num_devices), key)
    pipeline = pipeline_of(cluster.cluster)
    rule: Policy = HysteresisPolicy(pipeline.observation_spec)
    policy = load_shipped(Path(folder)) if folder else rule
    server = PolicyServer(policy, rule, DEADLINE_S, deterministic=True)
    loop = ControlLoop(cluster, pipeline, server, DecisionLog(None, {}), Mode.ADVISORY)  # type: ignore[arg-type]
    sessions = Sessions(pipeline, DEADLINE_S, max_sessions=256)
    served, port = await start_grpc(loop, Operations(loop), sessions, "127.0.0.1", 0)
    published_s: list[float] = []
    loop.listeners.insert(0, lambda: published_s.append(time.monotonic()))
    settle_heap()
    print(json.dumps({"port": port}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        record = await asyncio.to_thread(loop.tick)
        print(json.dumps({"seq": record.seq, "at_s": published_s[-1]}), flush=True)
    await served.stop(0)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
