"""The headroom study on a pool and a window small enough for a test."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.cluster import SloSpec, UtilitySpec, WorkloadType, WorkloadTyping
from engine.config import load_config
from engine.errors import InvalidRequestError
from envs.reward import RewardConfig
from envs.study import rules
from envs.study.__main__ import main
from envs.study.cell import run_anew, run_cell
from envs.study.config import DEFAULT_STUDY, Cell, StudyConfig, Windows
from envs.study.report import BEGIN, END, best_static, figures, run_of, write_page
from envs.study.results import read_results, write_results
from envs.study.scores import Objectives, WindowRecord, arrived_since, score_run
from envs.study.world import build_world, run_windows
from envs.workload import Trace
from policies.base import TrafficColumns
from policies.baselines import HysteresisConfig
from policies.guarded import GuardedConfig
from policies.oracle import RefineConfig

SMALL = Windows(training_share=0.5, tuning=1, number=1, window_s=300.0, peak_s=100.0)
SMALL_CELL = Cell(
    name="test",
    trace="generated",
    profile="tiny_llama_cpu4.json",
    devices=4,
    load=0.6,
    length_factor=0.125,
    ladder="full",
    windows=SMALL,
)


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    study: StudyConfig = load_config(StudyConfig, DEFAULT_STUDY, {})
    return study.model_copy(
        update={
            "num_equal": 2,
            "num_unequal": 1,
            "tuning": study.tuning.model_copy(update={"horizon_s": (60.0,), "num_ticks": (1,)}),
        }
    )


@pytest.fixture(scope="module")
def result(config: StudyConfig) -> dict[str, Any]:
    return run_cell(config, SMALL_CELL, Path(), lambda what: None)


def test_every_rule_meets_the_same_requests_and_no_bound_is_beaten(result: dict[str, Any]) -> None:
    names = [run["rule"] for run in result["runs"]]
    assert len(set(names)) == len(names)
    assert {"keep", "oserve", "oserve_cold", "hysteresis", "mpc", "mpc_perfect", "beam"} <= {*names}
    bound = result["bounds"]
    for run in result["runs"]:
        assert run["arrived"] == result["requests"] > 50
        assert run["attainment"]["interactive"] <= bound["goodput"] <= 1.0
        assert run["latency_s"] >= bound["latency_s"] > 0.0
        assert -1.0 <= run["utility"] <= bound["utility"] <= 1.0
        assert run["latency_p50_s"] <= run["latency_p99_s"]
    keep, first = run_of(result, "keep"), result["initial"]
    assert keep is not None
    assert keep["switches"] == 0
    static = run_of(result, f"static {first}")
    assert static is None or static["latency_s"] == keep["latency_s"]


def test_policies_are_guarded_as_was_best_on_the_tuning_windows(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a margin that no member reaches the guarded policy is hysteresis, request for request.
    Run anew, the learned policies come out as they did, and nothing else is touched."""
    for seed in ("seed0", "seed1"):
        shutil.copytree(rules.ARTIFACTS / "demo" / "seed0", tmp_path / "pool" / seed)
    monkeypatch.setattr(rules, "ARTIFACTS", tmp_path)
    cell = SMALL_CELL.model_copy(update={"ladder": "policy", "policy": "pool"})
    world, tuned = build_world(config, cell, Path()), HysteresisConfig()
    rule = rules.guarded_rule(world, tuned, GuardedConfig(margin=30.0))
    policies = (rule.policy, rules.hysteresis_policy(tuned))
    guarded, alone = (run_windows(world, world.test, p, rule.pipeline(world)) for p in policies)
    assert [r.switches for r in guarded] == [r.switches for r in alone]
    assert (guarded[0].traffic.finish_s == alone[0].traffic.finish_s).all()

    said: list[str] = []
    tuning = config.tuning.model_copy(update={"guarded_margin": (30.0, 40.0, 0.5)})
    refining = RefineConfig(blocks=(2, 1), deployments=2)
    study = config.model_copy(update={"tuning": tuning, "refine": refining})
    found = run_cell(study, cell, Path(), said.append)
    assert [s for s in said if "guarded " in s] == [f"tuning guarded {m}" for m in (30, 40, 0.5)]
    assert found["guarded"]["margin"] in (30.0, 0.5)  # the first of equals
    assert run_of(found, "ppo seed1") is not None

    said.clear()
    runs = [r if r["rule"] != "keep" else r | {"utility": 0.123} for r in found["runs"]]
    again = run_anew(study, found | {"runs": runs}, Path(), (), said.append)
    assert {s for s in said if not s.startswith("tuning")} == {"ppo seed0", "ppo seed1", "guarded"}
    assert sorted(again["runs"], key=str) == sorted(runs, key=str)
    assert again["guarded"] == found["guarded"]
    by_utility, by_latency = (run_of(found, f"hindsight by {by}") for by in ("utility", "latency"))
    assert by_utility is not None
    assert by_latency is not None
    for run in found["runs"]:
        if run["rule"] != "beam":
            assert run["utility"] <= by_utility["utility"]
            assert run["latency_s"] >= by_latency["latency_s"]
    anew = run_anew(study, found, Path(), ("hindsight",), lambda what: None)
    assert sorted(anew["runs"], key=str) == sorted(found["runs"], key=str)

    said.clear()
    ruled = run_anew(study, found | {"runs": runs}, Path(), ("keep",), said.append)
    assert said == ["keep"]
    assert sorted(ruled["runs"], key=str) == sorted(found["runs"], key=str)
    with pytest.raises(InvalidRequestError, match="has no rule kepp; expected of keep, "):
        run_anew(study, found, Path(), ("kepp",), said.append)


