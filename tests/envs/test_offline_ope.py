"""`evaluate.py ope`, `explain` and `compare` over logs that a controller wrote on the surrogate."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged_controller import CONFIG, TYPING, Steered

import evaluate
from controller.build import build_pipeline, pipeline_from_facts
from engine.errors import InvalidRequestError, UngatedPolicyError
from engine.profile import ProfiledCluster
from envs.logged import logged_run, read_parts
from envs.offline.findings import Question, find
from envs.offline.gate import GateRule
from envs.offline.report_pages import diagnostics
from envs.offline.target import load_target
from envs.offline.verdict import pending_verdict
from envs.recalibration import scaled
from policies.artifact import manifest_of
from policies.baselines import HysteresisPolicy
from policies.verdicts import policy_digest, require_passed

DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo" / "seed0"
TICKS = 160  # of 5 s
SHORT = [
    "--effect-s",
    "50",
    "--block-s",
    "100",
    "--draws",
    "40",
    "--no-progress",
    "--no-recalibrate",
]
AS_PROFILED: dict[str, Any] = {
    "effect_s": 50.0,
    "block_s": 100.0,
    "draws": 100,
    "recalibrate": False,
}  # it is right


@dataclass(frozen=True)
class Logged:
    """Two logs of the same traffic: of a policy that draws evenly, and of hysteresis."""

    even: Path
    hysteresis: Path
    profile: Path

    def ask(self, policy: str) -> list[str]:
        return ["ope", str(self.even), "--policy", policy, "--profile", str(self.profile), *SHORT]


@pytest.fixture(scope="module")
def logged(small_cluster: ProfiledCluster, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("ope")
    found = Logged(folder / "even", folder / "hysteresis", folder / "profile.json")
    found.profile.write_text(json.dumps(small_cluster.to_json()))
    Steered(small_cluster, found.even, num_ticks=TICKS).run()
    spec = build_pipeline(small_cluster, TYPING, CONFIG).observation_spec
    rule = HysteresisPolicy(spec)
    Steered(small_cluster, found.hysteresis, num_ticks=TICKS, policy=rule).run()
    return found


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_what_the_log_says_of_a_rule_is_what_the_rule_then_does(logged: Logged) -> None:
    found = find(Question((logged.even,), "hysteresis", logged.profile, **AS_PROFILED))
    parts, skipped = read_parts([logged.hysteresis])
    target = load_target("hysteresis", logged.profile, False, read_parts([logged.even])[0])
    truth = float(logged_run(parts, skipped, target.reward).decisions.reward.mean())
    ran = float(found.run.decisions.reward.mean())
    main = found.main
    assert main.value is not None
    assert main.value_interval is not None
    assert main.value_interval[0] <= truth <= main.value_interval[1]
    assert abs(main.value - truth) < 0.2 * abs(truth - ran)
    assert found.behaviour.startswith("even")


def test_a_wrong_profile_is_set_right_by_the_log(
    logged: Logged, small_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    number = len(small_cluster.profile.steps)
    wrong = tmp_path / "wrong.json"
    slower = scaled(small_cluster, np.log([*[1.25] * number, 1.0]))
    wrong.write_text(json.dumps(slower.to_json()))
    asked = Question((logged.even,), "hysteresis", wrong, effect_s=50.0, block_s=100.0, draws=10)
    fitted, as_profiled = find(asked), find(replace(asked, recalibrate=False))
    assert fitted.recalibration is not None
    assert as_profiled.recalibration is None
    factor, error = fitted.recalibration.factors()["tp1pp1"]
    assert factor == pytest.approx(1 / 1.25, abs=0.05)
    assert error < 0.1
    assert fitted.calibration is not None
    assert as_profiled.calibration is not None
    assert abs(fitted.calibration.bias) < 0.3 * abs(as_profiled.calibration.bias)
    assert fitted.calibration.model_error > 0.0 == as_profiled.calibration.model_error
    told = fitted.to_json()["recalibration"]["tp1pp1"]
    assert told == {"factor": round(factor, 4), "relative_error": round(error, 4)}
    assert "times over the profile's, fitted to the log" in "\n".join(diagnostics(fitted))


def test_what_did_not_happen_is_told_from_what_did(logged: Logged) -> None:
    """Weights over a window are refused with the reason; the log's own course is the log's."""
    found = find(Question((logged.even,), "keep", logged.profile, **AS_PROFILED))
    refused = {e.estimator: e.refusal for e in found.estimates if e.is_refused}
    assert "effective windows of the 5 needed" in refused["pdis"]
    assert set(found.target.keys) == {"4xtp1pp1"}
    assert found.target.switches == ()
    assert len(set(found.logged.keys)) > 1
    assert {s.after for s in found.logged.switches} <= set(found.logged.keys)
    assert found.modelled.keys[: len(found.logged.keys)] != found.target.keys
    assert found.forecast.coverage_q90 is not None
    assert 0.7 < found.forecast.coverage_q90 <= 1.0


def test_the_answer_is_written_whole_with_a_report(
    logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, out = tmp_path / "r.html", tmp_path / "out.json"
    given = [*logged.ask("hysteresis"), "--report", str(report), "--json", str(out)]
    assert evaluate.main(given) == 0
    told = last_json(capsys)
    assert told == json.loads(out.read_text()) == json.loads((tmp_path / "r.json").read_text())
    assert told["command"].startswith("python evaluate.py ope")
    low, high = told["gain_j_interval"]
    assert low < told["gain_j"] < high
    html = report.read_text()
    assert told["verdict"] in html
    assert told["command"] in html
    assert "http://" not in html
    assert "https://" not in html
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "r.html", "r.json", "r.png"]


def test_a_gate_lets_through_or_not(
    logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = tmp_path / "rule.yaml"
    rule.write_text("margin: 0.01\nmax_switches_per_hour: 200\n")
    assert evaluate.main([*logged.ask("hysteresis"), "--gate", str(rule)]) == 0
    assert last_json(capsys)["gate"]["passed"]
    rule.write_text("margin: 0.01\nmax_switches_per_hour: 1\nmin_worst_block: 0.9\n")
    assert evaluate.main([*logged.ask("hysteresis"), "--gate", str(rule)]) == 1
    gate = last_json(capsys)["gate"]
    results = {r["rule"]: (r["passed"], r["text"]) for r in gate["reasons"]}
    assert results["margin"][0]
    assert not results["max_switches_per_hour"][0]
    assert "not known" in results["min_worst_block"][1]  # no whole half hour


def test_a_checkpoint_is_asked_about_what_its_own_controller_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pipeline_from_facts(manifest_of(DEMO))
    Steered(pipeline.cluster, tmp_path / "log", num_ticks=60, pipeline=pipeline).run()
    given = ["ope", str(tmp_path / "log"), "--policy", str(DEMO), "--no-progress"]
    assert evaluate.main([*given, "--effect-s", "5", "--block-s", "10", "--sampled"]) == 0
    told = last_json(capsys)
    assert told["generator_refusal"] == ""
    assert told["overlap"]["unsupported"] == 0.0  # whoever ran drew evenly
    assert not told["deterministic"]


def test_a_verdict_is_written_beside_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, rule, out = tmp_path / "demo", tmp_path / "rule.yaml", tmp_path / "out" / "tuesday.json"
    shutil.copytree(DEMO, policy)
    out.parent.mkdir()
    given = ["compare", str(policy), "keep", "--load", "0.3", "--windows", "2", "--window-s", "150"]
    given += ["--no-progress", "--gate", str(rule), "--json", str(out)]
    unmet, met = {"min_worst_block": 0.9}, {"max_switches_per_hour": 1000.0}
    for asked, status in ((unmet, 1), (met, 0)):  # no window has a whole half hour
        rule.write_text(json.dumps(asked))
        assert evaluate.main(given) == status
        told = json.loads((out.parent / "tuesday.gate.json").read_text())
        assert told["digest"] == policy_digest(policy)
        assert told["rule"].items() >= asked.items()
        made = last_json(capsys)
        assert (told["command"], told["versions"]) == (made["command"], made["versions"])
        assert {k: told[k] for k in ("passed", "reasons")} == made["gate"]
    assert require_passed(out.parent, policy) == told["digest"]


def test_a_verdict_from_logs_lets_the_policy_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ope --gate --json`: the verdict file is of these very files, passed or not."""
    pipeline = pipeline_from_facts(manifest_of(DEMO))
    Steered(pipeline.cluster, tmp_path / "log", num_ticks=60, pipeline=pipeline).run()
    rule, out = tmp_path / "rule.yaml", tmp_path / "demo.json"
    given = ["ope", str(tmp_path / "log"), "--policy", str(DEMO), "--no-progress", "--sampled"]
    given += ["--effect-s", "5", "--block-s", "10", "--draws", "20", "--no-recalibrate"]
    given += ["--gate", str(rule), "--json", str(out)]
    for asked, status in (("min_worst_block: 0.9\n", 1), ("max_switches_per_hour: 1000\n", 0)):
        rule.write_text(asked)
        assert evaluate.main(given) == status
        made = last_json(capsys)
        assert made == json.loads(out.read_text())
        verdict = json.loads((tmp_path / "demo.gate.json").read_text())
        assert {k: verdict[k] for k in ("passed", "reasons")} == made["gate"]
        assert verdict["passed"] is (status == 0)
        assert verdict["digest"] == policy_digest(DEMO)
        assert verdict["command"] == made["command"]
        if status:
            with pytest.raises(UngatedPolicyError, match="did not pass"):
                require_passed(tmp_path, DEMO)
        else:
            assert require_passed(tmp_path, DEMO) == verdict["digest"]


