"""The pool that the control service is measured on, and an engine that only tells of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig, DecisionPipeline
from controller.workload import default_typing
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    EventKind,
    ReplicaStats,
    RequestOutcome,
    RequestStatus,
    Routing,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "h100-llama-2-70b.json"
RATE_PER_DEVICE_S = 0.625  # 10 requests/s on 16 devices


def pool(num_devices: int) -> ProfiledCluster:
    """H100s in nodes of eight that serve Llama-2-70B."""
    profiled = load_profiled_cluster(PROFILE)
    return replace(profiled, spec=replace(profiled.spec, num_devices=num_devices))


def pipeline_of(cluster: ProfiledCluster) -> DecisionPipeline:
    return build_pipeline(
        cluster, default_typing(cluster.spec.model.max_model_len), DecisionConfig()
    )


@dataclass
class ToldEngine:
    """Deployment, traffic and load as an engine would tell them; nothing is simulated."""

    cluster: ProfiledCluster
    key: str
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._deployment = dense_deployment(parse_deployment_key(self.key))
        self._epoch, self._ticket, self.now_s, self._num = 0, None, 0.0, 0

    def events(self, seconds: float) -> tuple[ClusterEvent, ...]:
        """Of the next so many seconds: arrivals, and as many ended requests; rates drift."""
        drift = 1.0 + 0.3 * np.sin(2.0 * np.pi * self.now_s / 3600.0)
        mean = RATE_PER_DEVICE_S * self.cluster.spec.num_devices * drift * seconds
        number, start_s = int(self._rng.poisson(mean)), self.now_s
        times = np.sort(start_s + seconds * self._rng.random(number))
        prompts = 1 + np.minimum(self._rng.lognormal(6.0, 1.0, number), 3000.0).astype(int)
        outputs = 1 + np.minimum(self._rng.lognormal(5.0, 1.0, number), 900.0).astype(int)
        self.now_s, self._num = start_s + seconds, self._num + number
        return self._told(times.tolist(), prompts.tolist(), outputs.tolist())

    def _told(
        self, times: Sequence[float], prompts: Sequence[int], outputs: Sequence[int]
    ) -> tuple[ClusterEvent, ...]:
        found = []
        for i, (at_s, prompt, output) in enumerate(zip(times, prompts, outputs, strict=True)):
            name = f"{self._num}-{i}"
            arrival = Arrival(name, at_s, prompt, "")
            outcome = RequestOutcome(
                name, RequestStatus.FINISHED, at_s - 9.0, at_s - 8.5, at_s, prompt, output, 0
            )
            found.append(ClusterEvent(0, at_s, EventKind.ARRIVED, arrival=arrival))
            found.append(ClusterEvent(0, at_s, EventKind.ENDED, outcome=outcome))
        return tuple(found)

    def snapshot(self) -> ClusterSnapshot:
        replicas = self._deployment.replicas
        load = self._rng.poisson((12.0, 1.0), (len(replicas), 2)).tolist()
        return ClusterSnapshot(
            now_s=self.now_s,
            epoch=self._epoch,
            deployment=self._deployment,
            routing=Routing(tuple(r.replica_id for r in replicas)),
            replicas=tuple(
                ReplicaStats(
                    replica_id=r.replica_id,
                    alive=True,
                    num_running=running,
                    num_waiting=waiting,
                    waiting_prompt_tokens=300 * waiting,
                    running_context_tokens=750 * running,
                    kv_blocks_total=4000,
                    kv_blocks_used=75 * running,
                    measured_at_s=self.now_s,
                    generated_tokens_total=1000,
                    num_preemptions_total=0,
                )
                for r, (running, waiting) in zip(replicas, load, strict=True)
            ),
            switch=self._ticket,
            num_arrived=self._num,
            num_finished=self._num,
        )

    def switched(self, plan: SwitchPlan) -> None:
        """As if it had been carried out a long time ago."""
        old, self._deployment = self._deployment.key, plan.target
        self._epoch += 1
        self._ticket = SwitchTicket(
            f"switch-{self._epoch:04d}",
            SwitchPhase.DONE,
            old,
            plan.target.key,
            self._epoch - 1,
            self.now_s - 200.0,
            self.now_s - 190.0,
            plan.decision_id,
        )
