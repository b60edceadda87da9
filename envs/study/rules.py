"""The ladder: each rule as a pipeline, a policy and a way to carry switches out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controller.build import build_pipeline, pipeline_from_facts
from controller.decision import DecisionConfig, DecisionPipeline, PreparedDecision
from engine.cluster import Routing, SwitchMode, SwitchPlan, parse_deployment_key
from engine.errors import CheckpointError
from envs.lookahead import EnvOutlook
from envs.study.world import PREDICTOR, MakePolicy, World
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.rebalancing import RebalancingCluster
from policies.base import ObservationSpec, Policy
from policies.baselines import (
    GreedyPolicy,
    HysteresisConfig,
    HysteresisPolicy,
    KeepPolicy,
    MyopicPolicy,
    ScalingPolicy,
    WorkFunctionPolicy,
)
from policies.checkpoint import load_policy
from policies.guarded import GuardedConfig, GuardedPolicy
from policies.manifest import MANIFEST, load_manifest
from policies.mpc import MpcPolicy

SLOW_GRID_S = 60.0  # between decisions of rules that plan each minute, and of those that stay
ARTIFACTS = Path(__file__).parents[2] / "policies" / "artifacts"
MIN_OBSERVED_S = 60.0  # of traffic, before the first switch of any rule
MANY_ROWS = 24  # candidates of rules that count replicas
ALONE, TOGETHER = "trained, alone", "trained policies where they agree, else hysteresis"
LEARNED = (ALONE, TOGETHER)  # meanings of rules that were trained


Build = Callable[[World], DecisionPipeline]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the ladder. `meaning` is for readers."""

    name: str
    meaning: str
    pipeline: Build
    policy: MakePolicy
    cluster: type[SurrogateCluster] = SurrogateCluster


class LoadRouting(DecisionPipeline):
    """Routes by present load alone, whatever the type."""

    def routing_for(self, prepared: PreparedDecision) -> Routing:
        return Routing(tuple(r.replica_id for r in prepared.snapshot.deployment.replicas))


class ColdReload(DecisionPipeline):
    """Carries switches out by stopping the replicas that change and loading the others anew."""

    reload_s = 0.0

    def plan(self, prepared: PreparedDecision, row: int, decision_id: str) -> SwitchPlan:
        plan = super().plan(prepared, row, decision_id)
        return replace(plan, mode=SwitchMode.IN_PLACE, predicted_s=self.reload_s)


def _build(
    world: World, kind: type[DecisionPipeline] = DecisionPipeline, **settings: Any
) -> DecisionPipeline:
    config = DecisionConfig(min_observed_s=MIN_OBSERVED_S, **settings)
    built = build_pipeline(world.cluster, world.typing, config, PREDICTOR)
    if kind is DecisionPipeline:
        return built
    return kind(world.cluster, world.typing, built.config, built.predictor)


def rule_pipeline(world: World) -> DecisionPipeline:
    """What most rules decide with."""
    return _build(world, objective="latency")


def _pipeline(kind: type[DecisionPipeline] = DecisionPipeline, **settings: Any) -> Build:
    return lambda world: _build(world, kind, **settings)


def _oserve_cold(world: World) -> DecisionPipeline:
    built = _build(world, ColdReload, planner="oserve", grid_s=SLOW_GRID_S)
    assert isinstance(built, ColdReload)
    built.reload_s = world.config.reload_s
    return built


def _scaling(world: World) -> DecisionPipeline:
    """Replicas of the configuration that the pool starts with, one to as many as fit."""
    (parallel, *_), devices = parse_deployment_key(world.initial_key), world.cell.devices
    profile = world.cluster.profile
    only = tuple(s for s in profile.steps if s.parallel == parallel)
    cluster = replace(world.cluster, profile=replace(profile, steps=only))
    counting: dict[str, Any] = {"objective": "cost", "give_back": True, "max_candidates": MANY_ROWS}
    built = _build(replace(world, cluster=cluster), **counting, grid_s=SLOW_GRID_S)
    most = devices // parallel.num_devices
    built.planner.standing = tuple((parallel,) * n for n in range(1, most + 1))
    return built


def _of_spec(make: Callable[[ObservationSpec], Policy]) -> MakePolicy:
    return lambda pipeline, env: make(pipeline.observation_spec)


