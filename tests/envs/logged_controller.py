"""A controller over the surrogate that writes a decision log, for tests of what reads logs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.build import build_pipeline
from controller.decision import DecisionConfig, DecisionPipeline
from controller.decision_log import DecisionLog
from controller.loop import ControlLoop
from controller.policy_server import PolicyServer
from controller.records import Mode
from engine.cluster import (
    SloSpec,
    UtilitySpec,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster
from envs.reward import RewardConfig, RewardLedger, Stretch
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import RequestType, Trace, WorkloadConfig, generate
from policies.base import Observation, Policy
from policies.baselines import KeepPolicy

TYPING = WorkloadTyping((WorkloadType("short", 12, 20), WorkloadType("long", 120, 40)), (0.6, 0.4))
TYPES = (RequestType("short", 12, 20), RequestType("long", 120, 40))
GRID_S, TICKS = 5.0, 30
CONFIG = DecisionConfig(grid_s=GRID_S, min_dwell_s=10.0, max_candidates=6)
REWARD = RewardConfig(
    0.05,
    1e-4,
    0.02,
    UtilitySpec(0.5, 0.3, 0.2),
    SloSpec(0.5, 0.05),
    Stretch((0.0, 50.0), (1.0, 3.0)),
    device_s_cost=1e-3,
)


class Even:
    """Every legal candidate alike."""

    name = "even"

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return np.asarray(observation.mask / observation.mask.sum(), np.float64)


class Steered:
    """A controller over the surrogate that writes a log, and the rewards counted beside it."""

    def __init__(
        self,
        profiled: ProfiledCluster,
        log: Path,
        mode: Mode = Mode.ACTIVE,
        num_ticks: int = TICKS,
        policy: Policy | None = None,
        pipeline: DecisionPipeline | None = None,
        **header: Any,
    ) -> None:
        pipeline = pipeline or build_pipeline(profiled, TYPING, CONFIG, "ewma2")
        self.num_ticks, self.grid_s = num_ticks, pipeline.config.grid_s
        self.trace: Trace = generate(
            WorkloadConfig(types=TYPES, mean_rate_per_s=25.0, max_tokens=250),
            num_ticks * self.grid_s,
            np.random.default_rng(0),
        )
        self.cluster = SurrogateCluster(
            profiled, dense_deployment(parse_deployment_key("4xtp1pp1"))
        )
        self.server = PolicyServer(policy or Even(), KeepPolicy(), 10.0, deterministic=False)
        facts = {
            "decision": asdict(pipeline.config),
            "types": [asdict(t) for t in pipeline.typing.types],
            "spec_hash": pipeline.observation_spec.hash,
            "pipeline_hash": pipeline.config_hash,
            "predictor": pipeline.predictor.name,
        } | header
        self.loop = ControlLoop(
            self.cluster,
            pipeline,
            self.server,
            DecisionLog(log, facts),
            mode,
            (1,),
        )

    def run(self) -> list[float]:
        """The reward after each decision but the last."""
        stretch, requests = REWARD.stretch.of(REWARD, self.trace), self.trace.requests()
        ledger, rewards, cursor = RewardLedger(REWARD), [], 0
        for tick in range(self.num_ticks):
            end_s = (tick + 1) * self.grid_s
            for index in np.flatnonzero(
                (self.trace.arrival_s > end_s - self.grid_s) & (self.trace.arrival_s <= end_s)
            ):
                self.cluster.submit(requests[index])
                ledger.admit(requests[index], float(stretch[index]))
            last = self.loop.records[-1] if self.loop.records else None
            self.cluster.advance(end_s)
            batch = self.cluster.events(cursor)
            cursor = batch.next_cursor
            moved = 0
            if last is not None and last.ticket is not None:
                (moved,) = (c.weight_bytes for c in last.candidates if c.key == last.executed_key)
            devices = len(self.cluster.snapshot().deployment.devices)
            outcomes = [e.outcome for e in batch.events if e.outcome is not None]
            rewards.append(ledger.settle(outcomes, end_s, moved, devices * self.grid_s).total)
            self.loop.tick()
        self.server.close()
        self.loop.log.close()
        return rewards[1:]
