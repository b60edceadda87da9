"""The published comparison of engine and surrogate is what the surrogate gives today."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_published_figures_are_those_of_the_recorded_runs() -> None:
    """Simulates every recorded cell again; the engine's side is raw data."""
    done = subprocess.run(
        [sys.executable, "benchmarks/fidelity.py", "--from", "benchmarks/results/fidelity.json.gz"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    page = (ROOT / "docs" / "fidelity.md").read_text()
    published = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    assert found == published
