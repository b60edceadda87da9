"""Wires environments over the surrogate, from values or with the embedded defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig, DecisionPipeline
from controller.workload import fit_typing
from engine.cluster import SloSpec, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.reward import RewardConfig, reward_config
from envs.serving_env import EnvParts, MakeTrace, ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import Trace, WorkloadConfig, generate

DEFAULT_PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "tiny_llama_cpu4.json"
DEFAULT_NUM_TYPES = 4
FIT_S = 3600.0


def surrogate_parts(
    pipeline: DecisionPipeline,
    make_trace: MakeTrace,
    initial_key: str | Callable[[np.random.Generator], str],
    reward: RewardConfig | None = None,
    spread: float = 0.0,
    slo: SloSpec | None = None,
) -> EnvParts:
    """Parts of an environment over the surrogate of the pipeline's cluster.

    `initial_key` names the first deployment of each episode, or draws it.
    """
    cluster = pipeline.cluster

    def make_cluster(rng: np.random.Generator) -> SurrogateCluster:
        key = initial_key if isinstance(initial_key, str) else initial_key(rng)
        initial = dense_deployment(parse_deployment_key(key))
        seed = int(rng.integers(2**31))
        return SurrogateCluster(cluster, initial, seed=seed, spread=spread)

    found = reward or reward_config(cluster)
    return EnvParts(pipeline, make_cluster, make_trace, found, slo or SloSpec())


def generated_traces(config: WorkloadConfig, episode_s: float) -> MakeTrace:
    """A fresh trace of the embedded generator per episode."""
    return lambda rng: generate(config, episode_s, rng)


def trace_windows(trace: Trace, episode_s: float) -> MakeTrace:
    """A window of `trace` per episode, its start drawn uniformly."""

    def draw(rng: np.random.Generator) -> Trace:
        latest_s = max(trace.duration_s - episode_s, 0.0)
        return trace.window(float(rng.uniform(0.0, latest_s)), episode_s)

    return draw


def default_key(cluster: ProfiledCluster) -> str:
    """One single-device replica per device."""
    return f"{cluster.spec.num_devices}xtp1pp1"


def build_default_env(
    profile: str | Path = DEFAULT_PROFILE,
    workload: WorkloadConfig | None = None,
    decision: DecisionConfig | None = None,
    episode_s: float = 900.0,
    spread: float = 0.0,
) -> ServingEnv:
    """`tidewright/Surrogate-v0`: generated traffic, scaled to the profiled model's context."""
    cluster = load_profiled_cluster(Path(profile))
    config = workload or WorkloadConfig()
    config = replace(config, max_tokens=min(config.max_tokens, cluster.spec.model.max_model_len))
    sample = generate(config, FIT_S, np.random.default_rng(0))
    typing = fit_typing(sample.prompt_tokens, sample.output_tokens, DEFAULT_NUM_TYPES, seed=0)
    pipeline = build_pipeline(cluster, typing, decision or DecisionConfig())
    traces = generated_traces(config, episode_s)
    return ServingEnv(surrogate_parts(pipeline, traces, default_key(cluster), spread=spread))
