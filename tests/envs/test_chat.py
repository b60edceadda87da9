"""Chat traffic and its replay against a real engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from engine.cluster import RequestStatus
from envs.chat import LONG, SHORT, ChatReplay, ChatTrace, build_chat_replay, chat_traffic
from envs.processes import start_server
from envs.replay import ReplaySummary
from envs.workload import Trace

READY = r"ready: (http://\S+) grpc"


def test_the_mix_changes_by_thirds_and_a_seed_repeats() -> None:
    chat = chat_traffic(300.0, seed=3)
    assert chat.questions == chat_traffic(300.0, seed=3).questions
    third = (chat.trace.arrival_s // 100.0).astype(int)
    assert np.all(np.diff(chat.trace.arrival_s) >= 0)
    for number, (texts, limit) in enumerate(((SHORT, 24), (None, 40), (LONG, 96))):
        rows = np.flatnonzero(third == number)
        assert set(chat.trace.output_tokens[rows]) == {limit}
        asked = {chat.questions[i] for i in rows}
        assert asked <= set(texts) if texts else all(q.startswith("Summarise") for q in asked)
    assert [int((third == n).sum()) > 20 for n in range(3)] == [True] * 3
    assert len(chat_traffic(0.001, 0).questions) == 1


def test_answers_are_kept_and_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    questions = ("one", "two", "one")
    trace = Trace(np.array([0.0, 0.05, 0.1]), np.array([9, 9, 9]), np.array([5, 6, 7]))
    arguments = ["engine", "--model", str(tiny_model_dir), "--port", "0", "--grpc-port", "0"]
    server = start_server("engine", arguments, tmp_path / "engine.log")

    async def replay(url: str) -> tuple[ReplaySummary, ChatReplay]:
        chat = build_chat_replay(f"{url}/v1", "", ChatTrace(trace, questions))
        async with chat.client:
            return await chat.run(), chat

    try:
        (url,) = server.wait_ready(READY, 60).groups()
        summary, chat = asyncio.run(replay(url))
    finally:
        server.stop()
    assert [r.reason for r in chat.records] == [""] * 3
    assert {r.status for r in chat.records} == {RequestStatus.FINISHED}
    assert 0 < summary.tokens <= 18
    assert sorted(chat.answers) == [0, 1, 2]
    assert [q for q, _ in chat.samples(5)] == ["one", "two"]
    assert [q for q, _ in chat.samples(1)] == ["one"]
