"""A control loop over the surrogate, stepped by a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from controller.decision_log import DecisionLog
from controller.loop import ControlLoop
from controller.oversight import Oversight
from controller.policy_server import PolicyServer
from controller.records import Mode
from engine.cluster import (
    Cluster,
    Request,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Observation, Policy
from policies.baselines import KeepPolicy

TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))
GRID_S = 5.0
INITIAL = dense_deployment(parse_deployment_key("4xtp1pp1"))
CONFIG = DecisionConfig(grid_s=GRID_S, min_dwell_s=10.0, max_candidates=8)


class Even:
    """Every legal candidate alike."""

    name = "even"

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return np.asarray(observation.mask / observation.mask.sum(), np.float64)


class Clock:
    """The controller's own clock; it goes on with the cluster's."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def build_loop(
    profiled: ProfiledCluster,
    cluster: Cluster,
    policy: Policy,
    log: Path | None = None,
    oversight: Oversight | None = None,
    config: DecisionConfig = CONFIG,
    rule: Policy | None = None,
    safe: Policy | None = None,
) -> ControlLoop:
    """To be closed by `close`."""
    pipeline = build_pipeline(profiled, TYPING, config, "ewma2")
    server = PolicyServer(policy, rule or KeepPolicy(), 10.0, deterministic=False, safe=safe)
    return ControlLoop(
        cluster, pipeline, server, DecisionLog(log, {}), Mode.ACTIVE, (1,), oversight, Clock()
    )


def close(loop: ControlLoop) -> None:
    loop.policy_server.close()
    loop.log.close()


def drive(cluster: SurrogateCluster, loop: ControlLoop, ticks: int, per_tick: int = 10) -> None:
    for _ in range(ticks):
        now_s = cluster.snapshot().now_s
        for i in range(per_tick):
            at_s = now_s + GRID_S * i / per_tick
            labels = ("chat", "batch", "")[i % 3], ("ann", "", "bob", "ann")[i % 4]
            cluster.submit(Request(f"r{at_s}", at_s, 60 + 60 * (i % 3), 30, *labels))
        cluster.advance(now_s + GRID_S)
        assert isinstance(loop.clock, Clock)
        loop.clock.now_s += GRID_S
        loop.tick()


def start(cluster: ProfiledCluster, key: str = "4xtp1pp1") -> SurrogateCluster:
    return SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)))
