"""`evaluate.py replay` and `compare` of policies; gates; paired differences against known ones."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
from envs.offline.gate import GateFacts, GateRule, judge
from envs.offline.paired import Rewards, paired_gain, value_j
from envs.offline.replays import Plan, run_all
from envs.setting import SettingOptions

DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo"
QUICK = ["--windows", "2", "--window-s", "150", "--no-progress"]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def plan(**changes: Any) -> Plan:
    options = SettingOptions(num_windows=2, window_s=150.0)
    return replace(Plan(DEMO, ("hysteresis", str(DEMO)), options, loads=(0.4,)), **changes)


def test_what_was_done_is_kept_and_what_is_missing_is_done(tmp_path: Path) -> None:
    jobs = plan(seeds=(0, 1)).jobs()
    first = {job: result for job, result, kept in run_all(jobs, tmp_path, 1)}
    assert len(first) == 4
    jobs[2].file(tmp_path).unlink()
    jobs[3].file(tmp_path).write_text("{torn")
    again = list(run_all(jobs, tmp_path, 1))
    assert [kept for _, _, kept in again] == [True, True, False, False]
    assert {job: result for job, result, _ in again} == first
    assert first[jobs[0]] != first[jobs[2]]  # another seed, other traffic


def test_processes_give_the_same(tmp_path: Path) -> None:
    jobs = plan().jobs()
    alone = {job: result for job, result, _ in run_all(jobs, None, 1)}
    together = {job: result for job, result, _ in run_all(jobs, None, 2)}
    assert alone == together


def test_the_command_writes_a_table_per_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["replay", "--policy", "keep", str(DEMO), "--load", "0.3", "0.5", *QUICK]
    given += ["--out", str(tmp_path), "--processes", "1", "--statics"]
    assert evaluate.main(given) == 0
    told = last_json(capsys)
    assert told == json.loads((tmp_path / "replay.json").read_text())
    keep, demo = told["policies"]["keep"], told["policies"][str(DEMO)]
    assert keep["gain_j"] == 0.0
    assert keep["switches_per_hour"] == 0.0
    assert demo["gain_j"] == pytest.approx(demo["j"] - keep["j"], abs=1e-4)
    assert keep["regret_to_best_static_j"] >= 0.0
    with (tmp_path / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    statics = {r["policy"] for r in rows if r["policy"].startswith("static ")}
    assert len(rows) == (2 + len(statics)) * 2 * 2  # policies, loads, windows
    arrived = {(r["load"], r["window"]): set() for r in rows}
    for row in rows:
        arrived[row["load"], row["window"]].add(row["arrived"])
    assert all(len(numbers) == 1 for numbers in arrived.values())  # the same for every policy


def test_two_policies_are_compared_and_gated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule, report = tmp_path / "rule.yaml", tmp_path / "r.html"
    rule.write_text("margin: 0.02\nmax_switches_per_hour: 0\n")
    given = ["compare", "keep", str(DEMO), "--load", "0.3", *QUICK]
    assert evaluate.main([*given, "--gate", str(rule), "--report", str(report)]) == 1
    told = last_json(capsys)
    passed = {r["rule"]: r["passed"] for r in told["gate"]["reasons"]}
    assert passed == {"margin": False, "max_switches_per_hour": True}
    assert "too little traffic for an interval" in told["verdict"]
    assert told["verdict"] in report.read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["replay", "--policy", "keep"], "give one with --ground"),
        (["replay", "--policy", "{demo}", "{demo}"], "each policy is given once"),
        (["replay", "--policy", "{demo}", "none"], "'none' is neither a rule"),
        (["replay", "--policy", "{demo}:best"], "is a single checkpoint"),
        (["replay", "--policy", "{demo}", "--trace", "{tmp}/one.csv"], "one.csv"),
        (["compare", "{demo}", "{demo}"], "is given twice"),
        (["compare", "keep", "{demo}", "--json", "{tmp}/no/out"], "is no folder that can"),
        (["--policy", "{demo}", "--trace", "{tmp}/one.csv"], "one.csv"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.csv").write_text("timestamp_s,input_tokens,output_tokens\n0.0,10,5\n")
    filled = [g.format(demo=DEMO, tmp=tmp_path) for g in given]
    assert evaluate.main([*filled, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["one.csv"]


# --------------------------------------------------------------------------------------
# Numbers against known ones


def noisy(rng: np.random.Generator, number: int, length: int) -> list[np.ndarray]:
    """AR(1) noise that lasts for minutes."""
    found = np.zeros((number, length))
    shocks = rng.normal(0, 0.1, (number, length))
    for t in range(1, length):
        found[:, t] = 0.8 * found[:, t - 1] + shocks[:, t]
    return list(found)


def test_a_paired_interval_covers_the_true_gain() -> None:
    held, repetitions = 0, 150
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        common, own = noisy(rng, 3, 240), noisy(rng, 3, 240)
        arrived = np.full(240, 10.0)
        theirs = [Rewards(10 * c, arrived) for c in common]
        ours = [Rewards(10 * c + o + 0.05, arrived) for c, o in zip(common, own, strict=True)]
        gain = paired_gain(ours, theirs, 10.0, 15.0, 600.0, draws=200, seed=seed)
        assert gain.interval is not None
        held += gain.interval[0] <= 0.05 <= gain.interval[1]
    assert 0.85 <= held / repetitions <= 0.99


def test_a_gain_by_hand() -> None:
    arrived = np.array([4.0, 6.0])
    ours = [Rewards(np.array([0.02, 0.03]), arrived)]
    theirs = [Rewards(np.array([0.01, 0.02]), arrived)]
    assert value_j(ours, 100.0) == pytest.approx(0.5)
    gain = paired_gain(ours, theirs, 100.0, 900.0)
    assert gain.gain_j == pytest.approx(0.2)
    assert gain.interval is None
    assert gain.worst is not None
    assert gain.worst.ratio == pytest.approx(1.5 / 1.3)


FACTS = GateFacts(0.01, (-0.02, 0.04), 3.0, 0.97, 0.005)


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"margin": 0.02}, True),
        ({"margin": 0.0}, False),
        ({"max_switches_per_hour": 3}, True),
        ({"max_switches_per_hour": 2.9}, False),
        ({"min_worst_block": 0.97}, True),
        ({"min_worst_block": 0.98}, False),
        ({"max_slo_drop": 0.01}, True),
        ({"max_slo_drop": 0.001}, False),
    ],
)
def test_each_rule_of_a_gate(rule: dict[str, float], passed: bool) -> None:
    (reason,) = judge(GateRule(**rule), FACTS)
    assert reason.passed is passed
    assert reason.rule in rule
    unknown = judge(GateRule(**rule), GateFacts(None, None, None, None, None, "too short"))
    assert not unknown[0].passed
