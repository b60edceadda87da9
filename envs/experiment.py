"""What an ExperimentConfig becomes: environments, comparisons, and a manifest's facts."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from controller.build import build_pipeline, load_profiled_cluster, pipeline_facts
from controller.decision import DecisionPipeline
from controller.planner import Planner
from controller.slo import find_slo, read_slo
from engine.cluster import SloSpec, WorkloadTyping
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.ablated import BlindPipeline
from envs.build import engine_parts, surrogate_parts
from envs.experiment_config import ANY, ExperimentConfig, WorkloadSection
from envs.reward import RewardConfig, reward_config
from envs.scenarios import (
    Disturbances,
    ScenarioConfig,
    draw,
    draw_disturbances,
    draw_workload,
)
from envs.serving_env import MakeTrace, ServingEnv, undisturbed
from envs.traces import load_trace
from envs.traffic import (
    Capacity,
    Source,
    draw_window,
    evaluation_windows,
    fastest_key,
    fit_trace_typing,
    generator_source,
    measure_capacity,
    measure_stretch,
    pool_traces,
    shape_trace,
    static_keys,
)
from envs.vec_env import ServingVecEnv, WorkerVecEnv
from envs.workload import Trace, WorkloadConfig, gusts
from policies.evaluation import DecisionEnv, Evaluation


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """A source of traffic, and the rate that stands for load 1."""

    source: Source
    capacity: Capacity

    def draw(
        self,
        load: float,
        duration_s: float,
        rng: np.random.Generator,
        scenario: ScenarioConfig | None,
    ) -> Trace:
        """A window for training; of a trace, with the levels and bursts of the scenario on top."""
        source, rate_per_s = self.source, load * self.capacity.rate_per_s
        if scenario is None:
            return draw_window(source, rate_per_s, duration_s, rng)
        drawn = draw_workload(scenario, source.generator or WorkloadConfig(), rng)
        if source.generator is None:
            return gusts(drawn, draw_window(source, rate_per_s, duration_s, rng), rng)
        source = dataclasses.replace(source, generator=drawn)
        return draw_window(source, rate_per_s, duration_s, rng)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Everything that training and evaluation share, built once."""

    config: ExperimentConfig
    cluster: ProfiledCluster
    typing: WorkloadTyping
    sources: tuple[LoadedSource, ...]  # an episode draws one
    default_key: str  # always among the candidates; where evaluation starts
    reward: RewardConfig

    def pipeline(self) -> DecisionPipeline:
        config = self.config
        whole = build_pipeline(
            self.cluster, self.typing, config.decision, config.predictor, self.default_key
        )
        return BlindPipeline.of(whole, config.hide)

    def facts(self) -> dict[str, Any]:
        """For the checkpoint's manifest; `controller.build.pipeline_from_facts` reads it."""
        config = self.config
        pipeline = pipeline_facts(
            self.cluster, self.typing, config.decision, config.predictor, self.default_key
        )
        capacities = [s.capacity for s in self.sources]
        return pipeline | {
            "config": config.model_dump(mode="json", exclude={"workload": {"folder"}}),
            "slo": dataclasses.asdict(self.reward.slo),
            "training_load": [
                {"best_static": c.key, "capacity_per_s": c.rate_per_s} for c in capacities
            ],
            "seed": config.seed,
            "git_revision": git_revision(),
        }

    def validation_windows(self) -> tuple[Trace, ...]:
        """Windows of every source, on the days and at the seed of the evaluation section.

        Raises InvalidRequestError.
        """
        section = self.config.evaluation
        return self._windows(section.num_windows, section.seed)

    def selection_windows(self) -> tuple[Trace, ...]:
        """What the best policy of a run is chosen by: the same at another seed, so that it is not
        chosen by what it is compared on. Of traces the same spans are resampled."""
        section = self.config.evaluation
        return self._windows(section.eval_episodes or section.num_windows, section.seed + 1)

    def _windows(self, number: int, seed: int) -> tuple[Trace, ...]:
        section, workload = self.config.evaluation, self.config.workload
        sources = self.sources
        if section.days is not None:
            days = workload.model_copy(update={"days": section.days})
            read = build_sources(days, self.cluster.spec.model.max_model_len)
            sources = tuple(
                LoadedSource(source, trained.capacity)
                for source, trained in zip(read, self.sources, strict=True)
            )
        return tuple(
            window
            for loaded in sources
            for load in section.loads or (workload.mean_load,)
            for window in evaluation_windows(
                loaded.source,
                load * loaded.capacity.rate_per_s,
                number,
                section.window_s,
                [seed],
            )
        )


def build_sources(workload: WorkloadSection, max_tokens: int) -> tuple[Source, ...]:
    """Reads the traces, if there are any. Raises InvalidRequestError."""
    if not workload.files:
        rng = np.random.default_rng(0)
        return (generator_source(workload.generator, workload.shaping, max_tokens, rng),)
    return tuple(shape_trace(load_trace(f), workload.shaping, max_tokens) for f in workload.files)


