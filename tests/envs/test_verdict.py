"""What learned policies are worth, from results written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import load_config
from envs.study.config import DEFAULT_STUDY, GENERATED, POLICY_STUDY, StudyConfig
from envs.study.report import BEGIN, END
from envs.study.results import read_results, results_of
from envs.study.verdict import capacity_at, figures, gains, interval, worth_ratio_low, write_verdict


def run(rule: str, utilities: list[float], latency_s: float, **detail: str) -> dict[str, Any]:
    windows = [{"utility": 10.0 * u, "arrived": 10, "switches": 1} for u in utilities]
    return {
        "rule": rule,
        "utility": float(np.mean(utilities)),
        "windows": windows,
        "latency_s": latency_s,
        "latency_p99_s": 10 * latency_s,
        "attainment": {"interactive": 1.0 - latency_s / 10.0},
        "switches": len(utilities),
        "detail": detail,
    }


def result(name: str, role: str, guarded: list[float], **cell: Any) -> dict[str, Any]:
    return {
        "cell": {"name": name, "role": role, "load": 0.85, "trace": "t", "devices": 8} | cell,
        "seconds": 7200.0,
        "bounds": {"utility": 0.9},
        "training": {"hysteresis": 0.4, "beam": 0.5},
        "hysteresis": {"horizon_s": 300.0, "num_ticks": 1, "margin": 8.0},
        "guarded": {"margin": 30.0},
        "runs": [
            run("static 2xtp4pp1", [0.3, 0.3], 3.0, static="equal", key="2xtp4pp1"),
            run("static 1xtp8pp1", [0.2, 0.2], 4.0, static="equal", key="1xtp8pp1"),
            run("oserve", [0.3, 0.3], 3.5),
            run("greedy", [0.3, 0.3], 3.0),
            run("hysteresis", [0.4, 0.4], 2.5),
            run("ppo seed0", [0.4, 0.5], 2.4),
            run("ppo seed1", [0.6, 0.5], 2.4),
            run("guarded", guarded, 2.0),
            run("beam", [0.6, 0.6], 1.5),
            run("hindsight by utility", [0.7, 0.7], 1.6),
            run("hindsight by latency", [0.6, 0.6], 1.25),
        ],
    }


def test_figures_by_hand() -> None:
    cells = [result("a", "seen", [0.5, 0.5]), result("b", "bursts", [0.4, 0.3])]
    found = figures(cells)
    assert found["latency_vs_static_mean"] == pytest.approx(1.5)
    assert found["latency_vs_oserve_mean"] == pytest.approx(1.75)
    assert found["goodput_vs_static_mean"] == pytest.approx(0.8 / 0.7, abs=1e-4)
    assert found["j_vs_hysteresis"] == pytest.approx(0.1)
    assert found["j_vs_hysteresis_ci_low"] == pytest.approx(0.1)
    assert found["j_alone_vs_hysteresis"] == pytest.approx(0.1)
    assert found["j_alone_vs_hysteresis_ci_low"] < 0.1 < found["j_alone_vs_hysteresis_ci_high"]
    assert found["j_vs_greedy"] == pytest.approx(0.2)
    assert found["j_vs_greedy_ci_low"] == pytest.approx(0.2)
    assert found["recovered_vs_beam"] == pytest.approx(0.5)
    assert found["recovered_vs_bound"] == pytest.approx(0.2)
    assert found["excluded_share"] == 0.0
    assert found["recovered_vs_hindsight"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["hindsight_latency_vs_static_mean"] == pytest.approx(2.4)
    assert found["hindsight_latency_vs_oserve_mean"] == pytest.approx(2.8)
    assert found["switches_per_hour"] == 1.0
    assert found["seeds"] == 2
    low = worth_ratio_low(cells[1])
    assert found["ood_worst_block_ci_low"] == pytest.approx(low, abs=1e-4)
    assert low == pytest.approx(0.65 / 0.7)  # both windows drawn as the worse one


def test_gains_are_paired_by_window() -> None:
    cell = result("a", "seen", [0.5, 0.5])
    assert gains(cell, ["ppo seed0", "ppo seed1"]) == pytest.approx(
        np.array([[0, 0.2], [0.1, 0.1]])
    )


def test_interval_covers_the_truth() -> None:
    """Of 60 samples of known mean about 95 % have it in their interval."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(60):
        cells = [rng.normal(0.1, 0.05, (6, 1)) for _ in range(8)]
        _, low, high = interval(cells)
        inside += low <= 0.1 <= high
    assert inside >= 52


