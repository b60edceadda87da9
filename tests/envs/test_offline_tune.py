"""`evaluate.py tune` on a small pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from policies.artifact import (
    GUARDED,
    HYSTERESIS,
    Artifact,
    load_shipped,
    read_artifact,
    write_artifact,
)
from policies.baselines import HysteresisConfig
from policies.guarded import GuardedConfig

DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo" / "seed0"
SHORT = ["--windows", "1", "--window-s", "120", "--load", "0.5", "--no-progress"]


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    for seed in ("seed0", "seed1"):
        shutil.copytree(DEMO, tmp_path / "pool" / seed)
    artifact = Artifact(GUARDED, ("seed0", "seed1"), HysteresisConfig(), GuardedConfig())
    write_artifact(tmp_path / "pool", artifact)
    return tmp_path / "pool"


def test_the_best_settings_are_written(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    arguments = ["tune", "--policy", str(shipped), "--out", str(out), *SHORT]
    assert evaluate.main(arguments) == 0
    told, artifact = json.loads((out / "tuning.json").read_text()), read_artifact(out)
    by_rule = [row for row in told["tried"] if row["policy"] == HYSTERESIS]
    by_guard = [row for row in told["tried"] if row["policy"] == GUARDED]
    assert (len(by_rule), len(by_guard)) == (16, 3)
    best = max(by_rule, key=lambda row: row["j"])
    assert artifact.hysteresis.margin == best["margin"]
    assert artifact.hysteresis.num_ticks == best["num_ticks"]
    never, *others = by_guard
    assert never["margin"] == 30.0
    gained = max(row["j"] for row in others) > never["j"]
    assert artifact.default == (GUARDED if gained else HYSTERESIS)
    assert load_shipped(out).name == artifact.default
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["default"] == artifact.default
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "pool"]

    assert evaluate.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_single_checkpoint_has_nothing_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "--policy", str(DEMO), "--out", str(tmp_path / "mine"), *SHORT]
    assert evaluate.main(arguments) == 2
    assert "is no shipped policy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_guards_to_try_may_be_given(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    given = ["--margins", "30", "0.2", "--agreements", "0.6", "1", *SHORT]
    assert evaluate.main(["tune", "--policy", str(shipped), "--out", str(out), *given]) == 0
    tried = json.loads((out / "tuning.json").read_text())["tried"]
    found = [(row["margin"], row["agreement"]) for row in tried if row["policy"] == GUARDED]
    assert found == [(30.0, 0.6), (30.0, 1.0), (0.2, 0.6), (0.2, 1.0)]
    capsys.readouterr()

    wrong = [*SHORT, "--agreements", "0.4"]
    other = tmp_path / "other"
    assert evaluate.main(["tune", "--policy", str(shipped), "--out", str(other), *wrong]) == 2
    assert "an agreement above 0.5" in capsys.readouterr().err
    assert not other.exists()
