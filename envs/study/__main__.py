"""`python -m envs.study`: runs the cells of a study; goes on where it was stopped."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import load_config
from engine.errors import TidewrightError
from envs.pool import run_in_processes
from envs.resumable import exit_status
from envs.study.config import DEFAULT_STUDY, GENERATED, Cell, StudyConfig
from envs.study.report import write_page
from envs.study.results import (
    read_results,
    results_of,
    run,
    write_results,
)
from envs.study.verdict import write_verdict

ROOT = Path(__file__).parents[2]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m envs.study", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_STUDY, help="study (YAML)")
    parser.add_argument("--traces", type=Path, help="folder of trace files")
    parser.add_argument(
        "--out",
        type=Path,
        help="results, gzipped JSON (default: benchmarks/results/CONFIG.json.gz)",
    )
    parser.add_argument("--cells", nargs="*", help="names of cells; default: those without results")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--learned",
        action="store_true",
        help="run just the learned policies, of cells that have results; all else in them stays",
    )
    part.add_argument(
        "--rules",
        nargs="+",
        default=(),
        metavar="RULE",
        help="run just these rules of the ladder, or hindsight, of cells that have results, in the "
        "same way",
    )
    parser.add_argument(
        "--more-tuning",
        action="store_true",
        help="cells of the means with three times as many windows to tune on, without hindsight "
        "(results: CONFIG-tuning.json.gz)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: put the results into docs/CONFIG.md"
    )
    parser.add_argument("--verbose", action="store_true", help="say which rule is running")
    return parser.parse_args(arguments)


def _chosen(args: argparse.Namespace, config: StudyConfig, done: dict[str, Any]) -> list[Cell]:
    known = {cell.name: cell for cell in config.cells}
    unknown = sorted(set(args.cells or ()) - set(known))
    if unknown:
        raise SystemExit(f"cells {unknown} are not in {args.config}; it has {', '.join(known)}.")
    if args.cells and (args.learned or args.rules):
        lacking = sorted(
            c for c in args.cells if c not in done or (args.learned and not known[c].policy)
        )
        if lacking:
            raise SystemExit(
                f"cells {lacking} have no results or no policy; leave out --learned and --rules, "
                "or them."
            )
    if args.cells:
        return [known[name] for name in args.cells]
    ran = [Cell.model_validate(result["cell"]) for result in done.values()]
    if args.learned or args.rules:
        return [c for c in config.cells if c in ran and (c.policy or args.rules)]
    wanted = [cell for cell in config.cells if cell not in ran]
    if args.traces is None:
        skipped = [c.name for c in wanted if c.trace != GENERATED]
        if skipped:
            print(f"without --traces {len(skipped)} cells are left out.", file=sys.stderr)
        wanted = [c for c in wanted if c.trace == GENERATED]
    return wanted


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    try:
        config: StudyConfig = load_config(StudyConfig, args.config, {})
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stem = args.config.stem
    if args.more_tuning and (args.report or config.report == "headroom"):
        print(
            "error: --more-tuning runs cells of a study of policies; leave it out with --report, "
            "which shows both, and with configs/headroom.yaml.",
            file=sys.stderr,
        )
        return 2
    if args.more_tuning:
        config = config.with_more_tuning()
    out = args.out or results_of(stem, args.more_tuning)
    results = read_results(out)
    if args.report:
        page = ROOT / "docs" / f"{stem}.md"
        if config.report == "headroom":
            write_page(list(results.values()), page)
        else:
            write_verdict(results, read_results(results_of(stem, more_tuning=True)), page)
        return 0
    cells, traces = _chosen(args, config, results), args.traces or Path()
    before = dict(results) if args.learned or args.rules else {}
    run_one = partial(run, config, traces, args.verbose, before, tuple(args.rules))

    def run_all() -> int:
        done = run_in_processes(run_one, cells, args.jobs)
        for number, (cell, result) in enumerate(done, 1):
            results[cell.name] = result
            write_results(out, results)
            took = f"{number}/{len(cells)} {cell.name}: {result['took_s']:.0f} s"
            print(took, file=sys.stderr, flush=True)
        return 0

    return exit_status(run_all, "stopped; cells that have finished are kept")


if __name__ == "__main__":
    sys.exit(main())
