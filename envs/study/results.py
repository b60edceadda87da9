"""Results of cells: made by one process each, kept in one file."""

from __future__ import annotations

import gzip
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from envs.study.cell import run_cell
from envs.study.config import Cell, StudyConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


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


def end_with_parent() -> None:
    """For a process of a pool: it ends when the one that started it does."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def stop(pool: ProcessPoolExecutor) -> None:
    """End what its processes are doing, at once."""
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(cancel_futures=True)


def run(config: StudyConfig, cell: Cell, traces: Path, shows: bool) -> dict[str, Any]:
    def report(what: str) -> None:
        if shows:
            print(f"  {cell.name}: {what}", file=sys.stderr, flush=True)

    return run_cell(config, cell, traces, report)
