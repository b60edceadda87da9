"""How much unequal replicas and switching can win: what the committed study says.

The study (`python -m envs.study --traces DIR`, cells in configs/headroom.yaml) takes an hour or
two; its results are in benchmarks/results/headroom.json.gz. This scores them, and runs the cell on
generated traffic again: it must come out as it is written there, rule by rule.

Ratios of mean latency are above 1 where the first named is better; `dyn` is hysteresis, tuned on
training days, and statics are the best in hindsight.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.config import load_config
from envs.study.cell import run_cell
from envs.study.config import DEFAULT_STUDY, GENERATED, StudyConfig
from envs.study.report import figures
from envs.study.results import RESULTS, read_results

TOLERANCE = 0.02  # of a rule's mean latency: sums may be taken in another order elsewhere


def _differences(again: dict, written: dict) -> dict[str, float]:
    """By rule, how far its mean latency is off."""
    before = {run["rule"]: run["latency_s"] for run in written["runs"]}
    return {
        run["rule"]: abs(run["latency_s"] / before.get(run["rule"], float("inf")) - 1.0)
        for run in again["runs"]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only score what is committed")
    args = parser.parse_args()
    config: StudyConfig = load_config(StudyConfig, DEFAULT_STUDY, {})
    results = read_results(RESULTS / "headroom.json.gz")
    off = 0.0
    if not args.quick:
        cell = next(c for c in config.cells if c.trace == GENERATED)
        again = run_cell(config, cell, Path(), lambda what: print(f"  {what}", file=sys.stderr))
        differences = _differences(again, results[cell.name])
        off = max(differences.values())
        if off > TOLERANCE:
            print(f"{cell.name} is not what the study wrote: {differences}", file=sys.stderr)
            return 1
    found = figures(results.values())
    table = Table("figure", "mean over cells", title=f"{len(results)} cells")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(
        json.dumps(
            {
                "benchmark": "headroom",
                **found,
                "cells": len(results),
                "reproduced_within": round(off, 5),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
