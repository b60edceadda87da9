"""The decision log survives being killed, and holds what importance weighting needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.decision_log import DecisionLog, encode, log_files, read_log
from controller.log_records import interval_record
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    EventBatch,
    EventKind,
    RequestOutcome,
    RequestStatus,
    Routing,
    dense_deployment,
    parse_deployment_key,
)
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
    assert [s.line for s in contents.skipped] == [2]


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
    outcome = replace(outcome, request_class="chat", client_id="ann")
    events = (
        ClusterEvent(0, 1.0, EventKind.ARRIVED, arrival=Arrival("a", 1.0, 10, "chat", "ann")),
        ClusterEvent(1, 4.0, EventKind.ENDED, outcome=outcome),
        ClusterEvent(2, 4.5, EventKind.DEVICE_LOST, device=3),
    )
    replicas = dense_deployment(parse_deployment_key("1xtp1pp1"))
    snapshot = ClusterSnapshot(5.0, 3, replicas, Routing((0,)), (), None, num_arrived=9)
    record = interval_record(0.0, snapshot, EventBatch(events, 11, 7))
    assert (record["epoch"], record["num_arrived"], record["next_cursor"]) == (3, 9, 11)
    assert record["arrivals"] == [[1.0, 10, "chat", "ann"]]
    ended = ["a", RequestStatus.FINISHED, 1.0, 1.5, 4.0, 10, 6, 2, "chat", "ann"]
    assert record["requests"] == [ended]
    assert (record["from_s"], record["to_s"], record["num_events_lost"]) == (0.0, 5.0, 7)


def test_it_is_rotated_by_size_and_keeps_so_many_files(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, {}, max_bytes=2000, max_files=3)
    for i in range(60):
        log.append("decision", {"i": i, "filler": "x" * 200})
    log.close()
    names = [p.name for p in log_files(path)]
    assert names == ["log.jsonl.2", "log.jsonl.1", "log.jsonl"]
    assert all(p.stat().st_size <= 2000 for p in log_files(path))
    contents = read_log(path)
    kept = [r["i"] for r in contents.records if r["record"] == "decision"]
    assert kept == list(range(kept[0], 60))
    headers = [r for r in contents.records if r["record"] == "header"]
    assert [h["part"] for h in headers] == list(range(headers[0]["part"], headers[0]["part"] + 3))
    assert len({h["life"] for h in headers}) == 1
    assert [s.reason for s in contents.skipped] == []


def test_one_file_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path, {}, max_bytes=1000, max_files=1)
    for i in range(30):
        log.append("decision", {"i": i, "filler": "x" * 200})
    log.close()
    assert log_files(path) == [path]
    assert read_log(path).records[-1]["i"] == 29


def test_records_that_are_gone_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path, {}, max_bytes=1500, max_files=4)
    for i in range(20):
        log.append("decision", {"i": i, "filler": "x" * 200})
    log.close()
    lost = [json.loads(line) for line in (tmp_path / "log.1").read_text().splitlines()]
    (tmp_path / "log.1").unlink()
    contents = read_log(path)
    (gap,) = contents.skipped
    assert (gap.file, gap.line) == ("log", 1)
    assert gap.reason == f"records missing before this one: {len(lost) - 1}"  # and a header


@settings(max_examples=80, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_changed_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("bit") / "log"
    log = DecisionLog(path, {"life": "one"}, sync=False)
    for i in range(5):
        log.append("decision", {"i": i})
    log.close()
    data = bytearray(path.read_bytes())
    before = read_log(path).records
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    contents = read_log(path)
    assert contents.skipped
    assert all(record in before for record in contents.records)


def test_a_log_of_the_first_schema_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        '{"record": "header", "schema": 1, "policy": "ppo"}\n'
        '{"record": "decision", "at_s": 1.0}\n{"record": "deci'
    )
    assert [r["record"] for r in read_log(path).records] == ["header", "decision"]
    log = DecisionLog(path, {})
    log.append("decision", {"at_s": 2.0})
    log.close()
    contents = read_log(path)
    assert [r.get("schema") for r in contents.records] == [1, None, 2, None]
    assert [s.line for s in contents.skipped] == [3]


def test_what_another_version_or_program_wrote_is_skipped_and_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    DecisionLog(path, {}).close()
    later = encode("header", 0, {"schema": 3, "life": "x"}) + encode("decision", 1, {})
    path.write_bytes(path.read_bytes() + b'{"record": "decision"}\n[1]\n' + later)
    contents = read_log(path)
    assert [r["schema"] for r in contents.records] == [2]
    reasons = [s.reason.split(";")[0].split(":")[0] for s in contents.skipped]
    assert reasons == ["no checksum", "not a record of this log", "schema 3", "schema 3"]


def test_what_cannot_be_written_later_is_counted_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path, {})
    log.append("decision", {"i": 0})
    log.close()
    path.rename(tmp_path / "kept")
    path.mkdir()
    log.append("decision", {"i": 1})
    assert log.num_lost == 1
    path.rmdir()
    (tmp_path / "kept").rename(path)
    log.append("decision", {"i": 2})
    log.close()
    contents = read_log(path)
    assert [r["i"] for r in contents.records if r["record"] == "decision"] == [0, 2]
    assert [s.reason for s in contents.skipped] == ["records missing before this one: 1"]


def test_a_log_of_no_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="max_bytes and max_files of 1 or more"):
        DecisionLog(tmp_path / "log", {}, max_files=0)
