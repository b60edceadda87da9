"""`python -m envs.demo_policy`: trains, tunes and scores the policy of the demo.

Goes on where it was stopped: seeds that have their result are not trained again. The rule and the
guard are tuned on generated traffic of their own, and scored on other, at several loads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.config import load_config
from envs.offline.replay_command import follow, gain_over, summary
from envs.offline.replays import Plan
from envs.offline.tune_command import run as tune
from envs.results import ARTIFACTS, ROOT, Job, train_all
from envs.resumable import exit_status
from envs.setting import SettingOptions
from envs.shipping import ship_seeds, write_card
from envs.study.config import POLICY_STUDY, StudyConfig
from envs.study.report import table
from envs.training import BEST
from policies.artifact import GUARDED, HYSTERESIS, read_artifact, write_artifact

NAME, SEEDS = "demo", (0, 1, 2, 3, 4)
WINDOW_S, NUM_WINDOWS = 600.0, 12
TUNED_ON, SCORED_ON = 1, (11, 12)  # seeds of the traffic
GUARDS = ("--margins", "30", "2", "0.5", "0.2", "0", "--agreements", "0.8", "0.6")
LOADS = (0.4, 0.7, 0.95)
LIMITS = """**Limits.** It knows the demo's four CPU workers as one machine was profiled, and the
demo's traffic, which changes far faster than real traffic does; it is there to be watched. For real
traffic train one on it, or begin with a policy for GPUs."""


def score(folder: Path, load: float, processes: int) -> tuple[list[str], Any, Any]:
    """A line of the card, and the results of the guarded policy and of the rule."""
    members = read_artifact(folder).members
    names = tuple(f"{folder}:{name}" for name in (HYSTERESIS, GUARDED, *members))
    options = SettingOptions(num_windows=NUM_WINDOWS, window_s=WINDOW_S)
    jobs = Plan(folder, names, options, (None,), (load,), SCORED_ON).jobs()
    results = follow(jobs, None, processes, shows=sys.stderr.isatty())
    told = summary(jobs, results, names)["policies"]
    by_policy = {name: [r for j, r in zip(jobs, results, strict=True) if j.policy == name]
                 for name in names}  # fmt: skip
    rule, guarded = by_policy[names[0]], by_policy[names[1]]
    gain = gain_over(guarded, rule)
    assert gain.interval is not None, "two hours are enough for one"
    alone = [told[name]["j"] - told[names[0]]["j"] for name in names[2:]]
    line = [
        f"{load:g}",
        f"{told[names[0]]['j']:.4f}",
        f"{gain.gain_j:+.4f}",
        f"{gain.interval[0]:+.4f} to {gain.interval[1]:+.4f}",
        f"{sum(alone) / len(alone):+.4f}",
        f"{told[names[1]]['switches_per_hour']:g}",
    ]
    return line, guarded, rule


def decide(folder: Path, processes: int) -> str:
    """Score it, set the default by the stop rule, and say so for the card."""
    lines, guarded, rule = [], [], []
    for load in LOADS:
        line, ours, theirs = score(folder, load, processes)
        lines.append(line)
        guarded += ours
        rule += theirs
    gain = gain_over(guarded, rule)
    assert gain.interval is not None
    low, high = gain.interval
    default = GUARDED if low > 0.0 else HYSTERESIS
    write_artifact(folder, replace(read_artifact(folder), default=default))
    hours = NUM_WINDOWS * WINDOW_S * len(SCORED_ON) / 3600.0
    said = (
        f"**What it is worth**, on {hours:g} hours of fresh generated traffic at each load, on "
        f"the surrogate: over hysteresis, tuned like its guard on other traffic, "
        f"{gain.gain_j:+.4f} in J ({low:+.4f} to {high:+.4f}, 95 %), so **{default}** is the "
        f"default."
    )
    header = ("load", "J hysteresis", "guarded over it", "95 %", "seeds alone over it",
              "switches/h")  # fmt: skip
    return f"{said}\n\n{table(lines, header)}"


def tune_rule_and_guard(folder: Path, processes: int) -> None:
    with TemporaryDirectory() as scratch:
        tuned = Path(scratch, NAME)
        windows = ["--windows", str(2 * NUM_WINDOWS), "--window-s", str(WINDOW_S)]
        options = [*windows, *GUARDS, "--seed", str(TUNED_ON), "--processes", str(processes)]
        tune(["--policy", str(folder), "--out", str(tuned), *options])
        write_artifact(folder, read_artifact(tuned))


def make(runs: Path, processes: int) -> int:
    """Raises TidewrightErrors."""
    study: StudyConfig = load_config(StudyConfig, POLICY_STUDY, {})
    jobs = [Job(NAME, seed, None, runs / f"{NAME}-seed{seed}") for seed in SEEDS]
    train_all(jobs, processes)
    folder = ARTIFACTS / NAME
    ship_seeds({f"seed{job.seed}": job.out / BEST for job in jobs}, folder, study)
    tune_rule_and_guard(folder, processes)
    verdict = decide(folder, processes)
    write_card(folder, verdict, "`make demo-policy`.", LIMITS)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m envs.demo_policy", description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of training runs")
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    args = parser.parse_args(arguments)
    return exit_status(lambda: make(args.runs, args.processes))


if __name__ == "__main__":
    sys.exit(main())
