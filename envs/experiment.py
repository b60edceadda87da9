"""ExperimentConfig and what is built from it: environments, comparisons, and a manifest's facts."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import subprocess
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from controller.build import build_pipeline, load_profiled_cluster, pipeline_facts
from controller.decision import DecisionConfig, DecisionPipeline
from controller.planner import Planner
from controller.workload import fit_typing
from engine.cluster import SloSpec, WorkloadTyping
from engine.config import validate
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.build import DEFAULT_PROFILE, engine_parts, surrogate_parts
from envs.serving_env import MakeTrace, ServingEnv
from envs.traces import load_trace
from envs.traffic import (
    Capacity,
    Shaping,
    Source,
    draw_window,
    fastest_key,
    generator_source,
    measure_capacity,
    shape_trace,
    static_keys,
)
from envs.vec_env import ServingVecEnv
from envs.workload import Trace, WorkloadConfig
from policies.evaluation import DecisionEnv, Evaluation
from policies.ppo import PpoConfig

ANY = "any"
MAX_FITTED = 50_000  # requests that the typing is fitted on


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkloadSection(_Section):
    """Traffic: a trace file, or the embedded generator."""

    trace: Path | None = Field(default=None, description="CSV; null: the embedded generator")
    days: tuple[int, int] | None = Field(default=None, description="first, last; from 1")
    compress: float = Field(default=1.0, gt=0, description="time runs so many times faster")
    length_factor: float = Field(default=1.0, gt=0, description="multiplies lengths in tokens")
    load: tuple[float, float] = Field(
        default=(0.7, 0.7),
        description="range; share of best static capacity, drawn per episode",
    )
    num_types: int = Field(default=4, ge=1, description="workload types")
    generator: WorkloadConfig = Field(
        default_factory=WorkloadConfig, description="its mean rate is set by `load`"
    )

    @property
    def shaping(self) -> Shaping:
        return Shaping(self.days, self.compress, self.length_factor)

    @property
    def mean_load(self) -> float:
        return sum(self.load) / 2


class EnvSection(_Section):
    """Training environments."""

    num_envs: int = Field(default=16, ge=1, description="stepped together")
    episode_s: float = Field(default=3600.0, gt=0, description="seconds of an episode")
    spread: float = Field(default=0.1, ge=0, description="of step and switch times, in ln")
    initial: str = Field(default=ANY, description="first deployment; 'any': drawn per episode")


class EvaluationSection(_Section):
    """The comparison at the end of training, on traffic of its own seed."""

    num_windows: int = Field(default=3, ge=1)
    window_s: float = Field(default=1800.0, gt=0, description="seconds of a window")
    seed: int = Field(default=1_000_003, ge=0)


class ExperimentConfig(_Section):
    """One published experiment: one YAML file in configs/."""

    profile: Path = Field(default=DEFAULT_PROFILE, description="measured cluster JSON")
    workload: WorkloadSection = Field(default_factory=WorkloadSection)
    decision: DecisionConfig = DecisionConfig()
    predictor: str = Field(default="ewma4", description="naive or ewmaH")
    slo: SloSpec = SloSpec(ttft_s=1.0, tpot_s=0.1)
    env: EnvSection = Field(default_factory=EnvSection)
    ppo: PpoConfig = PpoConfig()
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    seed: int = Field(default=0, ge=0)


# --------------------------------------------------------------------------------------
# Reading


def read_config(path: Path, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """An ExperimentConfig from YAML; overrides are by dotted key, None overrides nothing.

    Raises InvalidRequestError in one sentence: unreadable file, unknown key, or wrong value.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"config {path} is not YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise InvalidRequestError(f"config {path} must hold keys and values, such as 'seed: 0'.")
    check_keys(ExperimentConfig, values, str(path))
    given: dict[str, Any] = {}
    for key, value in overrides.items():
        if value is not None:
            _set(given, key.split("."), value)
    check_keys(ExperimentConfig, given, "the settings")
    values = _merged(values, given)
    config = validate(ExperimentConfig, values, str(path))
    if config.ppo.group_size < 1 or config.env.num_envs % config.ppo.group_size:
        raise InvalidRequestError(
            f"env.num_envs must be a multiple of ppo.group_size in {path}, got "
            f"{config.env.num_envs} and {config.ppo.group_size}."
        )
    return config


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` with what is given in their place, at any depth."""
    merged = dict(values)
    for key, value in given.items():
        old = merged.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def check_keys(kind: type[Any], values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuse keys that `kind` (a pydantic model or a dataclass) does not have, at any depth."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    else:
        names = list(kind.model_fields)
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}."
            raise InvalidRequestError(f"unknown key {prefix + str(key)!r} in {where}; {hint}")
        inner = hints[key]
        section = isinstance(inner, type) and (
            dataclasses.is_dataclass(inner) or issubclass(inner, BaseModel)
        )
        if isinstance(value, dict) and section:
            check_keys(inner, value, where, f"{prefix}{key}.")


# --------------------------------------------------------------------------------------
# Building


@dataclass(frozen=True, slots=True)
class Experiment:
    """Everything that training and evaluation share, built once."""

    config: ExperimentConfig
    cluster: ProfiledCluster
    typing: WorkloadTyping
    source: Source
    capacity: Capacity
    default_key: str  # always among the candidates; where evaluation starts

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
            "slo": dataclasses.asdict(config.slo),
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
    step = max(1, len(sample) // MAX_FITTED)
    lengths = sample.prompt_tokens[::step], sample.output_tokens[::step]
    kinds = fit_typing(*lengths, config.workload.num_types, seed=0)
    planner = build_pipeline(cluster, kinds, config.decision, config.predictor).planner
    capacity = measure_capacity(planner, sample, kinds)
    default_key = fastest_key(planner, capacity, config.workload.mean_load)
    return Experiment(config, cluster, kinds, source, capacity, default_key)


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
        return draw_window(experiment.source, rate_per_s, config.env.episode_s, rng)

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
    spread, slo = config.env.spread, config.slo
    parts = surrogate_parts(pipeline, make_trace, draw_key, spread=spread, slo=slo, columns=columns)
    return ServingEnv(parts, render_mode)


def build_engine_env(
    experiment: Experiment, options: Mapping[str, Any], render_mode: str | None = None
) -> ServingEnv:
    """The same over a real engine, in real time; see `envs.build.engine_parts`."""
    pipeline = experiment.pipeline()
    make_trace, draw_key = _episode_draws(experiment, pipeline.planner, None)
    parts = engine_parts(pipeline, make_trace, draw_key, options, slo=experiment.config.slo)
    return ServingEnv(parts, render_mode)


def build_venv(experiment: Experiment) -> ServingVecEnv:
    """`num_envs` training environments in groups of `group_size`; the learner seeds them."""
    config, planner = experiment.config, experiment.pipeline().planner
    size = config.ppo.group_size
    groups = [None if size == 1 else i // size for i in range(config.env.num_envs)]
    return ServingVecEnv([build_env(experiment, planner, group) for group in groups])


def build_evaluation(
    pipeline: DecisionPipeline, windows: tuple[Trace, ...], slo: SloSpec, initial_key: str
) -> Evaluation[Trace]:
    """A comparison on fixed windows over the surrogate, exactly as profiled. One pipeline serves
    all episodes, one after another: it is reset at each start."""

    def make_env(window: Trace, key: str | None) -> DecisionEnv:
        parts = surrogate_parts(pipeline, lambda rng: window, key or initial_key, slo=slo)
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
