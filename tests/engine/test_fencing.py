"""Fencing: a real worker refuses stale calls, and a successor is not taken for its predecessor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine.channel import ChannelConfig, WorkerChannel
from engine.errors import StaleEpochError, UnavailableError
from engine.executor import LocalExecutor, WorkerConfig
from engine.fence import Fence
from engine.messages import (
    CloseTransfer,
    Hello,
    HostStore,
    OpenTransfer,
    RankFailed,
    ReleaseRank,
    encode,
)

TIMEOUT_S = 60.0


def test_a_fence_lets_nothing_older_through() -> None:
    fence = Fence()
    assert [fence.raise_to(n) for n in (2, 1)] == [2, 1]
    fence.check(2)
    fence.check(3)
    with pytest.raises(StaleEpochError, match=r"of switch 1, switch 2 has begun"):
        fence.check(1)


def test_a_worker_refuses_stale_calls_on_both_of_its_threads(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    executor = LocalExecutor()
    config = WorkerConfig(
        device=0,
        run_dir=str(tmp_path),
        model_dir=str(tiny_model_dir),
        dtype="float32",
        torch_device="cpu",
        block_size=16,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        eos_token_ids=(),
        group_timeout_s=1.0,
    )

    async def talk(channel: WorkerChannel) -> None:
        own = replace(config, engine_endpoint=channel.endpoint)
        executor.start([own], lambda device, incarnation: None)
        await channel.wait_for_hello(0, TIMEOUT_S)
        channel.fence = 5
        await channel.call(0, CloseTransfer)
        await channel.call(0, ReleaseRank, replica_id=0)
        channel.fence = 4
        for kind, fields in ((HostStore, {"name": "late"}), (ReleaseRank, {"replica_id": 0})):
            with pytest.raises(StaleEpochError, match=f"{kind.__name__}.* switch 4"):
                await channel.call(0, kind, **fields)
        await _overtake(channel)
        channel.shut_down()

    try:
        asyncio.run(_with_channel(tmp_path, talk))
    finally:
        executor.close()


async def _overtake(channel: WorkerChannel) -> None:
    """A call waits behind a slow one; it is stale when its turn comes, not when it arrived."""
    channel.fence = 6
    nobody_else = {"nonce": "n", "devices": [0, 1], "store": f"file://{channel.endpoint[6:]}-store"}
    slow = asyncio.ensure_future(channel.call(0, OpenTransfer, **nobody_else))
    waiting = asyncio.ensure_future(channel.call(0, HostStore, name="waits"))
    await asyncio.sleep(0)  # both are sent
    channel.fence = 7
    await channel.call(0, ReleaseRank, replica_id=0)  # answered by the other thread
    with pytest.raises((UnavailableError, StaleEpochError)):  # stale if it had not begun yet
        await slow
    with pytest.raises(StaleEpochError, match="of switch 6, switch 7"):
        await waiting
    await channel.call(0, CloseTransfer)


async def _with_channel(
    run_dir: Path,
    talk: Callable[[WorkerChannel], Coroutine[Any, Any, None]],
    heard: Callable[[Any], None] = lambda message: None,
) -> None:
    channel = WorkerChannel(run_dir, ChannelConfig(), heard, lambda device: None)
    channel.start()
    channel.expect(0, 0)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await talk(channel)
    finally:
        await channel.close()


def test_a_predecessor_is_not_heard_and_hears_nothing(tmp_path: Path) -> None:
    context = zmq.Context()
    heard: asyncio.Queue[Any] = asyncio.Queue()

    def worker(endpoint: str, name: bytes) -> Any:
        """Its serving socket; that of the migration thread says hello and no more."""
        sockets = []
        for kind in (b"m", b"w"):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, kind + name)
            socket.connect(endpoint)
            socket.send(encode(Hello(0, 1)))
            sockets.append(socket)
        return sockets[1]

    async def talk(channel: WorkerChannel) -> None:
        old = worker(channel.endpoint, b"0.0")
        await channel.wait_for_hello(0, TIMEOUT_S)
        old.send(encode(RankFailed(0, 7, "first")))
        assert (await heard.get()).error == "first"
        open_call = asyncio.ensure_future(channel.call(0, ReleaseRank, replica_id=0))
        await asyncio.sleep(0)
        channel.mark_dead(0)
        with pytest.raises(UnavailableError, match="died"):
            await open_call
        channel.expect(0, 1)
        with pytest.raises(UnavailableError, match="dead"):  # it has not said hello yet
            await channel.call(0, ReleaseRank, replica_id=0)
        old.send(encode(Hello(0, 1)))
        old.send(encode(RankFailed(0, 7, "from the grave")))
        new = worker(channel.endpoint, b"0.1")
        await channel.wait_for_hello(0, TIMEOUT_S)
        channel.shut_down()
        assert len(new.recv_multipart()) == 2
        new.send(encode(RankFailed(0, 7, "second")))
        assert (await heard.get()).error == "second"
        assert old.recv_multipart()  # the open call
        assert not old.poll(0)

    try:
        asyncio.run(_with_channel(tmp_path, talk, heard.put_nowait))
    finally:
        context.destroy(linger=0)
