"""`python -m envs.results`: trains every seed of every experiment, scores all, writes the cards.

Goes on where it was stopped: a seed that has its result and a cell that has its own are not made
again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from engine.config import load_config
from envs.experiment_config import read_config
from envs.pool import run_in_processes
from envs.resumable import exit_status
from envs.shipping import decide_default, ship_seeds, verdict_of_cells, write_card
from envs.study.__main__ import main as run_study
from envs.study.config import StudyConfig
from envs.study.results import read_results, results_of
from envs.training import BEST, RESULT, RunOptions, run_training

ROOT = Path(__file__).parents[1]
CONFIGS, ARTIFACTS = ROOT / "configs", ROOT / "policies" / "artifacts"


class ResultsConfig(BaseModel):
    """What is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiments: tuple[str, ...] = Field(min_length=1, description="files of configs/")
    seeds: tuple[int, ...] = Field(min_length=1)
    study: str = Field(description="file of configs/ with the cells")


@dataclass(frozen=True, slots=True)
class Job:
    """One seed of one experiment."""

    experiment: str
    seed: int
    traces: Path | None
    out: Path

    @property
    def is_done(self) -> bool:
        return (self.out / RESULT).is_file()


def train_seed(job: Job) -> bool:
    """Whether it went through to its end. Raises TidewrightErrors."""
    overrides = {"seed": job.seed, "workload.folder": job.traces and str(job.traces)}
    config = read_config(CONFIGS / f"{job.experiment}.yaml", overrides)
    run = run_training(config, RunOptions(job.out, save_freq=20_000, compare=False))
    return not run.interrupted


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m envs.results", description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, default=CONFIGS / "results.yaml", help="what is made (YAML)")
    add("--traces", type=Path, help="folder of trace files")
    add("--runs", type=Path, default=ROOT / "runs", help="folder of training runs")
    add("--jobs", type=int, default=2, help="seeds, and then cells, at a time")
    add("--only", nargs="*", help="experiments; default: all")
    return parser.parse_args(arguments)


def train_all(jobs: list[Job], number: int) -> None:
    """Raises TidewrightErrors."""
    left = [job for job in jobs if not job.is_done]
    for count, (job, _) in enumerate(run_in_processes(train_seed, left, number), 1):
        print(f"{count}/{len(left)} {job.experiment} seed {job.seed}", file=sys.stderr)


def _score_left(
    name: str, study: StudyConfig, chosen: Sequence[str], args: argparse.Namespace, more: bool
) -> int:
    """Run the cells of these experiments that have no result yet; with `more`, those that are run
    with more windows to tune on. The exit status of the study."""
    done = read_results(results_of(name, more))
    cells = (study.with_more_tuning() if more else study).cells
    left = [c.name for c in cells if c.policy in chosen and c.name not in done]
    if not left:
        return 0
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--jobs", str(args.jobs)]
    options += ["--traces", str(args.traces)] if args.traces else []
    options += ["--more-tuning"] if more else []
    return run_study([*options, "--cells", *left])


def make(args: argparse.Namespace) -> int:
    """Train, score, write; an exit status. Raises TidewrightErrors."""
    config: ResultsConfig = load_config(ResultsConfig, args.config, {})
    study_path = CONFIGS / f"{config.study}.yaml"
    study: StudyConfig = load_config(StudyConfig, study_path, {})
    chosen = [e for e in config.experiments if args.only is None or e in args.only]
    for name in chosen:
        jobs = [
            Job(name, seed, args.traces, args.runs / f"{name}-seed{seed}") for seed in config.seeds
        ]
        train_all(jobs, args.jobs)
        ship_seeds({f"seed{job.seed}": job.out / BEST for job in jobs}, ARTIFACTS / name, study)
    for more in (False, True):
        code = _score_left(config.study, study, chosen, args, more)
        if code:
            return code
    results = list(read_results(results_of(config.study)).values())
    for name in chosen:
        decide_default(results, ARTIFACTS / name)
        how = (
            f"`make results TRACES=FOLDER`, or one seed with\n`python train.py --config "
            f"configs/{name}.yaml --traces FOLDER --seed 0`."
        )
        write_card(ARTIFACTS / name, verdict_of_cells(ARTIFACTS / name, results), how)
    return run_study(["--config", str(study_path), "--report"])


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: make(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
