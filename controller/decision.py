"""The decision pipeline: the code between a snapshot and a switch plan, in training and in
production alike. It reaches no cluster: events and snapshots come in, decisions go out."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller.guardrails import Circumstances, GuardrailConfig, Review, mask_reasons, review
from controller.last_good import LastGood
from controller.monitor import Monitor, MonitorState
from controller.observation import Situation, build_observation, observation_spec
from controller.planner import Planner, dead_replicas
from controller.predictor import Forecast, Predictor
from controller.scheduler import DeploymentScheduler, SchedulerConfig
from controller.scoring import Capacity, Objective, PlannerConfig
from controller.service_model import kv_cost_params
from controller.slo_rates import SloRates
from controller.solvers import SolverName
from controller.transition import TransitionRoom
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
    parse_deployment_key,
)
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from policies.base import Observation, ObservationSpec

Floats = NDArray[np.float64]
KEEP = 0


@dataclass(frozen=True, slots=True)
class DecisionConfig:
    """Everything the pipeline can be told; seconds unless said otherwise."""

    grid_s: float = 15.0  # between decisions
    max_candidates: int = 12  # rows, keep included
    min_dwell_s: float = 60.0
    min_observed_s: float = 0.0  # of traffic, before the first switch: unknown is not zero
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
    min_coverage: float = 1.0  # these four: see `controller.guardrails`
    max_capacity_change: float = 0.5
    in_place_max_load: float = 0.5
    clearly_worse: float = 0.25

    def __post_init__(self) -> None:
        positive = ("grid_s", "window_s", "stale_after_s", "max_utilisation")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        if wrong or self.max_candidates < 2 or not 0 <= self.routing_floor < 0.5:
            raise InvalidRequestError(
                f"decision settings need {', '.join(positive)} > 0, max_candidates >= 2 and "
                f"routing_floor in [0, 0.5), got {asdict(self)}."
            )

    @property
    def guardrails(self) -> GuardrailConfig:
        return GuardrailConfig(
            min_headroom=self.min_headroom,
            min_coverage=self.min_coverage,
            max_capacity_change=self.max_capacity_change,
            in_place_max_load=self.in_place_max_load,
            clearly_worse=self.clearly_worse,
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
    circumstances: Circumstances | None = None  # what the mask follows from


@dataclass(frozen=True, slots=True)
class Restraints:
    """What whoever runs the pipeline knows against switches: reasons of `guardrails.RULES`."""

    not_now: tuple[str, ...] = ()  # against any
    banned: Mapping[str, str] = field(default_factory=dict)  # against some, by deployment key
    waived: frozenset[str] = frozenset()  # rules that do not count this time


NO_RESTRAINTS = Restraints()


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


def _unmarked(step: str) -> None:
    """Nobody measures how long the steps take."""


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
        self.guards = config.guardrails
        self._last_good = LastGood()
        self._room = TransitionRoom(cluster.spec, self.planner.configs)
        self.mark: Callable[[str], None] = _unmarked  # called as each step ends
        self._capacity: tuple[object, dict[ParallelConfig, list[float]]] = (None, {})
        self.observation_spec: ObservationSpec = observation_spec(
            len(typing.types), config.max_candidates, config.grid_s
        )
        self.reset(0.0)

    def reset(self, now_s: float) -> None:
        """Forget all traffic and switches; the planner's caches hold no history and stay."""
        self.monitor.reset(now_s)
        self.predictor.reset()
        self.scheduler.reset(now_s)
        self._last_good.reset()
        self._lost_events = False
        self._present: tuple[ParallelConfig, ...] | None = None
        self._last: tuple[ParallelConfig, ...] | None = None
        self._num_decisions = 0

    def saved(self) -> dict[str, Any]:
        """What `restore` takes; traffic is not in it, but can be observed again."""
        configs = (self._present, self._last)
        keys = ["" if c is None else deployment_key(c) for c in configs]
        return {"scheduler": self.scheduler.saved(), "present": keys[0], "last": keys[1]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.scheduler.restore(saved["scheduler"])
        self._present, self._last = (
            parse_deployment_key(saved[name]) if saved[name] else None
            for name in ("present", "last")
        )

    def take_interval(self, to_s: float) -> None:
        """Ends an interval whose events were observed: the predictor learns its rates, unless
        some of them were lost."""
        lost, self._lost_events = self._lost_events, False
        if self.monitor.interval_s(to_s) >= 0.5 * self.config.grid_s:
            rates = self.monitor.take_interval(to_s)
            if not lost:
                self.predictor.observe(rates)

    def sibling(self) -> DecisionPipeline:
        """One for another cluster like this: the planner is shared, the history its own."""
        twin = copy.copy(self)
        twin.monitor = Monitor(self.typing, self.config.window_s, self.config.stale_after_s)
        twin.predictor = copy.deepcopy(self.predictor)
        twin.scheduler = DeploymentScheduler(self.scheduler.config)
        twin._last_good = LastGood()
        twin.mark = _unmarked
        twin._room = TransitionRoom(self.cluster.spec, self.planner.configs)
        twin.reset(0.0)
        return twin

    def observe(self, events: Iterable[ClusterEvent], num_lost: int = 0) -> None:
        """Take in events; each exactly once, in order of time. When some were lost, the rates of
        the interval are unknown: the forecast stands, and no switch is decided on it."""
        self.monitor.observe(events)
        self._lost_events |= num_lost > 0

    # -- prepare ------------------------------------------------------------------------

    def prepare(
        self, snapshot: ClusterSnapshot, restraints: Restraints = NO_RESTRAINTS
    ) -> PreparedDecision:
        """From a snapshot to what the policy sees. Advances the predictor by one interval.

        Raises InvalidRequestError for a snapshot whose time is no number.
        """
        snapshot = self._last_good.fill(snapshot)
        self.scheduler.observe(snapshot.switch)
        self._follow(snapshot)
        lost = self._lost_events
        self.take_interval(snapshot.now_s)
        state = self.monitor.state(snapshot)
        self.mark("monitor")
        forecast = self.predictor.forecast()
        self.mark("forecast")
        lengths = np.array([state.prompt_tokens, state.output_tokens]).T
        recent = self.monitor.recent_counts(snapshot.now_s)
        mixing = self.monitor.posterior.mixing
        candidates = self.planner.propose(snapshot, forecast, self._last, lengths, recent, mixing)
        self.mark("propose")
        unknown = state.observed_s < self.config.min_observed_s - 1e-9
        waits = (*restraints.not_now, *self.scheduler.reasons(snapshot.now_s))
        now = Circumstances(
            spec=self.cluster.spec,
            snapshot=snapshot,
            is_stale=state.is_stale or lost,
            not_now=("unobserved", *waits) if unknown else waits,
            banned=restraints.banned,
            capacity=self._capacities(lengths, mixing),
            demand=forecast.q90,
            dead=dead_replicas(snapshot),
            is_in_place=self._in_place(snapshot),
        )
        reasons = mask_reasons(now, candidates, self.guards, restraints.waived)
        self.mark("admit")
        since_s = self.scheduler.since_switch_s(snapshot.now_s)
        situation = Situation(self.cluster.spec, snapshot, state, forecast, since_s)
        observation = build_observation(self.observation_spec, situation, candidates, reasons)
        posterior = self.monitor.posterior
        self.mark("prepare")
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
            now,
        )

    def _capacities(self, lengths: Floats, mixing: Floats) -> dict[ParallelConfig, list[float]]:
        """Requests per second of each type that one replica takes, as headroom counts it."""
        scorer = self.planner.scorer
        rates = scorer.headroom_rates(scorer.lengths_key(lengths, mixing))
        if self._capacity[0] is not rates:
            self._capacity = (
                rates,
                dict(zip(self.planner.configs, rates.tolist(), strict=True)),
            )
        return self._capacity[1]

    def _in_place(self, snapshot: ClusterSnapshot) -> Callable[[Candidate], bool]:
        def found(candidate: Candidate) -> bool:
            used = snapshot.kv_blocks_used
            return self._room.is_in_place(snapshot.deployment, used, candidate.configs)

        return found

    def _follow(self, snapshot: ClusterSnapshot) -> None:
        """Remember the deployment before the present one, for undo."""
        configs = snapshot.deployment.configs
        before, self._present = self._present, configs
        if before is None or before == configs:
            return
        if deployment_key(before) != deployment_key(configs):
            self._last = before

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
        self.mark("review")
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
            self.mark("plan")
        decision = self._decision(prepared, action, found, plan, policy_name, name)
        self.mark("resolve")
        return decision

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
        keys, origin = prepared.observation.keys, prepared.candidates[found.executed].origin
        return Decision(
            decision_id=decision_id,
            at_s=prepared.at_s,
            action=action,
            chosen_key=keys[action] if 0 <= action < len(keys) else "",
            executed_key=keys[found.executed],
            propensity=found.propensity,
            policy=policy_name,
            reason=origin if not found.vetoes else f"keep: {found.vetoes[0]}",
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
        ids = tuple(r.replica_id for r in deployment.replicas)
        dead = dead_replicas(prepared.snapshot)
        num_live = len(ids) - len(dead)
        if not num_live:
            return Routing(ids)
        floor = min(self.config.routing_floor, 0.5 / num_live)
        weights = np.maximum(np.array(keep.routing, np.float64), floor)
        if dead:
            weights[:, sorted(dead)] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
        return Routing(
            replica_ids=ids,
            weights=tuple(map(tuple, weights.tolist())),
            prompt_edges=prepared.prompt_edges,
            posterior=prepared.posterior,
        )

    @property
    def config_hash(self) -> str:
        """Of the settings, for manifests and logs."""
        text = json.dumps(asdict(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
