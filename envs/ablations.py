"""`python -m envs.ablations`: trains an experiment without one ingredient at a time, and compares.

Goes on where it was stopped: runs that have their result are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engine.config import load_config
from envs.experiment import build_experiment
from envs.experiment_config import read_config
from envs.pool import run_in_processes
from envs.resumable import exit_status
from envs.study.report import fill_page, table
from envs.training import BEST, RESULT, RunOptions, run_training, scorer
from policies.checkpoint import load_policy
from policies.curves import plot_curves
from policies.manifest import load_manifest

ROOT = Path(__file__).parents[1]
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "ablations.md"
RESULTS = ROOT / "benchmarks" / "results" / "ablations.json"
WHOLE = "whole"


class AblationsConfig(BaseModel):
    """Variants are settings by dotted key, over those that all have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="file of configs/")
    seeds: tuple[int, ...] = Field(min_length=1)
    score_windows: int = Field(24, ge=1, description="that nothing is chosen by")
    common: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Job:
    """One seed of one variant."""

    base: Path
    variant: str
    settings: Mapping[str, Any]
    seed: int
    score_windows: int
    out: Path


def run(job: Job) -> dict[str, Any]:
    """Train, then score on the windows of evaluation. Raises TidewrightErrors."""
    done = job.out / "ablation.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    config = read_config(job.base, dict(job.settings) | {"seed": job.seed})
    if not (job.out / RESULT).is_file():
        run_training(config, RunOptions(job.out, compare=False))
    policy, manifest = load_policy(job.out / BEST), load_manifest(job.out / BEST)
    more = config.evaluation.model_copy(update={"num_windows": job.score_windows})
    experiment = build_experiment(config.model_copy(update={"evaluation": more}))
    found = {
        "variant": job.variant,
        "seed": job.seed,
        "reward": scorer(experiment, experiment.validation_windows())(policy),
        "train_s": manifest["wall_s"],
        "reward_curve": manifest["reward_curve"],
        "validation_curve": manifest["validation_curve"],
    }
    done.write_text(json.dumps(found) + "\n")
    return found


def run_all(jobs: list[Job], number: int) -> list[dict[str, Any]]:
    """In the order of jobs. Raises TidewrightErrors."""
    found = {}
    for job, result in run_in_processes(run, jobs, number):
        found[job.out] = result
        print(f"{job.variant}, seed {job.seed}", file=sys.stderr, flush=True)
    return [found[job.out] for job in jobs]


# --------------------------------------------------------------------------------------
# The page


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A line per variant, the best first: mean reward per decision, over seeds that are paired."""
    by_variant: dict[str, dict[int, float]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], {})[result["seed"]] = float(result["reward"])
    whole = by_variant[WHOLE]
    found = []
    for name, rewards in by_variant.items():
        gains = [reward - whole[seed] for seed, reward in rewards.items() if seed in whole]
        values = list(rewards.values())
        found.append(
            (
                float(np.mean(values)),
                [
                    name,
                    f"{np.mean(values):.4f}",
                    f"{np.std(values):.4f}",
                    f"{np.mean(gains):+.4f}",
                    f"{sum(g > 0 for g in gains)} of {len(gains)}",
                ],
            )
        )
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def write_ablations(results: list[dict[str, Any]], page: Path) -> None:
    header = ("variant", "reward", "std over seeds", "against the whole", "seeds better")
    curves: dict[str, list[Any]] = {}
    for result in results:
        curves.setdefault(result["variant"], []).append(result["validation_curve"])
    plot_curves(page.with_suffix(".png"), curves)
    picture = f"![Validation while training, mean and spread of seeds]({page.stem}.png)"
    fill_page([table(rows(results), header), picture], page)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m envs.ablations", description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, default=CONFIGS / "ablations.yaml", help="variants (YAML)")
    add("--runs", type=Path, default=ROOT / "runs" / "ablations", help="folder of training runs")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--report", action="store_true", help="run nothing: make docs/ablations.md again")
    return parser.parse_args(arguments)


def make(args: argparse.Namespace) -> int:
    """Raises TidewrightErrors."""
    if not args.report:
        config: AblationsConfig = load_config(AblationsConfig, args.config, {})
        jobs = [
            Job(
                CONFIGS / f"{config.base}.yaml",
                name,
                config.common | settings,
                seed,
                config.score_windows,
                args.runs / f"{name.replace(' ', '-')}-seed{seed}",
            )
            for name, settings in config.variants.items()
            for seed in config.seeds
        ]
        found = run_all(jobs, args.jobs)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_ablations(json.loads(RESULTS.read_text()), PAGE)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: make(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