def test_more_windows_to_tune_on_change_nothing_else(config: StudyConfig) -> None:
    """What is scored, the load and the deployment that rules start in stay."""
    world = build_world(config, SMALL_CELL, Path())
    more = build_world(config.model_copy(update={"times_tuning": 3}), SMALL_CELL, Path())
    assert (len(world.training), len(more.training)) == (1, 3)
    assert more.initial_key == world.initial_key
    assert more.factor == world.factor
    for now, before in zip(more.test, world.test, strict=True):
        assert (now.arrival_s == before.arrival_s).all()


def test_statics_are_at_their_load(result: dict[str, Any]) -> None:
    capacity = result["capacity"]
    assert capacity["static"]["load"] == pytest.approx(0.6)
    assert capacity["moving"]["load"] <= capacity["static"]["load"] <= capacity["equal"]["load"]


def test_figures_by_hand(result: dict[str, Any]) -> None:
    found = figures([result])
    static, hysteresis = best_static(result), run_of(result, "hysteresis")
    assert static is not None
    assert hysteresis is not None
    expected = static["latency_s"] / hysteresis["latency_s"]
    assert found["latency_dyn_vs_static_mean"] == pytest.approx(expected, abs=1e-4)
    assert found["goodput_after_device_loss_ratio"] == 0.0  # no such cell


def test_results_and_page_are_written(result: dict[str, Any], tmp_path: Path) -> None:
    out, page = tmp_path / "results.json.gz", tmp_path / "page.md"
    write_results(out, {"test": result})
    first = out.read_bytes()
    assert read_results(out)["test"]["runs"] == result["runs"]
    write_results(out, read_results(out))
    assert out.read_bytes() == first
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_page([result], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| test |" in text
    assert page.with_suffix(".png").stat().st_size > 1000


def test_the_committed_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    committed = DEFAULT_STUDY.parents[1] / "docs" / "headroom.md"
    page = tmp_path / "headroom.md"
    page.write_text(committed.read_text())
    results = DEFAULT_STUDY.parents[1] / "benchmarks" / "results" / "headroom.json.gz"
    write_page(list(read_results(results).values()), page)
    assert page.read_text() == committed.read_text()


def test_cells_that_do_not_exist_are_named() -> None:
    with pytest.raises(SystemExit, match=r"cells \['nowhere'\] are not in"):
        main(["--cells", "nowhere"])


def test_scores_by_hand() -> None:
    """Three requests: 2 s, 8 s, and one that has waited 6 s at the end; the second is too slow."""
    trace = Trace(np.array([0.0, 1.0, 4.0]), np.full(3, 10), np.full(3, 3), 10.0)
    columns = TrafficColumns(
        arrival_s=trace.arrival_s,
        arrival_prompt_tokens=trace.prompt_tokens,
        index=np.array([0, 1]),
        finished=np.array([True, True]),
        ended_arrival_s=np.array([0.0, 1.0]),
        first_token_s=np.array([1.0, 2.0]),
        finish_s=np.array([2.0, 9.0]),
        prompt_tokens=np.full(2, 10),
        output_tokens=np.full(2, 3),
    )
    typing = WorkloadTyping((WorkloadType("only", 10.0, 3.0),), (1.0,))
    slo = SloSpec(2.0, 1.0)
    reward = RewardConfig(1.0, 0.0, 0.5, UtilitySpec(0.5, 0.3, 0.2, 16.0), slo)
    objectives = Objectives(slo, SloSpec(2.0, 10.0), (True,), reward)
    record = WindowRecord(trace, columns, 10.0, 40.0, "", ((1.0, ""),), 2.0)
    found = score_run("rule", [record], objectives, typing)
    assert found.latency_s == pytest.approx((2 + 8 + 6) / 3)
    assert found.latency_geometric_s == pytest.approx((2 * 8 * 6) ** (1 / 3))
    assert found.attainment == pytest.approx({"interactive": 1 / 3, "batch": 2 / 3, "mixed": 2 / 3})
    assert found.unfinished == 1
    ended = (
        0.3 * (1 - 2 * math.log(7) / math.log(16)) - 0.2
    )  # 4 times the reference, tokens 7 times
    waiting = 0.8 * (1 - 2 * math.log(3) / math.log(16)) - 0.2
    assert found.utility == pytest.approx((1.0 + ended + waiting) / 3)
    assert found.windows == [{"utility": found.utility * 3, "arrived": 3, "switches": 1}]
    later = score_run("rule", [arrived_since(record, 0.5)], objectives, typing)
    assert later.latency_s == pytest.approx((8 + 6) / 2)
    assert later.arrived == 2
