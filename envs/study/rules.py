"""The ladder: each rule as a pipeline, a policy and a way to carry switches out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import ArrayLike

from controller.build import build_pipeline
from controller.decision import DecisionConfig, DecisionPipeline, PreparedDecision
from engine.cluster import (
    Decision,
    Routing,
    SwitchMode,
    parse_deployment_key,
)
from envs.lookahead import EnvOutlook
from envs.study.world import PREDICTOR, MakePolicy, World
from policies.base import ObservationSpec, Policy
from policies.baselines import (
    EveryPolicy,
    GreedyPolicy,
    HysteresisConfig,
    HysteresisPolicy,
    KeepPolicy,
    MyopicPolicy,
    ScalingPolicy,
    WorkFunctionPolicy,
)
from policies.mpc import MpcPolicy

STATIC_GRID_S = 60.0  # between routings of deployments that stay
MANY_ROWS = 24  # candidates of rules that count replicas


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the ladder. `meaning` is for readers."""

    name: str
    meaning: str
    pipeline: Callable[[World], DecisionPipeline]
    policy: MakePolicy
    initial_key: Callable[[World], str] | None = None


class LoadRouting(DecisionPipeline):
    """Routes by present load alone, whatever the type."""

    def routing_for(self, prepared: PreparedDecision) -> Routing:
        return Routing(tuple(r.replica_id for r in prepared.snapshot.deployment.replicas))


class ColdReload(DecisionPipeline):
    """Carries switches out by stopping the replicas that change and loading the others anew."""

    reload_s = 0.0

    def resolve(
        self,
        prepared: PreparedDecision,
        action: int,
        probabilities: ArrayLike | None = None,
        policy_name: str = "",
        decision_id: str | None = None,
    ) -> Decision:
        found = super().resolve(prepared, action, probabilities, policy_name, decision_id)
        if found.plan is None:
            return found
        plan = replace(found.plan, mode=SwitchMode.IN_PLACE, predicted_s=self.reload_s)
        return replace(found, plan=plan)


def _build(
    world: World, kind: type[DecisionPipeline] = DecisionPipeline, **settings: Any
) -> DecisionPipeline:
    built = build_pipeline(world.cluster, world.typing, DecisionConfig(**settings), PREDICTOR)
    if kind is DecisionPipeline:
        return built
    return kind(world.cluster, world.typing, built.config, built.predictor)


def rule_pipeline(world: World) -> DecisionPipeline:
    """What most rules decide with."""
    return _build(world, objective="latency")


def _homogeneous(world: World) -> DecisionPipeline:
    return _build(world, objective="latency", homogeneous=True)


def _oserve(world: World) -> DecisionPipeline:
    return _build(world, planner="oserve")


def _oserve_cold(world: World) -> DecisionPipeline:
    built = _build(world, ColdReload, planner="oserve")
    assert isinstance(built, ColdReload)
    built.reload_s = world.config.reload_s
    return built


def _scaling(world: World) -> DecisionPipeline:
    """Replicas of the configuration that the pool starts with, one to as many as fit."""
    (parallel, *_), devices = parse_deployment_key(world.initial_key), world.cell.devices
    profile = world.cluster.profile
    only = tuple(s for s in profile.steps if s.parallel == parallel)
    cluster = replace(world.cluster, profile=replace(profile, steps=only))
    built = build_pipeline(
        cluster,
        world.typing,
        DecisionConfig(objective="cost", give_back=True, max_candidates=MANY_ROWS),
        PREDICTOR,
    )
    most = devices // parallel.num_devices
    built.planner.standing = tuple((parallel,) * n for n in range(1, most + 1))
    return built


def _periodic(make: Callable[[ObservationSpec], Policy]) -> Callable[..., Policy]:
    def build(pipeline: DecisionPipeline, env: Any) -> Policy:
        return make(pipeline.observation_spec)

    return build


def ladder(world: World, tuned: HysteresisConfig) -> list[Rule]:
    """All but the static deployments and the beam, in order."""
    every, mpc = world.config.replan_decisions, world.config.mpc

    def replanned(spec: ObservationSpec) -> Policy:
        return EveryPolicy(MyopicPolicy(spec), every)

    def looking(clairvoyant: bool) -> MakePolicy:
        def build(pipeline: DecisionPipeline, env: Any) -> Policy:
            outlook = EnvOutlook(env, clairvoyant, world.config.seed)
            config = replace(mpc, num_futures=1) if clairvoyant else mpc
            return MpcPolicy(outlook, config)

        return build

    minute = f"each {every * DecisionConfig().grid_s:g} s"
    rules = [
        Rule(
            "keep",
            "the first deployment throughout",
            rule_pipeline,
            _periodic(lambda s: KeepPolicy()),
        ),
        Rule(
            "homogeneous_replanned",
            f"equal replicas, planned anew {minute}: the fastest with headroom",
            _homogeneous,
            _periodic(replanned),
        ),
        Rule(
            "oserve_cold",
            f"OServe's planner {minute}; replicas that change are loaded anew",
            _oserve_cold,
            _periodic(replanned),
        ),
        Rule(
            "oserve",
            f"OServe's planner {minute}, a live switch whenever it differs",
            _oserve,
            _periodic(replanned),
        ),
        Rule(
            "replanned",
            f"the exact plan {minute}: the fastest with headroom, unequal replicas allowed",
            rule_pipeline,
            _periodic(replanned),
        ),
        Rule(
            "scaling",
            "like Dynamo: as many equal replicas as needed",
            _scaling,
            _periodic(lambda s: EveryPolicy(ScalingPolicy(s), every)),
        ),
        Rule(
            "greedy",
            "like Nitsum: the fastest that holds, at each decision",
            rule_pipeline,
            _periodic(GreedyPolicy),
        ),
        Rule(
            "hysteresis",
            "break-even, tuned on training days",
            rule_pipeline,
            _periodic(lambda s: HysteresisPolicy(s, tuned)),
        ),
        Rule(
            "hysteresis_equal",
            "the same over equal replicas only",
            _homogeneous,
            _periodic(lambda s: HysteresisPolicy(s, tuned)),
        ),
        Rule(
            "work_function",
            "the work-function algorithm",
            rule_pipeline,
            _periodic(WorkFunctionPolicy),
        ),
    ]
    if world.cell.ladder == "failures":
        names = ("keep", "homogeneous_replanned", "oserve", "replanned", "hysteresis")
        return [rule for rule in rules if rule.name in names]
    if world.cell.ladder == "full":
        rules += [
            Rule("mpc", "looks ahead on draws from the forecast", rule_pipeline, looking(False)),
            Rule("mpc_perfect", "looks ahead on the true future", rule_pipeline, looking(True)),
        ]
    return rules


def hysteresis_settings(world: World) -> list[HysteresisConfig]:
    tuning = world.config.tuning
    return [
        HysteresisConfig(horizon_s, ticks, margin)
        for horizon_s in tuning.horizon_s
        for ticks in tuning.num_ticks
        for margin in tuning.margin
    ]


def hysteresis_policy(tuned: HysteresisConfig) -> MakePolicy:
    return _periodic(lambda spec: HysteresisPolicy(spec, tuned))


def static_policy() -> MakePolicy:
    return _periodic(lambda spec: KeepPolicy())


def static_pipeline(world: World, by_load: bool = False) -> DecisionPipeline:
    """For deployments that stay; `by_load`: requests go where least is going on."""
    kind = LoadRouting if by_load else DecisionPipeline
    return _build(world, kind, objective="latency", grid_s=STATIC_GRID_S)
