"""The engine process's end of the channel to its workers: calls with replies, one-way messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from engine.errors import UnavailableError
from engine.messages import Hello, Reply, decode_to_engine, encode

CALL_TIMEOUT_S = 60.0


class WorkerChannel:
    """Owns the ROUTER socket. Replies resolve their call; everything else goes to `on_message`."""

    def __init__(self, run_dir: Path, on_message: Callable[[Any], None]) -> None:
        self._on_message = on_message
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.bind(f"ipc://{run_dir}/engine")
        self._calls: dict[int, tuple[int, asyncio.Future[Reply]]] = {}
        self._next_call_id = 0
        self._hello: dict[int, asyncio.Event] = {}
        self._dead: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._receive(), name="worker-channel")

    async def wait_for_hello(self, device: int, timeout_s: float) -> None:
        """Raises UnavailableError when the worker has not reported in time."""
        event = self._hello.setdefault(device, asyncio.Event())
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"worker {device} did not start within {timeout_s:.0f} s; see its log above."
            ) from None
        if device in self._dead:
            raise UnavailableError(f"worker {device} ended while starting; see its log above.")

    def send(self, device: int, message: Any) -> None:
        """Hand over a one-way message; dropped when the worker is dead."""
        if device not in self._dead:
            # a ROUTER queues without blocking below its high-water mark
            self._socket.send_multipart([f"w{device}".encode(), encode(message)])

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        """Send a call and await its reply. Raises UnavailableError on error, death or deadline."""
        if device in self._dead:
            raise UnavailableError(f"worker {device} is dead")
        call_id = self._next_call_id
        self._next_call_id += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (device, future)
        try:
            self.send(device, kind(call_id=call_id, **fields))
            reply = await asyncio.wait_for(future, CALL_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(
                f"worker {device} did not answer {kind.__name__} within {CALL_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            self._calls.pop(call_id, None)
        if reply.error:
            raise UnavailableError(f"{kind.__name__} on worker {device}: {reply.error}")
        return reply

    def mark_dead(self, device: int) -> None:
        """Fail the worker's open calls; nothing more is sent to it."""
        self._dead.add(device)
        self._hello.setdefault(device, asyncio.Event()).set()
        for owner, future in list(self._calls.values()):
            if owner == device and not future.done():
                future.set_exception(UnavailableError(f"worker {device} died"))

    async def _receive(self) -> None:
        while True:
            _, data = await self._socket.recv_multipart()
            message = decode_to_engine(data)
            match message:
                case Hello():
                    self._hello.setdefault(message.device, asyncio.Event()).set()
                case Reply():
                    _, future = self._calls.get(message.call_id, (0, None))
                    if future is not None and not future.done():
                        future.set_result(message)
                case _:
                    self._on_message(message)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=200)