def test_capacity_is_read_between_loads() -> None:
    cells = [
        {"cell": {"load": load}, "attained": attained}
        for load, attained in ((0.95, 0.7), (0.6, 0.95), (0.85, 0.85))
    ]

    def attained(cell: Mapping[str, Any]) -> float:
        return float(cell["attained"])

    assert capacity_at(cells, attained, 0.9) == pytest.approx(0.6 + 0.25 * 0.5)
    assert capacity_at(cells, attained, 0.6) is None
    assert capacity_at(cells[:1], attained, 0.9) is None


def test_capacity_is_compared_at_what_statics_attain_at_the_middle_load() -> None:
    """Statics 0.9, 0.8, 0.7 at three loads; guarded 0.1 higher, so it holds 0.8 one load on."""
    cells = []
    for load, attained in ((0.5, 0.9), (0.7, 0.8), (0.9, 0.7)):
        cell = result(f"at-{load}", "seen", [0.5, 0.5], load=load)
        for run in cell["runs"]:
            better = run["rule"] == "guarded"
            run["attainment"] = {"interactive": attained + 0.1 * better}
        cells.append(cell)
    assert figures(cells)["capacity_vs_static_mean"] == pytest.approx(0.9 / 0.7, abs=1e-4)
    assert figures(cells[:2])["capacity_vs_static_mean"] == 0.0


def test_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "policy.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    cells = {name: result(name, "seen", [0.5, 0.5]) for name in ("a", "b")}
    more = {"a": result("a", "seen", [0.5, 0.6])}
    more["a"]["hysteresis"] = {"horizon_s": 60.0, "num_ticks": 3, "margin": 4.0}
    write_verdict(cells, more, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| a | seen | 2xtp4pp1 |" in text
    assert "| j_vs_hysteresis | 0.1000 | 0.1500 |" in text
    assert "| a | 300 / 1 / 8 | 60 / 3 / 4 | 30 | 30 | 0.4000 | 0.4000 | 0.5000 |" in text
    assert "| 0.5500 | +0.1000 | +0.1500 |" in text
    assert "old" not in text


def test_the_committed_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    root, page = DEFAULT_STUDY.parents[1], tmp_path / "policy.md"
    committed = (root / "docs" / "policy.md").read_text()
    page.write_text(committed)
    write_verdict(*(read_results(results_of("policy", more)) for more in (False, True)), page)
    assert page.read_text() == committed


def test_cells_with_more_tuning_are_those_of_the_means() -> None:
    study: StudyConfig = load_config(StudyConfig, POLICY_STUDY, {})
    more = study.with_more_tuning()
    means = {c.name: c for c in study.cells if c.role in ("seen", "unseen")}
    assert {c.name for c in more.cells} == means.keys()
    assert (more.times_tuning, more.refine) == (3, None)
    assert all(c == means[c.name].model_copy(update={"beam": False}) for c in more.cells)


def test_the_cells_are_as_they_should_be() -> None:
    """Two families are never seen in training, and Azure's minutes are bursts only."""
    study: StudyConfig = load_config(StudyConfig, POLICY_STUDY, {})
    unseen = {c.trace for c in study.cells if c.role == "unseen"}
    seen = {c.trace for c in study.cells if c.role == "seen"}
    assert unseen == {"servegen_mm_image.csv.gz", "servegen_m_small.csv.gz", GENERATED}
    assert not unseen & seen
    assert all(c.role == "bursts" for c in study.cells if c.trace.startswith("azure"))
