"""What evaluate.py judges a checkpoint on: its own pipeline, a trace, load and windows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.build import load_profiled_cluster, pipeline_from_facts
from controller.decision import DecisionPipeline
from engine.cluster import SloSpec, dense_deployment, parse_deployment_key
from engine.config import validate
from engine.errors import CheckpointError, InvalidRequestError
from envs.experiment import build_sources, experiment_reward
from envs.experiment_config import ExperimentConfig, WorkloadSection
from envs.reward import RewardConfig
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic import Capacity, Source, evaluation_windows, measure_capacity
from envs.workload import Trace
from policies.artifact import load_shipped, manifest_of
from policies.base import Policy


@dataclass(frozen=True, slots=True)
class SettingOptions:
    """None leaves what the policy was trained with."""

    trace: Path | None = None  # None: the embedded generator
    days: str | None = None  # such as "8-10" or "3"
    load: float | None = None
    length_factor: float | None = None
    profile: Path | None = None
    member: str = ""  # of an artifact: see `policies.artifact.load_shipped`
    initial: str | None = None
    num_windows: int = 6
    window_s: float = 3600.0
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Setting:
    """One comparison, ready to run; `notes` say in sentences what was done to the traffic."""

    policy: Policy
    pipeline: DecisionPipeline
    windows: tuple[Trace, ...]
    reward: RewardConfig
    initial_key: str
    notes: tuple[str, ...]
    facts: dict[str, Any]


def parse_days(text: str | None) -> tuple[int, int] | None:
    """ "8-10" -> (8, 10); both days included. Raises InvalidRequestError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise InvalidRequestError(f"days {text!r} are not understood; expected such as 8-10 or 3.")
    return int(match[1]), int(match[2] or match[1])


def _workload(trained: ExperimentConfig, options: SettingOptions) -> WorkloadSection:
    """The policy's training traffic with what the options change; training days never carry over
    to another trace."""
    values: dict[str, Any] = trained.workload.model_dump()
    values |= {
        "trace": options.trace,
        "traces": (),
        "folder": Path(),
        "days": parse_days(options.days),
    }
    if options.length_factor is not None:
        values["length_factor"] = options.length_factor
    if options.load is not None:
        values["load"] = (options.load, options.load)
    return validate(WorkloadSection, values, "the command line")


def _trained_config(folder: Path, manifest: Mapping[str, Any]) -> ExperimentConfig:
    if "config" not in manifest:
        raise CheckpointError(f"checkpoint {folder} was not written by train.py: it has no config.")
    return validate(ExperimentConfig, manifest["config"], f"the manifest of {folder}")


def build_setting(folder: Path, options: SettingOptions) -> Setting:
    """Load the checkpoint, shape the trace, draw the windows. Raises TidewrightErrors."""
    _check(options)
    manifest = manifest_of(folder)
    trained = _trained_config(folder, manifest)
    cluster = load_profiled_cluster(options.profile) if options.profile else None
    pipeline = pipeline_from_facts(manifest, cluster)
    policy = load_shipped(folder, pipeline.observation_spec.hash, options.member)
    workload = _workload(trained, options)
    (source,) = build_sources(workload, pipeline.cluster.spec.model.max_model_len)
    if source.trace.duration_s <= 0:
        raise InvalidRequestError(
            f"trace {workload.trace} has {len(source.trace)} request and no duration; give one "
            "with requests at different times, of as long as the windows are together."
        )
    capacity = measure_capacity(pipeline.planner, source.trace, pipeline.typing)
    rate_per_s = workload.mean_load * capacity.rate_per_s
    windows = evaluation_windows(
        source, rate_per_s, options.num_windows, options.window_s, options.seeds
    )
    initial_key = options.initial or str(manifest["default_deployment"])
    initial = dense_deployment(parse_deployment_key(initial_key))
    SurrogateCluster(pipeline.cluster, initial)  # refuses what does not fit or has no profile
    return Setting(
        policy,
        pipeline,
        windows,
        experiment_reward(
            pipeline.planner,
            capacity,
            SloSpec(**manifest["slo"]),
            trained.env.device_hour_cost,
        ),
        initial_key,
        _notes(workload, options, source, capacity, windows),
        _facts(folder, workload, options, capacity, rate_per_s, source),
    )


def _check(options: SettingOptions) -> None:
    if options.num_windows < 1 or options.window_s <= 0 or not options.seeds:
        raise InvalidRequestError(
            f"evaluation needs at least one window of positive length and one seed, got "
            f"{options.num_windows} windows of {options.window_s} s and seeds {options.seeds}."
        )
    if options.load is not None and options.load <= 0:
        raise InvalidRequestError(f"load must be positive, got {options.load}; try 0.7.")
    if min(options.seeds) < 0:
        raise InvalidRequestError(f"seeds must not be negative, got {options.seeds}.")


def _notes(
    workload: WorkloadSection,
    options: SettingOptions,
    source: Source,
    capacity: Capacity,
    windows: tuple[Trace, ...],
) -> tuple[str, ...]:
    rate_per_s, total_s = workload.mean_load * capacity.rate_per_s, source.trace.duration_s
    days = "all days" if workload.days is None else f"days {workload.days[0]}-{workload.days[1]}"
    if source.generator is not None:
        origin = f"traffic: the embedded generator at a mean of {rate_per_s:.3f} requests/s"
    else:
        origin = (
            f"traffic: {workload.trace}, {days}, {len(source.trace)} requests in {total_s:.0f} s, "
            f"{source.trace.num_failed} failed ones of the file left out "
            f"({source.trace.mean_rate_per_s:.3f}/s); windows resampled to a mean of "
            f"{rate_per_s:.3f} requests/s, time as it was"
        )
    return (
        f"{origin}; lengths times {workload.length_factor:g}, cut to {source.max_tokens} tokens",
        f"load {workload.mean_load:g} of {capacity.rate_per_s:.3f} requests/s, which "
        f"{capacity.key} sustains on the mean mix by the planner's estimate",
        f"{options.num_windows} windows of {options.window_s:g} s evenly spaced, seeds "
        f"{', '.join(map(str, options.seeds))}: {sum(map(len, windows))} requests, the same for "
        "every policy, on the surrogate; all act through the same mask and guardrails",
    )


def _facts(
    folder: Path,
    workload: WorkloadSection,
    options: SettingOptions,
    capacity: Capacity,
    rate_per_s: float,
    source: Source,
) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "trace": None if workload.trace is None else str(workload.trace),
        "days": workload.days,
        "load": workload.mean_load,
        "capacity_per_s": round(capacity.rate_per_s, 6),
        "capacity_of": capacity.key,
        "rate_per_s": round(rate_per_s, 6),
        "source_rate_per_s": round(source.trace.mean_rate_per_s, 6),
        "length_factor": workload.length_factor,
        "num_windows": options.num_windows,
        "window_s": options.window_s,
        "seeds": options.seeds,
    }
