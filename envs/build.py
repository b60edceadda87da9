"""Wires environments over the surrogate, from values or with the embedded defaults."""

from __future__ import annotations

from collections.abc import Callable
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
from envs.traffic import Shaping, draw_window, generator_source, measure_capacity
from envs.workload import WorkloadConfig

DEFAULT_PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "tiny_llama_cpu4.json"
NUM_TYPES = 4
FITTED = 20_000  # requests of the sample that types are fitted to
LONGEST_TOKENS = 4096  # hardly any request of the generator is longer


def surrogate_parts(
    pipeline: DecisionPipeline,
    make_trace: MakeTrace,
    initial_key: str | Callable[[np.random.Generator], str],
    reward: RewardConfig | None = None,
    spread: float = 0.0,
    slo: SloSpec | None = None,
    columns: bool = False,
) -> EnvParts:
    """Parts of an environment over the surrogate of the pipeline's cluster.

    `initial_key` names the first deployment of each episode, or draws it. `columns` is the fast
    path for training: no object per request, hence no outcomes to evaluate.
    """
    cluster = pipeline.cluster

    def make_cluster(rng: np.random.Generator) -> SurrogateCluster:
        key = initial_key if isinstance(initial_key, str) else initial_key(rng)
        initial = dense_deployment(parse_deployment_key(key))
        seed = int(rng.integers(2**31))
        return SurrogateCluster(cluster, initial, seed=seed, spread=spread, columns=columns)

    found = reward or reward_config(cluster)
    return EnvParts(pipeline, make_cluster, make_trace, found, slo or SloSpec(), columns)


def default_key(cluster: ProfiledCluster) -> str:
    """One single-device replica per device."""
    return f"{cluster.spec.num_devices}xtp1pp1"


def build_default_env(
    profile: str | Path = DEFAULT_PROFILE,
    load: float = 0.7,
    episode_s: float = 900.0,
    decision: DecisionConfig | None = None,
    spread: float = 0.0,
    columns: bool = False,
) -> ServingEnv:
    """`tidewright/Surrogate-v0`: generated traffic at `load` times the best static capacity, with
    lengths scaled to the profiled model's context."""
    cluster = load_profiled_cluster(Path(profile))
    context = cluster.spec.model.max_model_len
    shaping = Shaping(length_factor=context / LONGEST_TOKENS)
    source = generator_source(WorkloadConfig(), shaping, context, np.random.default_rng(0))
    prompt, output = source.trace.prompt_tokens, source.trace.output_tokens
    typing = fit_typing(prompt[:FITTED], output[:FITTED], NUM_TYPES, seed=0)
    pipeline = build_pipeline(cluster, typing, decision or DecisionConfig())
    rate_per_s = load * measure_capacity(pipeline.planner, source.trace, typing).rate_per_s
    return ServingEnv(
        surrogate_parts(
            pipeline,
            lambda rng: draw_window(source, rate_per_s, episode_s, rng),
            default_key(cluster),
            spread=spread,
            columns=columns,
        )
    )
