"""Several training runs: seeds of one experiment, here or on a Ray cluster, with equal results."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.errors import InvalidRequestError
from envs.experiment_config import ExperimentConfig
from envs.training import Run, RunOptions, run_training
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
    (options.out / "result.json").write_text(json.dumps(summary, indent=1) + "\n")
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
            yield from tasks.results(tasks.start(job) for job in jobs)
        return
    for job in jobs:
        run = run_training(*job)
        yield run
        if run.interrupted:
            return


class RayTasks:
    """Runs as tasks of a Ray cluster, a CPU each."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._run = ray.remote(num_cpus=1)(_run_elsewhere)
        self.num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def start(self, job: Job) -> Any:
        return self._run.remote(os.getcwd(), *job)

    def results(self, handles: Iterable[Any]) -> Iterator[Run]:
        """In the order of handles."""
        for handle in list(handles):
            yield self._ray.get(handle)

    def first_of(self, handles: Sequence[Any]) -> Any:
        """The handle of a run that has ended; waits for one."""
        ended, _ = self._ray.wait(list(handles), num_returns=1)
        return ended[0]


def _run_elsewhere(folder: str, config: ExperimentConfig, options: RunOptions) -> Run:
    os.chdir(folder)  # paths of a configuration are relative to where training was started
    return run_training(config, dataclasses.replace(options, progress=False))


@contextmanager
def ray_cluster(address: str) -> Iterator[RayTasks]:
    """A cluster at an address; "local": one on this machine that ends with the block."""
    try:
        import ray
    except ImportError as error:
        raise InvalidRequestError("--ray needs Ray; install it with 'tidewright[ray]'.") from error
    where = None if address == "local" else address
    try:
        ray.init(where, log_to_driver=False, include_dashboard=False if where is None else None)
    except (ConnectionError, ValueError) as error:
        raise InvalidRequestError(
            f"no Ray cluster can be reached at {address!r} ({error}); give the address of one, or "
            "'local'."
        ) from error
    try:
        yield RayTasks(ray)
    finally:
        ray.shutdown()
