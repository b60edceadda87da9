"""Results of cells: made by one process each, kept in one file."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.study.cell import run_anew, run_cell
from envs.study.config import GENERATED, Cell, StudyConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def results_of(study: str, more_tuning: bool = False) -> Path:
    """The file of a study's results; or of those with more windows to tune on."""
    return RESULTS / f"{study}{'-tuning' * more_tuning}.json.gz"


def read_results(path: Path) -> dict[str, Any]:
    """By name of the cell; none where there is no file."""
    if not path.exists():
        return {}
    with gzip.open(path, "rt") as file:
        return {str(result["cell"]["name"]): result for result in json.load(file)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Byte for byte the same for the same results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([results[name] for name in sorted(results)], separators=(",", ":"))
    part = path.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), mtime=0))
    part.replace(path)


def run(
    config: StudyConfig,
    traces: Path,
    shows: bool,
    before: Mapping[str, Any],
    rules: Sequence[str],
    cell: Cell,
) -> dict[str, Any]:
    """A cell's result. Where there is one from `before`, only these rules of the ladder are run, or
    without any its learned policies."""

    def report(what: str) -> None:
        if shows:
            print(f"  {cell.name}: {what}", file=sys.stderr, flush=True)

    if cell.name in before:
        return run_anew(config, before[cell.name], traces, rules, report)
    return run_cell(config, cell, traces, report)


def run_again(
    config: StudyConfig, results: Mapping[str, Any], figure: str
) -> tuple[str, list[tuple[str, float, float]]]:
    """The cell of generated traffic, which needs no file: its name, and of each rule its name and
    the figure now and in the results; infinite where they lack the rule."""
    cell = next(c for c in config.cells if c.trace == GENERATED)
    again = run(config, Path(), True, {}, (), cell)
    before = {run["rule"]: run[figure] for run in results[cell.name]["runs"]}
    found = [(r["rule"], r[figure], before.get(r["rule"], float("inf"))) for r in again["runs"]]
    return cell.name, found
