"""The decision pipeline: the code between a snapshot and a switch plan, in training and in
production alike. It reaches no cluster: events and snapshots come in, decisions go out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from controller.guardrails import GuardrailConfig, Review, mask_reasons, review
from controller.monitor import Monitor, MonitorState
from controller.observation import Situation, build_observation, observation_spec
from controller.planner import Planner, dead_replicas
from controller.predictor import Forecast, Predictor
from controller.scheduler import DeploymentScheduler, SchedulerConfig
from controller.scoring import Capacity, Objective, PlannerConfig
from controller.service_model import kv_cost_params
from controller.slo_rates import SloRates
from controller.solvers import SolverName
from engine.cluster import (
    Candidate,
    ClusterEvent,
    ClusterSnapshot,
    Decision,
    ParallelConfig,
    Routing,
    SwitchPlan,
    WorkloadTyping,
    deployment_key,
)
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from policies.base import Observation, ObservationSpec

KEEP = 0


@dataclass(frozen=True, slots=True)
class DecisionConfig:
    """Everything the pipeline can be told; seconds unless said otherwise."""

    grid_s: float = 15.0  # between decisions
    max_candidates: int = 12  # rows, keep included
    min_dwell_s: float = 60.0
    switches_per_hour: float = 30.0
    switch_burst: float = 6.0
    window_s: float = 60.0  # of the monitor's medium scale
    stale_after_s: float = 10.0
    max_utilisation: float = 0.9  # headroom 1 means the busiest replica is this busy
    min_headroom: float = 1.0  # floor that a choice may not go below while keep is above it
    routing_floor: float = 0.02  # least share of a type that a live replica gets
    objective: Objective = "goodput"  # what the candidate `optimum` is best at
    planner: SolverName = "exact"  # what finds `optimum`: see `controller.solvers`
    homogeneous: bool = False  # whether all replicas of a new deployment are alike
    capacity: Capacity = "throughput"  # what headroom counts: see `controller.scoring`
    slo_class: str = "interactive"  # whose targets, for the capacity "slo"
    switch_budget_bytes: int = 0  # of weights, for the best plan that is cheap to reach; or else
    switch_budget_s: float = 0.0  # on the links, without the fixed overhead
    give_back: bool = False  # whether candidates may leave devices idle
    max_devices: int = 0  # that a new deployment may use; 0: all that are alive

    def __post_init__(self) -> None:
        positive = ("grid_s", "window_s", "stale_after_s", "max_utilisation")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        if wrong or self.max_candidates < 2 or not 0 <= self.routing_floor < 0.5:
            raise InvalidRequestError(
                f"decision settings need {', '.join(positive)} > 0, max_candidates >= 2 and "
                f"routing_floor in [0, 0.5), got {asdict(self)}."
            )


@dataclass(frozen=True, slots=True)
class PreparedDecision:
    """A tick up to the policy: what it will see and what it may choose."""

    at_s: float
    snapshot: ClusterSnapshot
    monitor_state: MonitorState
    forecast: Forecast
    candidates: tuple[Candidate, ...]  # row 0 is keep
    observation: Observation
    mask_reasons: tuple[str, ...]  # per candidate; empty where legal
    prompt_edges: tuple[int, ...] = ()
    posterior: tuple[tuple[float, ...], ...] = ()


def plan_to(
    cluster: ProfiledCluster,
    snapshot: ClusterSnapshot,
    target: Sequence[ParallelConfig],
    decision_id: str,
) -> SwitchPlan:
    """From what a snapshot shows to `target`. Raises InfeasibleError."""
    return plan_switch(
        cluster.spec,
        snapshot.deployment,
        snapshot.epoch,
        target,
        kv_cost_params(cluster, target),
        cluster.profile.switch_overhead_s,
        decision_id,
        snapshot.dead_devices,
        kv_blocks_used=snapshot.kv_blocks_used,
    )


class DecisionPipeline:
    """Owns monitor, predictor, planner and deployment scheduler of one controlled cluster.

    Call `observe` with every event in order, then once per grid point `prepare` and `resolve`.
    """

    def __init__(
        self,
        cluster: ProfiledCluster,
        typing: WorkloadTyping,
        config: DecisionConfig,
        predictor: Predictor,
        default_configs: Sequence[ParallelConfig] | None = None,
        slo_rates: SloRates | None = None,
    ) -> None:
        self.cluster, self.typing, self.config = cluster, typing, config
        self.predictor = predictor
        self.monitor = Monitor(typing, config.window_s, config.stale_after_s)
        planning = PlannerConfig(
            max_utilisation=config.max_utilisation,
            max_candidates=config.max_candidates,
            objective=config.objective,
            planner=config.planner,
            homogeneous=config.homogeneous,
            capacity=config.capacity,
            slo_class=config.slo_class,
            switch_budget_bytes=config.switch_budget_bytes,
            switch_budget_s=config.switch_budget_s,
            give_back=config.give_back,
            max_devices=config.max_devices,
        )
        self.planner = Planner(cluster, typing, planning, default_configs, slo_rates)
        self.scheduler = DeploymentScheduler(
            SchedulerConfig(config.min_dwell_s, config.switches_per_hour, config.switch_burst)
        )
        self._guards = GuardrailConfig(min_headroom=config.min_headroom)
        self.observation_spec: ObservationSpec = observation_spec(
            len(typing.types), config.max_candidates, config.grid_s
        )
        self.reset(0.0)

    def reset(self, now_s: float) -> None:
        """Forget all traffic and switches; the planner's caches hold no history and stay."""
        self.monitor.reset(now_s)
        self.predictor.reset()
        self.scheduler.reset(now_s)
        self._present: tuple[ParallelConfig, ...] | None = None
        self._last: tuple[ParallelConfig, ...] | None = None
        self._num_decisions = 0

    def observe(self, events: Iterable[ClusterEvent]) -> None:
        """Take in events; each exactly once, in order of time."""
        self.monitor.observe(events)

    # -- prepare ------------------------------------------------------------------------

    def prepare(self, snapshot: ClusterSnapshot) -> PreparedDecision:
        """From a snapshot to what the policy sees. Advances the predictor by one interval."""
        self.scheduler.observe(snapshot.switch)
        self._follow(snapshot)
        if self.monitor.interval_s(snapshot.now_s) >= 0.5 * self.config.grid_s:
            self.predictor.observe(self.monitor.take_interval(snapshot.now_s))
        state, forecast = self.monitor.state(snapshot), self.predictor.forecast()
        lengths = np.array([state.prompt_tokens, state.output_tokens]).T
        recent = self.monitor.recent_counts(snapshot.now_s)
        mixing = self.monitor.posterior.mixing
        candidates = self.planner.propose(snapshot, forecast, self._last, lengths, recent, mixing)
        reasons = mask_reasons(
            self.cluster.spec,
            snapshot,
            candidates,
            state.is_stale,
            self.scheduler.reason(snapshot.now_s),
            self._guards,
        )
        since_s = self.scheduler.since_switch_s(snapshot.now_s)
        situation = Situation(self.cluster.spec, snapshot, state, forecast, since_s)
        observation = build_observation(self.observation_spec, situation, candidates, reasons)
        posterior = self.monitor.posterior
        return PreparedDecision(
            snapshot.now_s,
            snapshot,
            state,
            forecast,
            candidates,
            observation,
            reasons,
            posterior.edges,
            posterior.table,
        )

    def _follow(self, snapshot: ClusterSnapshot) -> None:
        """Remember the deployment before the present one, for undo."""
        configs = snapshot.deployment.configs
        if self._present is not None and deployment_key(configs) != deployment_key(self._present):
            self._last = self._present
        self._present = configs

    # -- resolve ------------------------------------------------------------------------

    def resolve(
        self,
        prepared: PreparedDecision,
        action: int,
        probabilities: ArrayLike | None = None,
        policy_name: str = "",
        decision_id: str | None = None,
    ) -> Decision:
        """The decision for a chosen row: reviewed, and planned when it is to switch.

        Ids are derived from time, epoch and count of decisions since the reset.
        """
        self._num_decisions += 1
        name = decision_id or self._decision_id(prepared)
        reasons = prepared.mask_reasons
        found = review(reasons, action, probabilities)
        plan: SwitchPlan | None = None
        if found.executed != KEEP:
            try:
                plan = self.plan(prepared, found.executed, name)
            except InfeasibleError as error:
                blocked = tuple(
                    f"infeasible: {error}" if row == found.executed else reason
                    for row, reason in enumerate(reasons)
                )
                found = review(blocked, action, probabilities)
        return self._decision(prepared, action, found, plan, policy_name, name)

    def _decision_id(self, prepared: PreparedDecision) -> str:
        text = f"{prepared.at_s!r}|{prepared.snapshot.epoch}|{self._num_decisions}"
        return f"d{self._num_decisions:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def plan(self, prepared: PreparedDecision, row: int, decision_id: str) -> SwitchPlan:
        """How to reach that candidate. Raises InfeasibleError."""
        target = prepared.candidates[row].configs
        return plan_to(self.cluster, prepared.snapshot, target, decision_id)

    def _decision(
        self,
        prepared: PreparedDecision,
        action: int,
        found: Review,
        plan: SwitchPlan | None,
        policy_name: str,
        decision_id: str,
    ) -> Decision:
        candidates = prepared.candidates
        executed = candidates[found.executed]
        chosen_key = candidates[action].key if 0 <= action < len(candidates) else ""
        reason = executed.origin if not found.vetoes else f"keep: {found.vetoes[0]}"
        return Decision(
            decision_id=decision_id,
            at_s=prepared.at_s,
            action=action,
            chosen_key=chosen_key,
            executed_key=executed.key,
            propensity=found.propensity,
            policy=policy_name,
            reason=reason,
            vetoes=found.vetoes,
            plan=plan,
        )

    # -- routing ------------------------------------------------------------------------

    def routing_for(self, prepared: PreparedDecision) -> Routing:
        """Optimal routing for the present deployment; needs no switch.

        Every live replica gets at least `routing_floor` of each type, so that none is left cold
        by a share that only holds for the forecast; dead ones get nothing.
        """
        keep, deployment = prepared.candidates[KEEP], prepared.snapshot.deployment
        weights, dead = np.array(keep.routing, np.float64), dead_replicas(prepared.snapshot)
        live = np.array([i not in dead for i in range(len(deployment.replicas))])
        if not live.any():
            return Routing(tuple(r.replica_id for r in deployment.replicas))
        floor = min(self.config.routing_floor, 0.5 / int(live.sum()))
        weights = np.where(live[None], np.maximum(weights, floor), 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        return Routing(
            replica_ids=tuple(r.replica_id for r in deployment.replicas),
            weights=tuple(map(tuple, weights.tolist())),
            prompt_edges=prepared.prompt_edges,
            posterior=prepared.posterior,
        )

    @property
    def config_hash(self) -> str:
        """Of the settings, for manifests and logs."""
        text = json.dumps(asdict(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
