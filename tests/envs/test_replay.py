"""The replay against a real engine, and its arithmetic by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.cluster import RequestStatus
from envs.processes import start_server
from envs.replay import ReplayRecord, build_replay, random_prompts, summarise
from envs.showcase import ENGINE_READY
from envs.workload import Trace

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(base URL, model name) of a running engine."""
    arguments = ["engine", "--port", "0", "--grpc-port", "0", "--deployment", "2xtp1pp1"]
    arguments += ["--num-workers", "2", "--max-model-len", "128"]
    server = start_server("engine", arguments, tmp_path_factory.mktemp("engine") / "engine.log")
    try:
        ready = server.wait_ready(ENGINE_READY, 60.0)
        yield f"{ready['url']}/v1", ready["model"]
    finally:
        server.stop()


def make_trace(arrival_s: list[float], prompt: list[int], output: list[int]) -> Trace:
    return Trace(np.array(arrival_s), np.array(prompt), np.array(output))


def replay(engine: tuple[str, str], trace: Trace) -> tuple[list[ReplayRecord], float]:
    async def run() -> tuple[list[ReplayRecord], float]:
        replay = build_replay(*engine, trace, 256, seed=3, timeout_s=30.0)
        try:
            summary = await replay.run()
        finally:
            await replay.client.close()
        return sorted(replay.records, key=lambda r: r.index), summary.duration_s

    return asyncio.run(run())


def test_every_request_gets_its_tokens_at_its_time(engine: tuple[str, str]) -> None:
    trace = make_trace([5.0, 5.2, 5.2, 5.6], [7, 40, 1, 90], [5, 1, 30, 12])
    records, duration_s = replay(engine, trace)
    assert [r.status for r in records] == [RequestStatus.FINISHED] * 4
    assert [r.output_tokens for r in records] == [5, 1, 30, 12]
    assert [r.prompt_tokens for r in records] == [7, 40, 1, 90]
    for record, due_s in zip(records, (0.0, 0.2, 0.2, 0.6), strict=True):
        assert due_s <= record.arrival_s < due_s + 0.5
        assert record.ttft_s is not None
        assert 0 < record.ttft_s <= record.latency_s
    assert records[1].tpot_s is None
    assert records[2].tpot_s is not None
    assert records[2].longest_gap_s >= records[2].tpot_s
    assert duration_s >= 0.6


def test_what_the_engine_refuses_is_rejected_and_not_lost(engine: tuple[str, str]) -> None:
    records, _ = replay(engine, make_trace([0.0, 0.0], [200, 8], [20, 4]))
    assert [r.status for r in records] == [RequestStatus.REJECTED, RequestStatus.FINISHED]
    assert "HTTP 400" in records[0].reason


def test_no_server_means_lost() -> None:
    records, _ = replay(("http://127.0.0.1:9/v1", "tiny"), make_trace([0.0], [4], [4]))
    assert records[0].status is RequestStatus.FAILED
    assert records[0].reason


def test_summary_by_hand() -> None:
    def record(status: RequestStatus, ttft_s: float, tpot_s: float, gap_s: float) -> ReplayRecord:
        return ReplayRecord(0, status, 0.0, 4, 10, 1.0 + ttft_s, ttft_s, tpot_s, gap_s)

    done = [record(RequestStatus.FINISHED, i / 100, i / 1000, i / 10) for i in range(101)]
    others = [
        record(RequestStatus.REJECTED, 9.0, 9.0, 9.0),
        record(RequestStatus.FAILED, 9.0, 9.0, 9.0),
    ]
    summary = summarise(done + others, 12.0)
    assert (summary.requests_sent, summary.requests_finished) == (103, 101)
    assert (summary.requests_rejected, summary.requests_lost) == (1, 1)
    assert summary.tokens == 1010
    assert summary.ttft.p50_s == pytest.approx(0.5)
    assert summary.ttft.p99_s == pytest.approx(0.99)
    assert summary.tpot.p95_s == pytest.approx(0.095)
    assert summary.latency_mean_s == pytest.approx(1.5)
    assert summary.longest_gap_s == pytest.approx(10.0)
    assert summarise([], 0.0).ttft.p99_s == 0.0


def test_prompts_follow_the_seed() -> None:
    trace = make_trace([0.0, 1.0], [3, 5], [1, 1])
    prompts = random_prompts(trace, 256, seed=1)
    assert [len(p) for p in prompts] == [3, 5]
    assert prompts == random_prompts(trace, 256, seed=1) != random_prompts(trace, 256, seed=2)
    assert all(0 <= token < 256 for p in prompts for token in p)


def test_log_of_the_engine_stays_beside_the_run(tmp_path: Path) -> None:
    server = start_server("engine", ["engine", "--help"], tmp_path / "deep" / "engine.log")
    server.wait_ready("--deployment", 30.0)
    server.stop()
    assert "--deployment" in (tmp_path / "deep" / "engine.log").read_text()
