"""Runs every benchmark here, one after another, and prints a table of their last lines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent


def run_script(script: Path, quick: bool) -> tuple[dict[str, Any], float]:
    """The JSON object of the last line, or {"failed": why}, and the seconds it took."""
    command = [sys.executable, str(script), *(["--quick"] if quick else [])]
    start_s = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    wall_s = time.monotonic() - start_s
    print(done.stdout, end="", flush=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": f"exit status {done.returncode}"}, wall_s
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except ValueError:
        return {"failed": "its last line is not JSON"}, wall_s
    return result, wall_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute per script")
    parser.add_argument("names", nargs="*", help="only these scripts, without .py")
    args = parser.parse_args()
    scripts = [s for s in sorted(FOLDER.glob("*.py")) if s.name != "run.py"]
    scripts = [s for s in scripts if not args.names or s.stem in args.names]
    results = {script.stem: run_script(script, args.quick) for script in scripts}
    table = Table("benchmark", "seconds", "result")
    for name, (result, wall_s) in results.items():
        figures = ", ".join(f"{k} {v}" for k, v in result.items() if k != "benchmark")
        table.add_row(name, f"{wall_s:.1f}", figures)
    Console(width=120).print(table)
    return 1 if any("failed" in result for result, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
