"""What judging a policy by logs needs: the policy, and a model of the system that wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controller.build import build_pipeline, load_profiled_cluster, pipeline_from_facts
from controller.decision import DecisionConfig, DecisionPipeline
from controller.roster import RULES, build_rule
from controller.slo import find_slo
from controller.workload import assign
from engine.cluster import (
    NO_SLO,
    SloSpec,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import CheckpointError, InvalidRequestError
from engine.profile import ProfiledCluster
from envs.build import DEFAULT_PROFILE
from envs.experiment import experiment_reward
from envs.logged import Part
from envs.reward import RewardConfig
from envs.serving_env import EnvParts, ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic import measure_capacity, pool_traces
from envs.workload import Trace
from policies.artifact import is_policy, load_shipped, manifest_of
from policies.base import Observation, Policy
from policies.ope_data import Floats


@dataclass(frozen=True, slots=True)
class Target:
    """A policy and what it would run in; `generator` is the version of what would propose its
    candidates."""

    name: str
    policy: Policy
    generator: str
    pipeline: DecisionPipeline
    reward: RewardConfig

    def model(self, part: Part, cluster: ProfiledCluster) -> ServingEnv:
        """The requests of a part of a log on the surrogate of a pool, from the deployment that the
        part begins in."""
        decision, _ = part.steps[0]
        initial = dense_deployment(parse_deployment_key(str(decision["deployment_key"])))
        trace = part.traffic.trace
        return ServingEnv(
            EnvParts(
                self.pipeline,
                lambda rng: SurrogateCluster(cluster, initial, columns=True),
                lambda rng: trace,
                self.reward,
                columns=True,
            )
        )


class MostProbable:
    """A policy that always does what it finds most probable."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, policy.name

    def reset(self) -> None:
        self.policy.reset()

    def probabilities(self, observation: Observation) -> Floats:
        found = self.policy.probabilities(observation)
        return np.asarray(np.eye(len(found))[int(np.argmax(found))])


def policy_folder(text: str) -> tuple[Path, str]:
    """FOLDER or FOLDER:MEMBER of a checkpoint or shipped policy. Raises CheckpointError."""
    folder, _, member = text.partition(":")
    if not is_policy(Path(folder)):
        raise CheckpointError(
            f"{text!r} is neither a rule ({', '.join(RULES)}) nor a folder with a checkpoint; give "
            "a folder that train.py wrote, or FOLDER:MEMBER of a shipped policy."
        )
    return Path(folder), member


def load_named(text: str, pipeline: DecisionPipeline) -> Policy:
    """A rule by name, or a checkpoint or shipped policy. Raises InvalidRequestError and
    CheckpointError."""
    if text in RULES:
        return build_rule(text, pipeline)
    folder, member = policy_folder(text)
    return load_shipped(folder, pipeline.observation_spec.hash, member)


def load_target(text: str, profile: Path | None, sampled: bool, parts: Sequence[Part]) -> Target:
    """`profile` None: that of the checkpoint, or the default one for a rule.

    Raises InvalidRequestError, and CheckpointError for a policy of other features than the log's.
    """
    cluster = load_profiled_cluster(profile) if profile is not None else None
    trace = _arrivals(parts)
    if text in RULES:
        pipeline = _pipeline_of_log(
            parts[0], cluster or load_profiled_cluster(DEFAULT_PROFILE), trace
        )
        policy, generator = load_named(text, pipeline), parts[0].generator
    else:
        policy, pipeline = _load_checkpoint(text, cluster, parts[0])
        generator = pipeline.config_hash
    _check_pool(pipeline.cluster, parts)
    policy = policy if sampled else MostProbable(policy)
    reward = logged_reward(pipeline, trace)
    return Target(text, policy, generator, pipeline, reward)


def _arrivals(parts: Sequence[Part]) -> Trace:
    """Of all parts, for their mix and lengths. Raises InvalidRequestError."""
    traces = [part.traffic.trace for part in parts if len(part.traffic.trace)]
    if not traces:
        raise InvalidRequestError(
            f"{parts[0].name} has no arrival in it; give logs of a time in which requests came."
        )
    return pool_traces(traces)


def _load_checkpoint(
    text: str, cluster: ProfiledCluster | None, part: Part
) -> tuple[Policy, DecisionPipeline]:
    folder, member = policy_folder(text)
    manifest = manifest_of(folder)
    pipeline = pipeline_from_facts(manifest, cluster)
    policy = load_shipped(folder, pipeline.observation_spec.hash, member)
    if pipeline.observation_spec.hash != part.spec.hash:
        raise CheckpointError(
            f"{text} was trained on features {pipeline.observation_spec.hash}, the log has "
            f"{part.spec.hash}: it cannot be asked about these decisions; log with its grid, types "
            "and number of candidates."
        )
    return policy, pipeline


def _pipeline_of_log(part: Part, cluster: ProfiledCluster, trace: Trace) -> DecisionPipeline:
    """As the controller that wrote the log had it, on that cluster."""
    header: dict[str, Any] = part.header
    types = tuple(WorkloadType(**t) for t in header["types"])
    even = WorkloadTyping(types, (1.0 / len(types),) * len(types))
    seen = np.bincount(assign(even, trace.prompt_tokens, trace.output_tokens), minlength=len(types))
    typing = WorkloadTyping(types, tuple((seen / seen.sum()).tolist()))
    known = DecisionConfig.__dataclass_fields__
    config = DecisionConfig(**{k: v for k, v in header["decision"].items() if k in known})
    name = str(header.get("predictor", "ewma4"))
    return build_pipeline(cluster, typing, config, "ewma4" if name.startswith("lstm") else name)


def _check_pool(cluster: ProfiledCluster, parts: Sequence[Part]) -> None:
    """Raises InvalidRequestError when the log's deployments do not fit."""
    keys = {str(d["deployment_key"]) for part in parts for d, _ in part.steps}
    used = {key: sum(c.num_devices for c in parse_deployment_key(key)) for key in keys}
    largest = max(used, key=lambda key: used[key])
    if used[largest] > cluster.spec.num_devices:
        raise InvalidRequestError(
            f"the log has a deployment of {used[largest]} devices ({largest}), the profile of "
            f"{cluster.profile.model} has {cluster.spec.num_devices}; give the profile of that "
            "pool with --profile."
        )


def logged_reward(pipeline: DecisionPipeline, trace: Trace) -> RewardConfig:
    """The utility of configs/slo.yaml, with references at the log's own mix and rates."""
    capacity = measure_capacity(pipeline.planner, trace, pipeline.typing)
    return experiment_reward(pipeline.planner, capacity, interactive(pipeline.cluster), 0.0)


def interactive(cluster: ProfiledCluster) -> SloSpec:
    """Its targets, none for a device that configs/slo.yaml does not know."""
    try:
        return find_slo("interactive", cluster.profile.device)
    except InvalidRequestError:
        return NO_SLO
