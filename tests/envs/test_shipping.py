"""From trained seeds and their verdict to a shipped policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import load_config
from envs.shipping import CARD, CURVES, decide_default, ship_seeds, verdict_of_cells, write_card
from envs.study.config import DEFAULT_STUDY, StudyConfig
from policies.artifact import GUARDED, HYSTERESIS, load_shipped, read_artifact
from policies.baselines import HysteresisConfig
from policies.guarded import GuardedConfig

DEMO = DEFAULT_STUDY.parents[1] / "policies" / "artifacts" / "demo" / "seed0"


def run(rule: str, utility: float) -> dict[str, Any]:
    windows = [{"utility": 10.0 * utility, "arrived": 10, "switches": 1}] * 2
    return {"rule": rule, "utility": utility, "windows": windows, "detail": {}}


def cell(guarded: float, name: str = "pool") -> dict[str, Any]:
    return {
        "cell": {"name": "c", "role": "seen", "load": 0.85, "policy": name},
        "hysteresis": {"horizon_s": 60.0, "num_ticks": 3, "margin": 4.0},
        "guarded": {"margin": 2.0, "agreement": 0.8},
        "runs": [run("hysteresis", 0.4), run("ppo seed0", 0.5), run("guarded", guarded)],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study: StudyConfig = load_config(StudyConfig, DEFAULT_STUDY, {})
    ship_seeds({"seed0": DEMO, "seed1": DEMO}, tmp_path / "pool", study)
    return tmp_path / "pool"


def test_seeds_are_shipped_without_their_optimiser(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "artifact.json",
        CURVES,
        "seed0",
        "seed1",
    ]
    assert sorted(p.name for p in (folder / "seed0").iterdir()) == [
        "manifest.json",
        "policy.safetensors",
    ]
    assert read_artifact(folder).default == HYSTERESIS
    assert load_shipped(folder, name="seed1").name == "ppo"


def test_the_stop_rule(folder: Path) -> None:
    """Guarded decides where it gained, hysteresis where it did not or nothing was scored."""
    assert decide_default([cell(0.45)], folder).default == GUARDED
    assert decide_default([cell(0.4)], folder).default == HYSTERESIS
    assert decide_default([cell(0.45, name="other")], folder).default == HYSTERESIS
    assert decide_default([cell(0.45)], folder).hysteresis == HysteresisConfig(60.0, 3, 4.0)
    assert decide_default([cell(0.45)], folder).guarded == GuardedConfig(2.0, 0.8)


def test_the_card_says_what_it_is_worth(folder: Path) -> None:
    write_card(folder, verdict_of_cells(folder, []), "`make results`")
    assert "Not scored yet" in (folder / CARD).read_text()
    results = [cell(0.45)]
    decide_default(results, folder)
    write_card(folder, verdict_of_cells(folder, results), "`make results TRACES=FOLDER`")
    text = (folder / CARD).read_text()
    assert "by default **guarded** decides" in text
    assert "The gain" in text or "the gain in J is +0.0500" in text
    assert "| c | seen | 0.4000 | +0.0500 | +0.0500 to +0.0500 | +0.1000 |" in text
    assert "make results TRACES=FOLDER" in text
