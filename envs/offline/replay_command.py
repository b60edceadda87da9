"""`python evaluate.py replay`: policies x traces x loads x seeds on the surrogate, on all cores.

Every policy meets the same windows. Differences are paired, with intervals by the block bootstrap.
With --out a finished part is kept, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.errors import InvalidRequestError
from envs.offline.files import (
    check_writable,
    has_parquet,
    origin,
    require_parquet,
    to_csv,
    to_parquet,
    write_json,
    write_whole,
)
from envs.offline.paired import Gain, paired_gain, value_j
from envs.offline.replay_page import REGRETS, page_of_replay, verdict_of
from envs.offline.replays import STATIC, Job, Plan, rewards_of, run_all
from envs.offline.report import write_report
from envs.setting import SettingOptions
from policies.artifact import is_policy

Result = dict[str, Any]
CELLS = "cells"
COLUMNS = ("policy", "trace", "load", "seed", "window")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python evaluate.py replay",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", nargs="+", required=True, metavar="P",
        help="rules, FOLDERs of checkpoints, FOLDER:MEMBERs; beside the first")  # fmt: skip
    add("--ground", type=Path, help="checkpoint that says pool and pipeline (default: first given)")
    add("--trace", type=Path, nargs="+", help="trace files (default: the embedded generator)")
    add("--load", type=float, nargs="+", help="shares of best static capacity (default: trained)")
    add("--seeds", type=int, nargs="+", default=[0], help="of the resampling (default: 0)")
    add("--statics", action="store_true", help="also every static deployment, for regret")
    add("--processes", type=int, default=0, help="at a time (default: one per core)")
    add("--ray", metavar="ADDRESS", help="Ray cluster in place of processes; 'local': a new one")
    add("--out", type=Path, metavar="FOLDER", help="keeps parts, replay.json, .csv and .parquet")
    add("--parquet", action=argparse.BooleanOptionalAction,
        help="write replay.parquet in it (default: if pyarrow is installed)")  # fmt: skip
    add(
        "--report", type=Path, metavar="FILE.html", help="also write it, with .png and .json beside"
    )
    add_windows(parser)
    return parser.parse_args(argv)


def add_windows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--days", help="first-last day of the traces, 86400 s each, from 1 (default: all)")
    add("--length-factor", type=float, help="multiplies lengths (default: as trained)")
    add("--profile", type=Path, help="measured cluster JSON (default: as trained)")
    add("--initial", help="first deployment, e.g. 4xtp1pp1 (default: the checkpoint's)")
    add("--windows", type=int, default=6, help="windows, evenly spaced (default: 6)")
    add("--window-s", type=float, default=3600.0, help="seconds of a window (default: 3600)")
    add("-P", "--progress", action=argparse.BooleanOptionalAction, default=True)


def options_of(args: argparse.Namespace) -> SettingOptions:
    return SettingOptions(
        days=args.days,
        length_factor=args.length_factor,
        profile=args.profile,
        initial=args.initial,
        num_windows=args.windows,
        window_s=args.window_s,
    )


def ground_of(given: Path | None, policies: Sequence[str]) -> Path:
    """The checkpoint that says pool and pipeline. Raises InvalidRequestError."""
    named = [given] if given else [Path(p.partition(":")[0]) for p in policies]
    found = next((path for path in named if is_policy(path)), None)
    if found is None:
        raise InvalidRequestError(
            f"none of {', '.join(map(str, named))} is a checkpoint, which says what pool to replay "
            "on; give one with --ground."
        )
    return found


def plan_of(args: argparse.Namespace) -> Plan:
    return Plan(
        ground_of(args.ground, args.policy),
        tuple(args.policy),
        options_of(args),
        tuple(args.trace or [None]),
        tuple(args.load or [None]),
        tuple(args.seeds),
        args.statics,
    )


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    if args.processes < 0:
        raise InvalidRequestError(f"processes must be at least 1, got {args.processes}.")
    if args.report:
        check_writable(args.report)
    if args.parquet:
        if args.out is None:
            raise InvalidRequestError("--parquet needs a folder to write to; give one with --out.")
        require_parquet()
    jobs = plan_of(args).jobs()
    cells = _folder(args.out)
    begun_s = time.monotonic()
    processes = args.processes or os.cpu_count() or 1
    results = follow(jobs, cells, processes, args.progress, args.ray)
    told = summary(jobs, results, list(args.policy)) | origin(["replay", *argv])
    told["verdict"] = verdict_of(told)
    told["seconds"] = round(time.monotonic() - begun_s, 1)
    if args.out is not None:
        write_json(args.out / "replay.json", told)
        rows = rows_of(jobs, results)
        write_whole(args.out / "replay.csv", to_csv(rows))
        if has_parquet() if args.parquet is None else args.parquet:
            write_whole(args.out / "replay.parquet", to_parquet(rows))
    if args.report:
        write_report(args.report, page_of_replay(jobs, results, told), told)
    show(told)
    print(json.dumps(told, allow_nan=False))
    return 0


def _folder(out: Path | None) -> Path | None:
    if out is None:
        return None
    try:
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"{out} cannot be written: {error.strerror}.") from error
    return out / CELLS


def follow(
    jobs: Sequence[Job],
    cells: Path | None,
    processes: int,
    shows: bool,
    ray_address: str | None = None,
) -> list[Result]:
    """The results in the order of the jobs."""
    found: dict[Job, Result] = {}
    with Progress(console=Console(stderr=True), disable=not shows) as progress:
        task = progress.add_task("replaying", total=len(jobs))
        for job, result, was_there in run_all(jobs, cells, processes, ray_address):
            found[job] = result
            name = f"{job.policy}{' (kept)' if was_there else ''}"
            progress.update(task, advance=1, description=name)
    return [found[job] for job in jobs]


def rows_of(jobs: Sequence[Job], results: Sequence[Result]) -> list[dict[str, Any]]:
    """One per policy, cell and window."""
    rows = []
    for job, result in zip(jobs, results, strict=True):
        options = job.ground.options
        for number, (window, rewards) in enumerate(
            zip(result["windows"], rewards_of(result), strict=True)
        ):
            named = (job.policy, str(options.trace or ""), options.load, options.seeds[0], number)
            figures = {k: v for k, v in window.items() if k not in ("reward", "arrived")}
            rows.append(
                dict(zip(COLUMNS, named, strict=True))
                | {"arrived": int(rewards.arrived.sum())}
                | {"j": round(value_j([rewards], result["scale_requests"]), 6)}
                | figures
            )
    return rows


# --------------------------------------------------------------------------------------
# What they come to


def summary(
    jobs: Sequence[Job], results: Sequence[Result], policies: Sequence[str]
) -> dict[str, Any]:
    """Of each policy over all cells, beside the first; regrets to the best of each cell in
    hindsight: of the statics, and of all that was replayed."""
    by_policy: dict[str, list[Result]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_policy.setdefault(job.policy, []).append(result)
    statics = [found for name, found in by_policy.items() if name.startswith(STATIC)]
    first = by_policy[policies[0]]
    references = {"best_static": statics, "best": list(by_policy.values())}
    best = {name: _best_of(found) for name, found in references.items() if found}
    if len(by_policy) == 1:
        del best["best"]
    told = {name: _figures(by_policy[name], first, best) for name in policies}
    hours = sum(w["seconds"] for result in results for w in result["windows"]) / 3600.0
    return {"beside": policies[0], "policies": told, "simulated_hours": round(hours, 4)}


def _best_of(policies: Sequence[Sequence[Result]]) -> list[Result]:
    """In hindsight, of each cell."""
    return [max(cell, key=_value) for cell in zip(*policies, strict=True)]


def _value(result: Result) -> float:
    return value_j(rewards_of(result), result["scale_requests"])


def _figures(
    ours: Sequence[Result], first: Sequence[Result], best: Mapping[str, Sequence[Result]]
) -> dict[str, Any]:
    windows = [w for result in ours for w in result["windows"]]
    finished = max(sum(w["finished"] for w in windows), 1)
    hours = sum(w["seconds"] for w in windows) / 3600.0
    rewards, scale = [r for o in ours for r in rewards_of(o)], float(ours[0]["scale_requests"])
    gain = gain_over(ours, first)
    found: dict[str, Any] = {
        "j": round(value_j(rewards, scale), 6),
        "gain_j": round(gain.gain_j, 6),
        "gain_j_interval": gain.interval and [round(g, 6) for g in gain.interval],
        "worst_block": gain.worst and round(gain.worst.ratio, 6),
        "latency_mean_s": round(
            sum(w["finished"] * w["latency_mean_s"] for w in windows) / finished, 6
        ),
        "latency_p99_worst_window_s": max(w["latency_p99_s"] for w in windows),
        "slo": round(
            sum(w["slo"] for w in windows) / max(sum(float(r.arrived.sum()) for r in rewards), 1), 6
        ),
        "switches_per_hour": round(sum(w["switches"] for w in windows) / hours, 4),
        "finished": finished,
    }
    for name, reference in best.items():
        regret = gain_over(reference, ours)
        found[f"regret_to_{name}_j"] = round(regret.gain_j, 6)
        found[f"regret_to_{name}_j_interval"] = regret.interval and [
            round(bound, 6) for bound in regret.interval
        ]
    return found


def gain_over(ours: Sequence[Result], theirs: Sequence[Result], level: float = 0.95) -> Gain:
    """Paired over all windows of all cells."""
    scale, grid_s = float(ours[0]["scale_requests"]), float(ours[0]["grid_s"])
    left, right = ([r for result in side for r in rewards_of(result)] for side in (ours, theirs))
    return paired_gain(left, right, scale, grid_s, level=level)


def show(told: Mapping[str, Any]) -> None:
    beside = told["beside"]
    table = Table(title=f"J over {beside}, paired", title_justify="left")
    regrets = [key for key in REGRETS if key in told["policies"][beside]]
    names = ("policy", "J", "difference", "95 %", "worst half hour", "mean latency s", "p99 s",
             "SLO %", "switches/h", *(REGRETS[key] for key in regrets))  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name, f in told["policies"].items():
        more = [f"{f[key]:+.4f}" for key in regrets]
        table.add_row(name, *figures_row(f), *more)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    console.print(told["verdict"], markup=False)


def figures_row(f: Mapping[str, Any]) -> list[str]:
    interval = f["gain_j_interval"]
    return [
        f"{f['j']:.4f}",
        f"{f['gain_j']:+.4f}",
        f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "",
        f"{f['worst_block']:.4f}" if f["worst_block"] is not None else "",
        f"{f['latency_mean_s']:.3f}",
        f"{f['latency_p99_worst_window_s']:.3f}",
        f"{100 * f['slo']:.2f}",
        f"{f['switches_per_hour']:.2f}",
    ]
