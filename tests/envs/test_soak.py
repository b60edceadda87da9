"""The soak's rules notice what they are for, and a short soak holds them all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.decision_log import DecisionLog
from controller.remote import RemoteCluster
from engine.profile import ProfiledCluster
from envs.soak.checks import FollowedLog, Footprint, Watch
from envs.soak.engine import Asked, FaultyEngine

ROOT = Path(__file__).parents[2]
FINE = Asked("d1", 10.0, False, 5.0, 0.1)


@pytest.fixture
def watch(small_cluster: ProfiledCluster, tmp_path: Path) -> Iterator[Watch]:
    engine = FaultyEngine(small_cluster, "4xtp1pp1", 5.0)
    remote, log = RemoteCluster(engine.target), FollowedLog(tmp_path / "log")
    written = DecisionLog(tmp_path / "log", {})
    told = {"policy": "restless", "failure": "", "mask_reasons": ["", "dwell"]}
    written.append("decision", {"seq": 1, "decision_id": "d1"} | told)
    written.append("decision", {"seq": 2, "decision_id": "d2"} | told | {"policy": "undo"})
    written.close()
    try:
        yield Watch(engine, log, dwell_s=3.0, stale_s=2.0, remote=remote)
    finally:
        remote.close()
        engine.close()
        log.close()


def broken_by(watch: Watch, *asked: Asked) -> list[str]:
    watch.engine.asked.extend(asked)
    watch.look()
    return [violation.partition(":")[0] for violation in watch.violations.found]


def test_what_is_fine_is_silent(watch: Watch) -> None:
    first = Asked("d1", 10.0, False, math.inf, 0.1)
    undo = Asked("d2", 11.0, False, 0.5, 1.9)
    assert broken_by(watch, FINE, first, undo) == []
    assert (watch.num_switches, watch.num_undone) == (3, 1)
    assert watch.log.masked == {"dwell": 2}


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (Asked("d9", 10.0, False, 5.0, 0.1), "decision logged"),
        (Asked("d1", 10.0, True, 5.0, 0.1), "one switch"),
        (Asked("d1", 10.0, False, 2.0, 0.1), "dwell"),
        (Asked("d1", 10.0, False, 5.0, 6.0), "fresh metrics"),
        (Asked("d1", 10.0, False, 5.0, math.inf), "fresh metrics"),
    ],
)
def test_a_switch_that_should_not_have_been_is_noticed(
    watch: Watch, asked: Asked, rule: str
) -> None:
    assert broken_by(watch, asked) == [rule]


def test_a_tick_that_is_missing_and_a_changed_record_are_noticed(watch: Watch) -> None:
    watch.look()
    path = watch.log._path
    later = DecisionLog(path, {})
    later.append("tick", {"seq": 4, "status": "failed"})
    later.close()
    assert broken_by(watch) == ["log readable"]
    path.write_bytes(path.read_bytes() + b'{"record": "x", "n": 9, "crc32": "00000000"}\n')
    assert broken_by(watch) == ["log readable"] * 2


def test_a_term_that_falls_and_a_lost_request_are_noticed(watch: Watch) -> None:
    watch._term = 7
    watch._life = watch.engine.num_lives
    assert broken_by(watch) == ["term"]
    watch.engine.runtime.num_sent += 1
    watch.drained()
    assert watch.violations.found[-1].startswith("no request lost")


def test_what_darkens_the_engine_is_what_a_controller_sees(watch: Watch) -> None:
    watch.engine.faults.is_nan = True
    assert all(math.isnan(r.measured_at_s) for r in watch.remote.snapshot().replicas)
    watch.engine.faults.is_dark = True
    assert watch.remote.snapshot().replicas == ()
    assert watch.engine.truth().replicas


def test_growth_is_that_of_the_last_third_over_the_first() -> None:
    footprint = Footprint(1, [90, *[100] * 30], [9, *[10] * 30])
    assert footprint.growth() == (0.0, 0.0)
    grown = Footprint(1, list(range(100, 400)), [10] * 150 + [20] * 150)
    assert grown.growth()[0] > 0.5
    assert grown.growth()[1] == 10.0


def test_a_log_is_followed_across_files(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", {}, max_bytes=3000, max_files=4)
    followed, seen = FollowedLog(tmp_path / "log"), deque[int]()
    for seq in range(1, 60):
        log.append("tick", {"seq": seq, "status": "failed", "filler": "x" * 150})
        followed.follow()
        seen.append(followed.next_seq)
    log.close()
    followed.close()
    assert (list(seen), followed.problems) == (list(range(2, 61)), [])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_soak_holds_every_rule() -> None:
    """Each fault once, three seconds apart."""
    command = [sys.executable, "-m", "envs.soak", "--minutes", "0.4", "--every-s", "3"]
    done = subprocess.run(
        [*command, "--grid-s", "0.2"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["violations"] == 0
    assert len(told["faults"]) >= 5
