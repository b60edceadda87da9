"""What an ExperimentConfig becomes: environments, comparisons, and a manifest's facts."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controller.build import build_pipeline, load_profiled_cluster, pipeline_facts
from controller.decision import DecisionPipeline
from controller.planner import Planner
from controller.slo import find_slo, read_slo
from engine.cluster import SloSpec, WorkloadTyping
from engine.profile import ProfiledCluster
from envs.build import engine_parts, surrogate_parts
from envs.experiment_config import ANY, ExperimentConfig, WorkloadSection
from envs.reward import RewardConfig, reward_config
from envs.scenarios import Disturbances, draw, draw_disturbances, draw_workload
from envs.serving_env import MakeTrace, ServingEnv, undisturbed
from envs.traces import load_trace
from envs.traffic import (
    Capacity,
    Source,
    draw_window,
    fastest_key,
    fit_trace_typing,
    generator_source,
    measure_capacity,
    measure_stretch,
    shape_trace,
    static_keys,
)
from envs.vec_env import ServingVecEnv
from envs.workload import Trace
from policies.evaluation import DecisionEnv, Evaluation


@dataclass(frozen=True, slots=True)
class Experiment:
    """Everything that training and evaluation share, built once."""

    config: ExperimentConfig
    cluster: ProfiledCluster
    typing: WorkloadTyping
    source: Source
    capacity: Capacity
    default_key: str  # always among the candidates; where evaluation starts
    reward: RewardConfig

    def pipeline(self) -> DecisionPipeline:
        config = self.config
        return build_pipeline(
            self.cluster, self.typing, config.decision, config.predictor, self.default_key
        )

    def facts(self) -> dict[str, Any]:
        """For the checkpoint's manifest; `controller.build.pipeline_from_facts` reads it."""
        config = self.config
        pipeline = pipeline_facts(
            self.cluster, self.typing, config.decision, config.predictor, self.default_key
        )
        return pipeline | {
            "config": config.model_dump(mode="json"),
            "slo": dataclasses.asdict(self.reward.slo),
            "training_load": {
                "best_static": self.capacity.key,
                "capacity_per_s": self.capacity.rate_per_s,
            },
            "seed": config.seed,
            "git_revision": git_revision(),
        }


def build_source(workload: WorkloadSection, max_tokens: int) -> Source:
    """Reads the trace, if there is one. Raises InvalidRequestError."""
    if workload.trace is None:
        rng = np.random.default_rng(0)
        return generator_source(workload.generator, workload.shaping, max_tokens, rng)
    return shape_trace(load_trace(workload.trace), workload.shaping, max_tokens)


def build_experiment(config: ExperimentConfig) -> Experiment:
    """Read profile and trace, fit the typing, measure capacity. Raises TidewrightErrors."""
    cluster = load_profiled_cluster(config.profile)
    source = build_source(config.workload, cluster.spec.model.max_model_len)
    sample = source.trace
    kinds = fit_trace_typing(sample, config.workload.num_types, seed=0)
    planner = build_pipeline(cluster, kinds, config.decision, config.predictor).planner
    capacity = measure_capacity(planner, sample, kinds)
    default_key = fastest_key(planner, capacity, config.workload.mean_load)
    slo = find_slo(config.slo, cluster.profile.device)
    reward = experiment_reward(planner, capacity, slo, config.env.device_hour_cost)
    return Experiment(config, cluster, kinds, source, capacity, default_key, reward)


def experiment_reward(
    planner: Planner, capacity: Capacity, slo: SloSpec, device_hour_cost: float
) -> RewardConfig:
    """The utility of configs/slo.yaml, with references at the traffic's own rates."""
    return reward_config(
        planner.cluster,
        read_slo().utility.spec,
        slo,
        measure_stretch(planner, capacity),
        device_hour_cost,
    )


