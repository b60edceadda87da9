"""`evaluate.py replay` and `compare` of policies; gates; paired differences against known ones."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import evaluate
from engine.errors import CheckpointError
from envs.offline import files
from envs.offline.gate import GateFacts, GateRule, judge
from envs.offline.paired import Rewards, paired_gain, value_j
from envs.offline.replay_command import summary
from envs.offline.replay_page import window_gains
from envs.offline.replays import Plan, run_all
from envs.setting import SettingOptions

DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo" / "seed0"
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_gives_the_same_and_tells_errors_as_they_are() -> None:
    jobs = plan().jobs()
    alone = {job: result for job, result, _ in run_all(jobs, None, 1)}
    elsewhere = {job: result for job, result, _ in run_all(jobs, None, 1, "local")}
    assert alone == elsewhere
    unknown = replace(jobs[0], policy="nobody")
    with pytest.raises(CheckpointError, match="'nobody' is neither a rule"):
        list(run_all([unknown], None, 1, "local"))


def test_a_ray_cluster_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    given = ["replay", "--policy", str(DEMO), *QUICK, "--ray", "nowhere"]
    assert evaluate.main(given) == 2
    assert "no Ray cluster can be reached at 'nowhere'" in capsys.readouterr().err


def test_a_report_drills_into_the_worst_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.html"
    given = ["replay", "--policy", "keep", str(DEMO), "--load", "0.3", "0.5", *QUICK]
    assert evaluate.main([*given, "--processes", "1", "--report", str(report)]) == 0
    told = last_json(capsys)
    assert told == json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "r.png").is_file()
    html = report.read_text()
    assert told["verdict"] in html
    assert told["command"] in html
    jobs = plan(policies=("keep", str(DEMO)), loads=(0.3, 0.5)).jobs()
    results = [result for _, result, _ in run_all(jobs, None, 1)]
    gains = window_gains(jobs, results, "keep")[str(DEMO)]
    assert [(w.cell, w.number) for w in gains] == [
        (f"generator, load {load:g}, seed 0", number) for load in (0.3, 0.5) for number in (0, 1)
    ]
    by_hand = [  # keep at load 0.3 and its windows, then demo's
        results[cell + 1]["scale_requests"]
        * (sum(ours["reward"]) - sum(theirs["reward"]))
        / sum(ours["arrived"])
        for cell in (0, 2)
        for ours, theirs in zip(results[cell + 1]["windows"], results[cell]["windows"], strict=True)
    ]
    assert [w.over_first for w in gains] == pytest.approx(by_hand)
    worst = min(gains, key=lambda w: w.over_first)
    assert f"Window {worst.number}, the worst for {DEMO}" in html
    assert f"{worst.cell}: J {worst.over_first:+.4f} over keep" in html


def test_the_best_in_hindsight_has_no_regret() -> None:
    """Two cells, and a policy that is best in each: rewards of one interval, by hand."""
    jobs = plan(policies=("keep", "myopic", "hysteresis"), loads=(0.3, 0.5)).jobs()
    window = {"arrived": [10.0], "finished": 10, "latency_mean_s": 1.0, "latency_p99_s": 1.0,
              "slo": 10.0, "switches": 0, "seconds": 15.0}  # fmt: skip
    rewards = [0.5, 0.9, 0.4, 0.2, 0.1, 0.8]  # of keep, myopic, hysteresis in each cell
    results = [
        {"scale_requests": 10.0, "grid_s": 15.0, "windows": [window | {"reward": [r]}]}
        for r in rewards
    ]
    found = summary(jobs, results, ["keep", "myopic", "hysteresis"])["policies"]
    regrets = [found[name]["regret_to_best_j"] for name in ("keep", "myopic", "hysteresis")]
    assert regrets == pytest.approx([(0.4 + 0.6) / 2, (0.0 + 0.7) / 2, (0.5 + 0.0) / 2])
    assert found["keep"]["regret_to_best_j_interval"] is None  # too little traffic
    assert found["myopic"]["gain_j"] == pytest.approx((0.4 - 0.1) / 2)


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
    table = parquet.read_table(tmp_path / "replay.parquet").to_pylist()
    assert [{k: str(v) for k, v in row.items()} for row in table] == rows
    assert {type(row["load"]) for row in table} == {float}
    statics = {r["policy"] for r in rows if r["policy"].startswith("static ")}
    assert len(rows) == (2 + len(statics)) * 2 * 2  # policies, loads, windows
    arrived = {(r["load"], r["window"]): set() for r in rows}
    for row in rows:
        arrived[row["load"], row["window"]].add(row["arrived"])
    assert all(len(numbers) == 1 for numbers in arrived.values())  # the same for every policy


def test_parquet_is_asked_for_left_out_or_told_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["replay", "--policy", str(DEMO), "--load", "0.3", *QUICK, "--processes", "1"]
    out = ["--out", str(tmp_path / "out")]
    assert evaluate.main([*given, "--parquet"]) == 2
    assert "give one with --out" in capsys.readouterr().err
    assert evaluate.main([*given, *out, "--no-parquet"]) == 0
    assert not (tmp_path / "out" / "replay.parquet").exists()
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    assert evaluate.main([*given, *out]) == 0
    assert (tmp_path / "out" / "replay.csv").is_file()
    assert not (tmp_path / "out" / "replay.parquet").exists()
    assert evaluate.main([*given, "--out", str(tmp_path / "other"), "--parquet"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'tidewright[parquet]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()


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
