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

from rich.console import Console
from rich.table import Table

from engine.config import load_config
from envs.study.config import DEFAULT_STUDY, StudyConfig
from envs.study.report import figures
from envs.study.results import read_results, results_of, run_again

TOLERANCE = 0.02  # of a rule's mean latency: sums may be taken in another order elsewhere


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only score what is committed")
    args = parser.parse_args()
    config: StudyConfig = load_config(StudyConfig, DEFAULT_STUDY, {})
    results = read_results(results_of("headroom"))
    off = 0.0
    if not args.quick:
        cell, latencies_s = run_again(config, results, "latency_s")
        differences = {rule: abs(now_s / then_s - 1.0) for rule, now_s, then_s in latencies_s}
        off = max(differences.values())
        if off > TOLERANCE:
            print(f"{cell} is not what the study wrote: {differences}", file=sys.stderr)
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
