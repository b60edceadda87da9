"""The real engine beside the surrogate: the same arrivals on both.

A random-weight Llama of 63M parameters in bfloat16 on four workers that share this machine's
processors. The surrogate knows the engine by a profile, measured in several passes before, between
and after the runs, one replica busy at a time and several together, under a load that resembles
none of the workloads; how replicas slow one another it computes from the processors that each keeps
busy (`ServingProfile.crowding`). Every deployment serves every workload at every load, `repeats`
times, and some switch to another in the middle.

Errors are those of the surrogate against the mean of the engine's runs; `noise_` are those of the
engine's second run against its first. A contrast is the difference of the mean latencies of two
deployments on the same arrivals. All this is on processor cores: it
validates the mechanics, not the figures of accelerators.

By default it is a small part of what is published, --full all of it. --json FILE keeps all that was
measured; --from FILE measures nothing, and fits and simulates again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from simulating.calibration import Calibration
from simulating.cells import Cell, draw_cells, trace_from_json, trace_to_json
from simulating.errors import (
    METRICS,
    STATISTICS,
    Compared,
    compare,
    contrasts,
    median_error_pct,
    repeat_errors,
    switch_rows,
)
from simulating.runs import Run, drive, simulate, warm_up
from simulating.settings import FULL, SMALL, Settings, engine_config
from simulating.settings import MODEL as SHAPE
from switching.model import make_model

from engine.build import build_runtime
from engine.cluster import parse_deployment_key
from engine.facade import EngineCluster
from engine.profile import ProfiledCluster
from envs.surrogate.calibration import table as residual_table

WARM_UP_S = 1.5
RESULTS = Path(__file__).parent / "results" / "fidelity.json.gz"

# ------------------------------------------------------------------------------------
# Measuring


def measure(settings: Settings) -> tuple[Calibration, list[Cell]]:
    """Everything, cells with their runs."""
    folder = make_model(SHAPE)
    alone = engine_config(folder, "1xtp1pp1")
    calibration = Calibration(settings.configs, len(os.sched_getaffinity(0)))
    calibration.observe(alone)
    first = calibration.profile()  # for rates of traffic and costs of sequences in switches
    steady, switching = draw_cells(settings, first)
    groups = [[c for c in steady if c.deployment == key] for key in settings.deployments]
    for number, group in enumerate(groups, 1):
        run_group(folder, group, settings.repeats, first)
        if number % settings.groups_per_pass == 0:
            calibration.observe(alone)
    for cell in switching:
        for _ in range(settings.repeats):
            run_group(folder, [cell], 1, first)
    calibration.observe(alone)
    return calibration, steady + switching


def run_group(folder: Path, group: list[Cell], repeats: int, profiled: ProfiledCluster) -> None:
    """Fills in runs of cells of one deployment, on one engine."""
    config = engine_config(folder, group[0].deployment)
    with EngineCluster(lambda: build_runtime(config)) as cluster:
        warm_up(cluster, group[0].trace.window(0.0, WARM_UP_S), profiled)
        for cell in group * repeats:
            target = parse_deployment_key(cell.target) if cell.target else None
            run = drive(cluster, cell.trace, profiled, target)
            cell.runs.append(run)
            latency_s = float((run.finish_s - cell.trace.arrival_s).mean())
            print(
                f"{cell.deployment} {cell.traffic}: {len(cell.trace)} requests, mean latency "
                f"{latency_s:.3f} s {run.switch.get('phase', '')}",
                flush=True,
            )


# ------------------------------------------------------------------------------------
# Raw data


def to_json(calibration: Calibration, cells: list[Cell]) -> dict[str, Any]:
    traces = {c.traffic: c.trace for c in cells}
    return {
        "calibration": calibration.to_json(),
        "traces": {name: trace_to_json(trace) for name, trace in traces.items()},
        "cells": [c.to_json() for c in cells],
    }


def from_json(data: dict[str, Any]) -> tuple[Calibration, list[Cell]]:
    traces = {name: trace_from_json(trace) for name, trace in data["traces"].items()}
    cells = [Cell.from_json(cell, traces) for cell in data["cells"]]
    return Calibration.from_json(data["calibration"]), cells


# ------------------------------------------------------------------------------------
# Report


def summarise(profiled: ProfiledCluster, cells: list[Cell]) -> dict[str, Any]:
    def predict(cell: Cell) -> Run:
        return simulate(profiled, cell.deployment, cell.trace, cell.target)

    steady = [c for c in cells if not c.target]
    switching = [c for c in cells if c.target]
    compared, repeated = compare(steady, predict), repeat_errors(steady)
    pairs, switches = contrasts(compared), switch_rows(switching, predict)
    print_cells(compared)
    print_switches(switches)
    result: dict[str, Any] = {"benchmark": "fidelity"}
    result |= {f"err_{s}_pct_median": median_error_pct(compared, s) for s in STATISTICS}
    result |= {f"err_{m}_mean_pct_median": median_error_pct(compared, "mean", [m]) for m in METRICS}
    if repeated:
        result |= {f"noise_{s}_pct_median": median_error_pct(repeated, s) for s in STATISTICS}
    result |= {
        "deployment_rank_spearman": pairs.spearman,
        "contrast_sign_agreement": pairs.sign_agreement,
        "contrast_sign_agreement_clear": pairs.clear_sign_agreement,
        "contrast_err_pct_median": pairs.error_pct,
        "contrast_pairs": pairs.pairs,
        "contrast_pairs_clear": pairs.clear_pairs,
        "switch_gap_err_pct": float(np.median([abs(s["error_pct"]) for s in switches])),
        "cells": len(steady),
        "switches": len(switches),
    }
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}


def print_cells(compared: list[Compared]) -> None:
    columns = [(metric, s) for metric in ("ttft", "tpot", "latency") for s in ("mean", "p99")]
    table = Table("deployment", "traffic", "tokens/s", *(f"{m} {s}" for m, s in columns))
    for c in compared:
        cells = [f"{c.error_pct(metric, s):+.1f} %" for metric, s in columns]
        table.add_row(
            c.cell.deployment,
            c.cell.traffic,
            f"{c.error_pct('throughput', 'mean'):+.1f} %",
            *cells,
        )
    Console(width=150).print(table)


def print_switches(rows: list[dict[str, Any]]) -> None:
    table = Table("from", "to", "moved", "gap s", "predicted", "error")
    for row in rows:
        table.add_row(
            row["from"],
            row["to"],
            str(row["moved"]),
            f"{row['gap_s']:.3f}",
            f"{row['predicted_gap_s']:.3f}",
            f"{row['error_pct']:+.0f} %",
        )
    Console(width=150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="what is published: 40 minutes")
    parser.add_argument("--quick", action="store_true", help="--from what is published")
    parser.add_argument("--json", type=Path, help="file.json.gz for all that was measured")
    parser.add_argument("--from", dest="source", type=Path, help="such a file: measure nothing")
    args = parser.parse_args()
    source = RESULTS if args.quick else args.source
    if source is not None:
        with gzip.open(source, "rt") as file:
            calibration, cells = from_json(json.load(file))
    else:
        calibration, cells = measure(FULL if args.full else SMALL)
        if args.json is not None:
            with gzip.open(args.json, "wt") as file:
                json.dump(to_json(calibration, cells), file)
    profiled = calibration.profile()
    factors = calibration.mean_factors(profiled)
    print("passes of the calibration, measured over fitted:", np.round(factors, 3).tolist())
    print(residual_table(calibration.residuals()))
    print(json.dumps(summarise(profiled, cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
