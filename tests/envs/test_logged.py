"""Logs of a controller over the surrogate, read back: rewards, propensities, and what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged_controller import GRID_S, REWARD, TICKS, Even, Steered

from controller.log_records import REQUEST_FIELDS
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.logged import LoggedRun, read_logs
from envs.workload import Trace
from policies.ope_data import decide_on, ratios


@pytest.fixture(scope="module")
def logged(
    small_cluster: ProfiledCluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float], Trace]:
    path = tmp_path_factory.mktemp("logged") / "log"
    steered = Steered(small_cluster, path)
    return path, steered.run(), steered.trace


def read(*paths: Path) -> LoggedRun:
    return read_logs(paths, REWARD)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, told: list[dict[str, Any]]) -> Path:
    """As schema 1, which has no checksums."""
    plain = [{k: v for k, v in r.items() if k not in ("crc32", "n", "life")} for r in told]
    for record in plain:
        if record["record"] == "header":
            record["schema"] = 1
    path.write_text("".join(json.dumps(record) + "\n" for record in plain))
    return path


def test_rewards_are_those_counted_beside_the_controller(
    logged: tuple[Path, list[float], Trace],
) -> None:
    path, rewards, _ = logged
    run = read(path)
    assert len(run.decisions) == TICKS - 1  # nothing is known of after the last
    np.testing.assert_allclose(run.decisions.reward, rewards, atol=1e-9)
    assert np.std(rewards) > 0.01
    assert run.skipped == (f"log: decision at {TICKS * GRID_S:g} s: the log ends",)


def test_propensities_are_those_that_were_logged(
    logged: tuple[Path, list[float], Trace],
) -> None:
    path, _, _ = logged
    told = [r for r in records(path) if r["record"] == "decision"][:-1]
    decisions = read(path).decisions
    np.testing.assert_allclose(decisions.propensity, [d["propensity"] for d in told])
    assert decisions.executed_keys == tuple(d["executed_key"] for d in told)
    assert len({d["executed_key"] for d in told}) > 1
    assert decisions.segment.tolist() == [0] * len(told)


def test_the_same_policy_on_what_was_logged_has_ratios_of_one(
    logged: tuple[Path, list[float], Trace],
) -> None:
    run = read(logged[0])
    log = run.decisions
    again = decide_on(Even(), run.observations, log.segment, log.generator)
    np.testing.assert_allclose(ratios(log, again), 1.0)


def test_the_arrivals_are_those_of_the_trace(logged: tuple[Path, list[float], Trace]) -> None:
    path, _, trace = logged
    (part,) = read(path).parts
    found = part.traffic.trace
    np.testing.assert_allclose(found.arrival_s, trace.arrival_s)
    np.testing.assert_array_equal(found.prompt_tokens, trace.prompt_tokens)
    known = len(trace) - part.traffic.num_guessed
    assert known > 0.9 * len(trace)
    assert (found.output_tokens == trace.output_tokens).sum() >= known


def test_what_switches_took_is_read_of_those_that_were_done(
    logged: tuple[Path, list[float], Trace], tmp_path: Path
) -> None:
    told = records(logged[0])
    outcomes = [r for r in told if r["record"] == "outcome"]
    took = [float(r["duration_s"]) for r in outcomes]
    assert len(took) > 3
    (part,) = read(logged[0]).parts
    assert part.switch_s == tuple(took)
    outcomes[0]["ticket"]["phase"], outcomes[1]["duration_s"] = "rolled_back", -1.0
    changed = read(write(tmp_path / "changed", told))
    assert changed.parts[0].switch_s == tuple(took[2:])
    assert any("a switch took -1.0 s; expected a finite" in text for text in changed.skipped)


def test_the_seconds_per_token_of_an_interval_are_its_finished_requests(
    logged: tuple[Path, list[float], Trace],
) -> None:
    (part,) = read(logged[0]).parts
    told = [r for r in records(logged[0]) if r["record"] == "interval"]
    at = max(range(len(told)), key=lambda i: len(told[i]["requests"]))
    rows = [dict(zip(REQUEST_FIELDS, values, strict=True)) for values in told[at]["requests"]]
    wanted = [
        (r["finish_s"] - r["first_token_s"]) / (r["output_tokens"] - 1)
        for r in rows
        if r["status"] == "finished" and r["output_tokens"] > 1
    ]
    assert len(wanted) > 3
    np.testing.assert_allclose(part.intervals[at].tpot_s, wanted)


def test_a_torn_end_and_a_foreign_line_cost_what_they_hold(
    logged: tuple[Path, list[float], Trace], tmp_path: Path
) -> None:
    lines = logged[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "torn").write_bytes(b"".join(lines[:20]) + b"hello\n" + lines[20] + lines[21][:90])
    run = read(tmp_path / "torn")
    whole = [json.loads(line)["record"] for line in lines[:21]]
    assert len(run.decisions) == whole.count("interval") - 1
    assert any("line 21: not JSON" in text for text in run.skipped)
    assert any("line 23: torn record" in text for text in run.skipped)


def test_lost_events_and_a_restarted_engine_end_a_part(
    logged: tuple[Path, list[float], Trace], tmp_path: Path
) -> None:
    told = records(logged[0])
    intervals = [i for i, r in enumerate(told) if r["record"] == "interval"]
    told[intervals[10]] |= {"num_events_lost": 7}
    run = read(write(tmp_path / "lost", told))
    assert np.bincount(run.decisions.segment).tolist() == [9, TICKS - 1 - 9 - 1]
    assert any("7 events were lost" in text for text in run.skipped)
    told = records(logged[0])
    run = read(write(tmp_path / "gone", told[: intervals[10]] + told[intervals[10] + 2 :]))
    assert np.bincount(run.decisions.segment).tolist() == [9, TICKS - 1 - 9 - 2]
    assert any("an interval is missing" in text for text in run.skipped)
    twice = read(logged[0], logged[0])
    assert np.bincount(twice.decisions.segment).tolist() == [TICKS - 1] * 2


def test_schema_1_without_a_guard_map_means_the_same(
    logged: tuple[Path, list[float], Trace], tmp_path: Path
) -> None:
    told = [{k: v for k, v in r.items() if k != "guard_map"} for r in records(logged[0])]
    old, new = read(write(tmp_path / "old", told)).decisions, read(logged[0]).decisions
    np.testing.assert_array_equal(old.guard_map, new.guard_map)
    np.testing.assert_allclose(old.reward, new.reward)


def changed(
    logged: Path, path: Path, header: dict[str, Any], decision: dict[str, Any]
) -> LoggedRun:
    told = records(logged)
    for record in told:
        record |= {"header": header, "decision": decision}.get(record["record"], {})
    return read(write(path, told))


def test_who_really_decided(logged: tuple[Path, list[float], Trace], tmp_path: Path) -> None:
    """A fall-back is the environment's doing; a deterministic or an advising controller has one
    outcome."""
    as_logged = read(logged[0]).decisions
    late = changed(logged[0], tmp_path / "1", {}, {"reason": "fallback: late"}).decisions
    assert not late.free.any()
    np.testing.assert_allclose(late.propensity, 1.0)
    sure = changed(logged[0], tmp_path / "2", {"deterministic": True}, {}).decisions
    np.testing.assert_allclose(sure.propensity, 1.0)
    assert sure.free.tolist() == as_logged.free.tolist()
    advised = changed(logged[0], tmp_path / "3", {}, {"mode": "advisory"}).decisions
    assert set(advised.executed.tolist()) == {0}
    assert (advised.behaviour[:, 0] == 1).all()


def test_bad_logs_are_one_sentence(logged: tuple[Path, list[float], Trace], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"none cannot be read: No such file"):
        read(tmp_path / "none")
    (tmp_path / "empty").write_text("")
    with pytest.raises(InvalidRequestError, match=r"empty: no decision with a whole interval"):
        read(tmp_path / "empty")
    told = records(logged[0])
    for record in told:
        record.pop("probabilities", None)
    with pytest.raises(InvalidRequestError, match="no decision with a whole interval"):
        read(write(tmp_path / "bare", told))
    with pytest.raises(InvalidRequestError, match="written with features other"):
        changed(logged[0], tmp_path / "other", {"spec_hash": "other", "versions": {}}, {})
    told = records(logged[0])
    told[0] |= {"pipeline_hash": "newer", "versions": {"features": told[0]["spec_hash"]}}
    newer = write(tmp_path / "newer", told)
    with pytest.raises(InvalidRequestError, match="2 candidate generators"):
        read(logged[0], newer)