def _episode_draws(
    experiment: Experiment, planner: Planner, group: int | None
) -> tuple[MakeTrace, Callable[[np.random.Generator], str]]:
    """Traffic and first deployment of an episode, drawn from the environment's generator; traffic
    by number of the episode in a group, so that its environments meet the same."""
    config, episode = experiment.config, itertools.count()
    keys, first = static_keys(planner), config.env.initial

    def make_trace(rng: np.random.Generator) -> Trace:
        if group is not None:
            rng = np.random.default_rng((config.seed, group, next(episode)))
        rate_per_s = float(rng.uniform(*config.workload.load)) * experiment.capacity.rate_per_s
        source, scenario = experiment.source, config.scenario
        if scenario is not None and source.generator is not None:
            drawn = draw_workload(scenario, source.generator, rng)
            source = dataclasses.replace(source, generator=drawn)
        return draw_window(source, rate_per_s, config.env.episode_s, rng)

    def draw_key(rng: np.random.Generator) -> str:
        return str(rng.choice(keys)) if first == ANY else first

    return make_trace, draw_key


def build_env(
    experiment: Experiment,
    planner: Planner | None = None,
    group: int | None = None,
    columns: bool = True,
    render_mode: str | None = None,
) -> ServingEnv:
    """A training environment: load, window, first deployment and profile drawn per episode.

    `planner`: one to share, since its caches hold no history and serve all environments.
    Environments of one group meet the same traffic in their n-th episode.
    """
    config, pipeline = experiment.config, experiment.pipeline()
    pipeline.planner = planner or pipeline.planner
    make_trace, draw_key = _episode_draws(experiment, pipeline.planner, group)
    parts = surrogate_parts(
        pipeline, make_trace, draw_key, experiment.reward, _draw_spread(config), columns
    )
    parts = dataclasses.replace(parts, make_disturbances=_disturber(experiment))
    return ServingEnv(parts, render_mode)


def _draw_spread(config: ExperimentConfig) -> Callable[[np.random.Generator], float]:
    scenario, fixed = config.scenario, config.env.spread
    return lambda rng: fixed if scenario is None else draw(scenario.spread, rng)


def _disturber(experiment: Experiment) -> Callable[[np.random.Generator, float], Disturbances]:
    scenario = experiment.config.scenario
    if scenario is None:
        return undisturbed
    devices = experiment.cluster.spec.num_devices
    return lambda rng, duration_s: draw_disturbances(scenario, devices, duration_s, rng)


def build_engine_env(
    experiment: Experiment, options: Mapping[str, Any], render_mode: str | None = None
) -> ServingEnv:
    """The same over a real engine, in real time; see `envs.build.engine_parts`."""
    pipeline = experiment.pipeline()
    make_trace, draw_key = _episode_draws(experiment, pipeline.planner, None)
    parts = engine_parts(pipeline, make_trace, draw_key, options, experiment.reward)
    parts = dataclasses.replace(parts, make_disturbances=_disturber(experiment))
    return ServingEnv(parts, render_mode)


def build_venv(experiment: Experiment) -> ServingVecEnv:
    """`num_envs` training environments in groups of `group_size`; the learner seeds them."""
    config, planner = experiment.config, experiment.pipeline().planner
    size = config.ppo.group_size
    groups = [None if size == 1 else i // size for i in range(config.env.num_envs)]
    envs = [build_env(experiment, planner, group) for group in groups]
    return ServingVecEnv(envs, config.env.num_threads)


def build_evaluation(
    pipeline: DecisionPipeline,
    windows: tuple[Trace, ...],
    reward: RewardConfig,
    initial_key: str,
) -> Evaluation[Trace]:
    """A comparison on fixed windows over the surrogate, exactly as profiled. One pipeline serves
    all episodes, one after another: it is reset at each start."""

    def make_env(window: Trace, key: str | None) -> DecisionEnv:
        parts = surrogate_parts(pipeline, lambda rng: window, key or initial_key, reward)
        return ServingEnv(parts)

    return Evaluation(make_env, windows)


def git_revision() -> str:
    """Commit of the source tree, with '+' when it has changes; empty outside a repository."""
    root = Path(__file__).parents[1]
    outputs = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        outputs.append(done.stdout.strip())
    return outputs[0] + ("+" if outputs[1] else "")
