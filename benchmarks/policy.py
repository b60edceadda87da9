"""What the shipped policies are worth against the rules: what the committed runs say.

`make results TRACES=FOLDER` trains every seed and scores them on the cells of configs/policy.yaml,
which takes hours; the results are in benchmarks/results/policy.json.gz. This scores them, and runs
the committed checkpoints on the cell of generated traffic again, against every rule: it must come
out as it is written there.

Ratios are above 1 where the guarded policy is better; statics are the best equal replicas in
hindsight; `j` is utility per request, from -1 to 1.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from engine.config import load_config
from envs.study.config import POLICY_STUDY, StudyConfig
from envs.study.results import read_results, results_of, run_again
from envs.study.verdict import figures

TOLERANCE = 0.02  # of utility: sums may be taken in another order elsewhere
GOALS = {
    "latency_vs_static_mean": 1.15,
    "latency_vs_oserve_mean": 1.1,
    "j_vs_hysteresis_ci_low": 0.0,
    "recovered_vs_beam": 0.5,
    "ood_worst_block_ci_low": 0.98,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only score what is committed")
    args = parser.parse_args()
    config: StudyConfig = load_config(StudyConfig, POLICY_STUDY, {})
    results = read_results(results_of("policy"))
    off = 0.0
    if not args.quick:
        cell, utilities = run_again(config, results, "utility")
        off = max(abs(now - then) for _, now, then in utilities)
        if off > TOLERANCE:
            print(f"{cell} is not what is committed: off by {off}", file=sys.stderr)
            return 1
    found = figures(results.values())
    table = Table("figure", "value", "goal", title=f"{len(results)} cells")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}", f"above {GOALS[name]:g}" if name in GOALS else "")
    Console().print(table)
    facts = {"cells": len(results), "reproduced_within": round(off, 5)}
    print(json.dumps({"benchmark": "policy", **found, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