def test_a_rule_has_no_files_and_gets_no_verdict(logged: Logged, tmp_path: Path) -> None:
    (tmp_path / "rule.yaml").write_text("max_switches_per_hour: 200\n")
    given = ["--gate", str(tmp_path / "rule.yaml"), "--json", str(tmp_path / "out.json")]
    assert evaluate.main([*logged.ask("hysteresis"), *given]) == 0
    assert not list(tmp_path.glob("*.gate.json"))


def test_a_policy_that_changed_while_it_was_judged_gets_no_verdict(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    pending = pending_verdict(tmp_path / "a.json", str(tmp_path / "demo"), GateRule(margin=0.0))
    assert pending is not None
    manifest = tmp_path / "demo" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InvalidRequestError, match="changed while it was judged"):
        pending.write((), {})
    assert not list(tmp_path.glob("*.gate.json"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{even}", "--policy", "{tmp}/none"], "is neither a rule (keep, myopic, hysteresis) nor"),
        (["{even}", "--policy", str(DEMO)], "cannot be asked about these decisions"),
        (["{tmp}/empty", "--policy", "keep"], "no decision with a whole interval after it"),
        (["{tmp}/bare", "--policy", "keep"], "decisions have no probabilities"),
        (["{tmp}/absent", "--policy", "keep"], "absent cannot be read"),
        (["{even}", "--policy", "keep", "--estimator", "oracle"], "no estimator 'oracle'"),
        (["{even}", "--policy", "keep", "--gate", "{tmp}/odd.yaml"], "unknown key 'j'"),
        (["{even}", "--policy", "keep", "--gate", "{tmp}/nothing.yaml"], "asks for nothing"),
        (["{even}", "--policy", "keep", "--json", "{tmp}/no/out"], "is no folder that can"),
        (["{even}", "--policy", "keep", "--profile", "{tmp}/empty"], "profile"),
        (["{even}", "--policy", "keep", "--effect-s", "900", "--block-s", "9"], "window < block"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(
    given: list[str],
    message: str,
    logged: Logged,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").write_text("")
    told = [json.loads(line) for line in logged.even.read_text().splitlines()[:30]]
    for record in told:
        for name in ("probabilities", "crc32", "n", "life"):
            record.pop(name, None)
        if record["record"] == "header":
            record["schema"] = 1
    (tmp_path / "bare").write_text("".join(json.dumps(record) + "\n" for record in told))
    (tmp_path / "odd.yaml").write_text("j: 1\n")
    (tmp_path / "nothing.yaml").write_text("level: 0.9\n")
    before = sorted(tmp_path.iterdir())
    filled = [g.format(even=logged.even, tmp=tmp_path) for g in given]
    report = [] if "--json" in given else ["--report", str(tmp_path / "r.html")]
    assert evaluate.main(["ope", *filled, *report, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_logged_decision_is_explained(logged: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in logged.even.read_text().splitlines()]
    decisions = [r for r in lines if r["record"] == "decision"]
    number = next(i for i, d in enumerate(decisions) if d["executed_key"] != d["deployment_key"])
    for tick in (str(number), decisions[number]["decision_id"]):
        assert evaluate.main(["explain", str(logged.even), "--tick", tick]) == 0
        told = last_json(capsys)
        assert told["tick"] == number
        assert told["executed"] == decisions[number]["executed_key"]
        assert f"switch to {told['executed']}" in told["summary"]
        assert "the switch was started" in told["afterwards"]
        chosen = [c["key"] for c in told["candidates"] if c["is_executed"]]
        assert chosen == [told["executed"]]
        probabilities = [c["probability"] for c in told["candidates"]]
        np.testing.assert_allclose(probabilities, decisions[number]["probabilities"][: len(probabilities)])  # fmt: skip  # noqa: E501
    assert evaluate.main(["explain", str(logged.even), "--tick", "9999"]) == 2
    assert "from 0 to 159" in capsys.readouterr().err


def test_two_logs_are_set_side_by_side_and_not_judged(
    logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(logged.even), str(logged.hysteresis)]
    given = ["compare", *names, "--profile", str(logged.profile), "--no-progress"]
    assert evaluate.main([*given, "--report", str(tmp_path / "r.html")]) == 0
    told = last_json(capsys)
    assert "not which policy is better" in told["verdict"]
    even, rule = (told["logs"][name] for name in names)
    assert even["arrivals_per_s"] == rule["arrivals_per_s"]  # these two had the same traffic
    assert rule["j"] > even["j"]
    rules = tmp_path / "rule.yaml"
    rules.write_text("margin: 0\n")
    assert evaluate.main([*given, "--gate", str(rules)]) == 2
    assert evaluate.main(["compare", "keep", names[0]]) == 2
    assert "evaluate.py ope" in capsys.readouterr().err
