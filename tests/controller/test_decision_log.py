"""The decision log survives being killed, and holds what importance weighting needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.decision_log import DecisionLog, interval_record, read_log
from engine.cluster import Arrival, ClusterEvent, EventKind, RequestOutcome, RequestStatus
from engine.errors import InvalidRequestError

ROOT = Path(__file__).parents[2]


def test_the_next_life_starts_on_its_own_line_after_a_torn_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    DecisionLog(path, {"life": 1}).close()
    with path.open("a") as out:
        out.write('{"record": "decision", "at_')
    DecisionLog(path, {"life": 2}).close()
    DecisionLog(path, {"life": 3}).close()
    contents = read_log(path)
    assert [r["life"] for r in contents.records] == [1, 2, 3]
    assert [number for number, _ in contents.skipped] == [2]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400))
def test_cut_anywhere_it_gives_every_whole_record(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "log"
    log = DecisionLog(path, {})
    for i in range(8):
        log.append("decision", {"i": i, "text": "ä\n"})
    log.close()
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    contents = read_log(path)
    whole = [json.loads(line) for line in data.split(b"\n")[:-1]]
    tail = data.rpartition(b"\n")[2]
    complete = tail.endswith(b"}")  # only its newline is missing: nothing is lost
    assert list(contents.records) == whole + ([json.loads(tail)] if complete else [])
    assert len(contents.skipped) == (1 if tail and not complete else 0)


WRITER = """
import sys
from pathlib import Path
from controller.decision_log import DecisionLog
log, i = DecisionLog(Path(sys.argv[1]), {}), 0
while True:
    log.append("decision", {"i": i, "filler": "x" * 3000})
    i += 1
    if i == 50:
        print("go", flush=True)
"""


def test_a_killed_writer_loses_at_most_its_last_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"go\n"
        os.kill(writer.pid, signal.SIGKILL)
    contents = read_log(path)
    decisions = [r["i"] for r in contents.records if r["record"] == "decision"]
    assert decisions == list(range(len(decisions)))
    assert len(decisions) >= 50
    assert len(contents.skipped) <= 1


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"cannot be written: .*--log"):
        DecisionLog(tmp_path / "file" / "log.jsonl", {})


def test_nan_is_refused_rather_than_written_as_no_json(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", {})
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append("decision", {"latency_s": float("nan")})
    log.append("decision", {"latency_s": 1.0})
    log.close()
    assert [r["record"] for r in read_log(tmp_path / "log").records] == ["header", "decision"]


def test_an_interval_lists_every_arrival_and_every_end() -> None:
    outcome = RequestOutcome("a", RequestStatus.FINISHED, 1.0, 1.5, 4.0, 10, 6, 2)
    events = (
        ClusterEvent(0, 1.0, EventKind.ARRIVED, arrival=Arrival("a", 1.0, 10, "chat")),
        ClusterEvent(1, 4.0, EventKind.ENDED, outcome=outcome),
        ClusterEvent(2, 4.5, EventKind.DEVICE_LOST, device=3),
    )
    record = interval_record(0.0, 5.0, events, 7)
    assert record["arrivals"] == [[1.0, 10, "chat"]]
    assert record["requests"] == [["a", RequestStatus.FINISHED, 1.0, 1.5, 4.0, 10, 6, 2]]
    assert (record["from_s"], record["to_s"], record["num_events_lost"]) == (0.0, 5.0, 7)
