"""Several training runs: seeds of one experiment, here or on a Ray cluster, with equal results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from engine.errors import InvalidRequestError
from envs.experiment_config import ExperimentConfig
from envs.ray_tasks import ray_cluster
from envs.training import RESULT, Run, RunOptions, run_training
from policies.curves import plot_curves

Job = tuple[ExperimentConfig, RunOptions]


def run_seeds(
    config: ExperimentConfig, options: RunOptions, number: int, ray_address: str | None
) -> tuple[dict[str, Any], bool]:
    """`number` seeds from the config's on, each in a folder seedN of `options.out`, and their
    learning curves with bands. Gives a summary and whether one was interrupted."""
    if number < 1:
        raise InvalidRequestError(f"the number of seeds must be 1 or more, got {number}.")
    jobs = [seed_job(config, options, config.seed + i) for i in range(number)]
    runs = list(run_jobs(jobs, ray_address))
    states = [run.state for run in runs]
    plot_curves(
        options.out / "learning_curve.png",
        {
            "episode reward": [s.reward_curve for s in states],
            "validation": [s.validation_curve for s in states],
        },
    )
    summary = {"seeds": [run.summary for run in runs]}
    (options.out / RESULT).write_text(json.dumps(summary, indent=1) + "\n")
    return summary, any(run.interrupted for run in runs)


def seed_job(config: ExperimentConfig, options: RunOptions, seed: int) -> Job:
    out = options.out / f"seed{seed}"
    resume = options.resume and out.is_dir()  # seeds after the interrupted one have not begun
    return (
        config.model_copy(update={"seed": seed}),
        dataclasses.replace(options, out=out, resume=resume),
    )


def run_jobs(jobs: Sequence[Job], ray_address: str | None) -> Iterator[Run]:
    """Runs in the order of jobs, one after another, or as Ray tasks; an interrupted run is the
    last. Raises InvalidRequestError where Ray is missing or cannot be reached."""
    if ray_address is not None:
        with ray_cluster(ray_address) as tasks:
            yield from tasks.results([tasks.start(train_quietly, *job) for job in jobs])
        return
    for job in jobs:
        run = run_training(*job)
        yield run
        if run.interrupted:
            return


def train_quietly(config: ExperimentConfig, options: RunOptions) -> Run:
    """For a task elsewhere."""
    return run_training(config, dataclasses.replace(options, progress=False))
