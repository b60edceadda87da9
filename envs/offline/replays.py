"""Policies x traces x loads x seeds, replayed on the surrogate: one job each, in processes.

All policies of a cell (a trace at a load with a seed) meet the same windows, drawn alike in every
process. A finished job leaves one file, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidRequestError
from envs.build import surrogate_parts
from envs.logged_replay import replay_policy
from envs.offline.course import Course, Watched, ledger_of_keys
from envs.offline.files import write_json
from envs.offline.paired import Rewards
from envs.offline.target import MostProbable, load_named
from envs.pool import run_in_processes
from envs.ray_tasks import run_on_ray
from envs.serving_env import ServingEnv
from envs.setting import Setting, SettingOptions, build_setting
from envs.traffic import static_keys
from policies.base import Policy
from policies.baselines import KeepPolicy

SCHEMA = 1
STATIC = "static "


@dataclass(frozen=True, slots=True)
class Ground:
    """What all policies of a run share; `checkpoint` says the pool and the pipeline."""

    checkpoint: Path
    options: SettingOptions  # of one cell: its trace, load and seed


@dataclass(frozen=True, slots=True)
class Job:
    """One policy on one cell. A policy is a rule, FOLDER[:MEMBER] or "static KEY"."""

    ground: Ground
    policy: str

    @property
    def facts(self) -> dict[str, Any]:
        options = asdict(self.ground.options)
        told = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        told["seeds"] = list(self.ground.options.seeds)  # as it is read back
        return {"checkpoint": str(self.ground.checkpoint), "policy": self.policy} | told

    def file(self, folder: Path) -> Path:
        """Where its result is kept; another for other facts, or other files of these names."""
        text = json.dumps([SCHEMA, self.facts, _stamps(self)], sort_keys=True, default=str)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _stamps(job: Job) -> list[Any]:
    """Sizes and times of the files that a job reads, as far as they are there."""
    named = [job.ground.checkpoint, job.ground.options.trace, job.ground.options.profile]
    named.append(Path(job.policy.partition(":")[0]))
    files = [f for path in filter(None, named) for f in (path, *path.glob("**/*.json"))]
    found = [(str(f), f.stat()) for f in sorted(set(files)) if f.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@lru_cache(maxsize=4)
def setting_of(ground: Ground) -> Setting:
    """Once per process and cell. Raises TidewrightErrors."""
    return build_setting(ground.checkpoint, ground.options)


def run_job(job: Job) -> dict[str, Any]:
    """Rewards, figures and keys of each window, as plain JSON."""
    setting = setting_of(job.ground)
    courses = (course_of_policy(setting, job.policy, i) for i in range(len(setting.windows)))
    windows = [_figures(course) for course in courses]
    return job.facts | {
        "scale_requests": setting.reward.scale_requests,
        "grid_s": setting.pipeline.observation_spec.grid_s,
        "windows": windows,
    }


def course_of_policy(setting: Setting, name: str, number: int) -> Course:
    """One window under a policy by name, as `Job` has it."""
    key, policy = setting.initial_key, _policy(setting, name)
    if name.startswith(STATIC):
        key = name.removeprefix(STATIC)
    window, reward = setting.windows[number], setting.reward
    parts = surrogate_parts(setting.pipeline, lambda rng: window, key, reward, columns=True)
    env, watched = ServingEnv(parts), Watched(reward.slo)
    run = replay_policy(env, policy, np.random.default_rng(number), True, watched)
    env.close()
    at_s = env.grid_s * np.arange(len(run.reward), dtype=np.float64)
    return Course(
        name,
        at_s,
        run.keys,
        run.reward,
        np.array(watched.arrived, np.float64),
        *watched.ended(),
        env.grid_s,
        ledger_of_keys(at_s.tolist(), run.keys),
    )


def _policy(setting: Setting, name: str) -> Policy:
    if name.startswith(STATIC):
        return KeepPolicy()
    return MostProbable(load_named(name, setting.pipeline))


def _figures(course: Course) -> dict[str, Any]:
    latency_s = course.latency_s

    def percentile(q: float) -> float:
        return round(float(np.percentile(latency_s, q)), 6) if len(latency_s) else 0.0

    return {
        "seconds": len(course.at_s) * course.grid_s,
        "reward": np.round(course.reward, 9).tolist(),
        "arrived": course.arrived.tolist(),
        "finished": len(latency_s),
        "latency_mean_s": round(course.latency_mean_s, 6),
        "latency_p50_s": percentile(50),
        "latency_p99_s": percentile(99),
        "slo": float(course.met.sum()),
        "switches": len(course.switches),
    }


def rewards_of(result: dict[str, Any]) -> list[Rewards]:
    return [Rewards(np.array(w["reward"]), np.array(w["arrived"])) for w in result["windows"]]


# --------------------------------------------------------------------------------------
# Many


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is to be replayed."""

    checkpoint: Path
    policies: tuple[str, ...]
    options: SettingOptions
    traces: tuple[Path | None, ...] = (None,)
    loads: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    statics: bool = False  # also every static deployment, for the regret to the best

    def grounds(self) -> list[Ground]:
        return [
            Ground(self.checkpoint, replace(self.options, trace=trace, load=load, seeds=(seed,)))
            for trace in self.traces
            for load in self.loads
            for seed in self.seeds
        ]

    def jobs(self) -> list[Job]:
        """Raises TidewrightErrors for what cannot be run, before anything is."""
        if len(set(self.policies)) < len(self.policies) or not self.policies:
            raise InvalidRequestError(
                f"each policy is given once, at least one; got {', '.join(self.policies) or 'none'}"
            )
        first = setting_of(self.grounds()[0])
        for policy in self.policies:
            if not policy.startswith(STATIC):
                load_named(policy, first.pipeline)
        keys = static_keys(first.pipeline.planner) if self.statics else []
        named = (*self.policies, *(STATIC + key for key in keys))
        return [Job(ground, policy) for ground in self.grounds() for policy in named]


def run_all(
    jobs: Sequence[Job], folder: Path | None, processes: int, ray_address: str | None = None
) -> Iterator[tuple[Job, dict[str, Any], bool]]:
    """Each job with its result, and whether it was there already; in the order they end. On a Ray
    cluster where an address is given: its machines see the same files."""
    missing = []
    for job in jobs:
        found = _read(job.file(folder)) if folder is not None else None
        if found is None:
            missing.append(job)
        else:
            yield job, found, True
    for job, result in _run(missing, processes, ray_address):
        if folder is not None:
            write_json(job.file(folder), result)
        yield job, result, False


def _run(
    jobs: Sequence[Job], processes: int, ray_address: str | None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    if ray_address is not None:
        return run_on_ray(run_job, jobs, ray_address)
    if processes == 1:
        return ((job, run_job(job)) for job in jobs)
    return run_in_processes(run_job, jobs, processes)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found