def ladder(world: World, tuned: HysteresisConfig) -> list[Rule]:
    """All but static deployments, learned policies and the beam, in order."""
    mpc, seed = world.config.mpc, world.config.seed

    def looking(clairvoyant: bool) -> MakePolicy:
        config = replace(mpc, num_futures=1) if clairvoyant else mpc
        return lambda pipeline, env: MpcPolicy(EnvOutlook(env, clairvoyant, seed), config)

    fast: dict[str, Any] = {"objective": "latency"}
    slow = fast | {"grid_s": SLOW_GRID_S}
    equal: dict[str, Any] = {"homogeneous": True}
    oserve = _pipeline(planner="oserve", grid_s=SLOW_GRID_S)
    rules = [
        Rule("keep", "the first deployment throughout", _pipeline(**slow), static_policy()),
        Rule(
            "homogeneous_replanned",
            "equal replicas, each minute the fastest with headroom",
            _pipeline(**slow, **equal),
            _of_spec(MyopicPolicy),
        ),
        Rule(
            "oserve_cold",
            "OServe's planner each minute; replicas that change are loaded anew",
            _oserve_cold,
            _of_spec(MyopicPolicy),
        ),
        Rule(
            "oserve",
            "OServe's planner each minute, a live switch whenever it differs",
            oserve,
            _of_spec(MyopicPolicy),
        ),
        Rule(
            "replanned",
            "the exact plan each minute: the fastest with headroom, unequal replicas allowed",
            _pipeline(**slow),
            _of_spec(MyopicPolicy),
        ),
        Rule(
            "scaling",
            "like Dynamo: as few equal replicas as hold",
            _scaling,
            _of_spec(ScalingPolicy),
        ),
        Rule(
            "greedy",
            "like Nitsum: at each decision the fastest that holds",
            _pipeline(**fast),
            _of_spec(GreedyPolicy),
        ),
        Rule(
            "llumnix",
            "like Llumnix: the first deployment, the least loaded replica first, running requests "
            "go from full replicas to empty ones",
            lambda world: static_pipeline(world, by_load=True),
            static_policy(),
            RebalancingCluster,
        ),
        hysteresis_rule(tuned),
        Rule(
            "hysteresis_equal",
            "the same over equal replicas only",
            _pipeline(**fast, **equal),
            hysteresis_policy(tuned),
        ),
        Rule("work_function", "the work function", rule_pipeline, _of_spec(WorkFunctionPolicy)),
    ]
    if world.cell.ladder == "failures":
        names = ("keep", "homogeneous_replanned", "oserve", "replanned", "hysteresis")
        return [rule for rule in rules if rule.name in names]
    if world.cell.ladder == "policy":
        peers = ("keep", "oserve", "greedy", "hysteresis")
        rules = [rule for rule in rules if rule.name in peers]
    if world.cell.ladder == "full":
        rules += [
            Rule("mpc", "looks ahead on draws from the forecast", rule_pipeline, looking(False)),
            Rule("mpc_perfect", "looks ahead on the true future", rule_pipeline, looking(True)),
        ]
    return rules


def _seeds(world: World) -> dict[str, Path]:
    """The checkpoints of the cell's policy by name. Raises CheckpointError."""
    assert world.cell.policy is not None
    folder = ARTIFACTS / world.cell.policy
    seeds = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    if not seeds:
        raise CheckpointError(f"{folder} has no folders with checkpoints, such as seed0.")
    return seeds


def _trained_pipeline(world: World) -> DecisionPipeline:
    """The one that the cell's policy was trained with."""
    first = next(iter(_seeds(world).values()))
    return pipeline_from_facts(load_manifest(first), world.cluster)


def alone(world: World) -> list[Rule]:
    """Each checkpoint by itself. Raises CheckpointError."""

    def always(policy: Policy) -> MakePolicy:
        return lambda pipeline, env: policy

    return [
        Rule(f"ppo {name}", ALONE, _trained_pipeline, always(load_policy(folder)))
        for name, folder in _seeds(world).items()
    ]


def guarded_rule(world: World, tuned: HysteresisConfig, config: GuardedConfig) -> Rule:
    """All checkpoints together, guarded by hysteresis. Raises CheckpointError."""
    members = tuple(load_policy(folder) for folder in _seeds(world).values())

    def together(spec: ObservationSpec) -> Policy:
        return GuardedPolicy(members, HysteresisPolicy(spec, tuned), config)

    return Rule("guarded", TOGETHER, _trained_pipeline, _of_spec(together))


def hysteresis_policy(tuned: HysteresisConfig) -> MakePolicy:
    return _of_spec(lambda spec: HysteresisPolicy(spec, tuned))


def hysteresis_rule(tuned: HysteresisConfig) -> Rule:
    meaning = "break-even, tuned on training days"
    return Rule("hysteresis", meaning, rule_pipeline, hysteresis_policy(tuned))


def static_policy() -> MakePolicy:
    return _of_spec(lambda spec: KeepPolicy())


def static_pipeline(world: World, by_load: bool = False) -> DecisionPipeline:
    """For deployments that stay; `by_load`: requests go where least is going on."""
    kind = LoadRouting if by_load else DecisionPipeline
    return _build(world, kind, objective="latency", grid_s=SLOW_GRID_S)