def build_experiment(config: ExperimentConfig) -> Experiment:
    """Read profile and traces, fit the typing, measure capacity. Raises TidewrightErrors."""
    cluster = load_profiled_cluster(config.profile)
    if config.num_devices is not None:
        spec = dataclasses.replace(cluster.spec, num_devices=config.num_devices)
        cluster = dataclasses.replace(cluster, spec=spec)
    sources = build_sources(config.workload, cluster.spec.model.max_model_len)
    pooled = pool_traces([source.trace for source in sources])
    kinds = fit_trace_typing(pooled, config.workload.num_types, seed=0)
    planner = build_pipeline(cluster, kinds, config.decision, config.predictor).planner
    loaded = tuple(LoadedSource(s, measure_capacity(planner, s.trace, kinds)) for s in sources)
    capacity = measure_capacity(planner, pooled, kinds)
    default_key = fastest_key(planner, capacity, config.workload.mean_load)
    slo = find_slo(config.slo, cluster.profile.device)
    reward = experiment_reward(planner, capacity, slo, config.env.device_hour_cost)
    return Experiment(config, cluster, kinds, loaded, default_key, reward)


def experiment_reward(
    planner: Planner, capacity: Capacity, slo: SloSpec, device_hour_cost: float
) -> RewardConfig:
    """The utility of configs/slo.yaml, with references at the traffic's own rates."""
    lone = reward_config(planner.cluster, read_slo().utility.spec, slo, device_hour_cost)
    return dataclasses.replace(lone, stretch=measure_stretch(planner, capacity, lone))


def initial_keys(config: ExperimentConfig, planner: Planner) -> tuple[str, ...]:
    """The deployments that an episode may start in."""
    first = config.env.initial
    if first == ANY:
        return tuple(static_keys(planner))
    return (first,) if isinstance(first, str) else first


def _episode_draws(
    experiment: Experiment, planner: Planner, group: int | None, first_episode: int = 0
) -> tuple[MakeTrace, Callable[[np.random.Generator], str]]:
    """Traffic and first deployment of an episode, drawn from the environment's generator; traffic
    by number of the episode in a group, so that its environments meet the same."""
    config, episode = experiment.config, itertools.count(first_episode)
    keys = initial_keys(config, planner)

    def make_trace(rng: np.random.Generator) -> Trace:
        if group is not None:
            rng = np.random.default_rng((config.seed, group, next(episode)))
        load = float(rng.uniform(*config.workload.load))
        loaded = experiment.sources[int(rng.integers(len(experiment.sources)))]
        return loaded.draw(load, config.env.episode_s, rng, config.scenario)

    def draw_key(rng: np.random.Generator) -> str:
        return str(rng.choice(keys)) if len(keys) > 1 else keys[0]

    return make_trace, draw_key


def build_env(
    experiment: Experiment,
    planner: Planner | None = None,
    group: int | None = None,
    columns: bool = True,
    render_mode: str | None = None,
    first_episode: int = 0,
) -> ServingEnv:
    """A training environment: load, window, first deployment and profile drawn per episode.

    `planner`: one to share, since its caches hold no history and serve all environments.
    Environments of one group meet the same traffic in their n-th episode, from `first_episode` on.
    """
    config, pipeline = experiment.config, experiment.pipeline()
    pipeline.planner = planner or pipeline.planner
    make_trace, draw_key = _episode_draws(experiment, pipeline.planner, group, first_episode)
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


def build_envs(
    experiment: Experiment, numbers: Sequence[int], num_timesteps: int = 0
) -> list[ServingEnv]:
    """The training environments of these numbers, in groups of `group_size`, with one planner. A
    run that goes on after `num_timesteps` decisions meets the groups' episodes after those."""
    config, planner = experiment.config, experiment.pipeline().planner
    size = config.ppo.group_size
    groups = [None if size == 1 else i // size for i in numbers]
    per_episode = max(1, round(config.env.episode_s / config.decision.grid_s))
    first = -(-num_timesteps // (config.env.num_envs * per_episode))
    return [build_env(experiment, planner, group, first_episode=first) for group in groups]


def build_venv(experiment: Experiment, num_timesteps: int = 0) -> ServingVecEnv | WorkerVecEnv:
    """`num_envs` training environments; the learner seeds them. The caller closes it. Raises
    InvalidRequestError."""
    section = experiment.config.env
    make_envs = partial(build_envs, experiment, num_timesteps=num_timesteps)
    if section.num_workers > section.num_envs:
        raise InvalidRequestError(
            f"env.num_workers is {section.num_workers} and env.num_envs {section.num_envs}; "
            "expected an environment for each worker, at least: set num_workers to fewer."
        )
    if not section.num_workers:
        return ServingVecEnv(make_envs(range(section.num_envs)), section.num_threads)
    spec, workers = experiment.pipeline().observation_spec, section.num_workers
    return WorkerVecEnv(make_envs, spec, section.num_envs, workers, section.num_threads)


def build_evaluation(
    pipeline: DecisionPipeline,
    windows: tuple[Trace, ...],
    reward: RewardConfig,
    initial_key: str,
    engine: Mapping[str, Any] | None = None,
) -> Evaluation[Trace]:
    """A comparison on fixed windows over the surrogate, exactly as profiled, or over real engines
    with those options, in real time. One pipeline serves all episodes, one after another: it is
    reset at each start."""

    def make_env(window: Trace, key: str | None) -> DecisionEnv:
        def make_trace(rng: np.random.Generator) -> Trace:
            return window

        first = key or initial_key
        if engine is None:
            return ServingEnv(surrogate_parts(pipeline, make_trace, first, reward))
        return ServingEnv(engine_parts(pipeline, make_trace, first, engine, reward))

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
