"""The engine process's end of the channel to its workers: calls with replies, one-way messages.

Every message is also a sign of life. A worker that gives none for `heartbeat_timeout_s` is told of
as silent; whoever started it kills it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from engine.errors import UnavailableError
from engine.messages import Beat, Hello, Reply, decode_to_engine, encode
from engine.sockets import CurveKeys, Sockets

logger = logging.getLogger(__name__)
CALL_TIMEOUT_S = 60.0
WATCH_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """`host` is the engine's own address for `tcp://`; empty for `ipc://`. `keys` are those of
    CURVE, None for a network that the operator trusts."""

    host: str = ""
    keys: CurveKeys | None = None
    heartbeat_timeout_s: float = 10.0


class WorkerChannel:
    """Owns the ROUTER socket. Replies resolve their call; everything else goes to `on_message`.
    `on_silence(device)` is called once for a worker that said hello and then nothing for long."""

    def __init__(
        self,
        run_dir: Path,
        config: ChannelConfig,
        on_message: Callable[[Any], None],
        on_silence: Callable[[int], None],
    ) -> None:
        self._config, self._on_message, self._on_silence = config, on_message, on_silence
        self._sockets = Sockets(zmq.asyncio.Context(), str(run_dir), config.host, config.keys)
        self._socket, self.endpoint = self._sockets.bind(zmq.ROUTER, "engine")
        self._calls: dict[int, tuple[int, asyncio.Future[Reply]]] = {}
        self._next_call_id = 0
        self._hello: dict[int, asyncio.Event] = {}
        self._dead: set[int] = set()
        self._silent_s: dict[int, float] = {}  # of workers that said hello
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._receive(), name="worker-channel"),
            asyncio.create_task(self._watch(), name="worker-heartbeats"),
        ]

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
        """Fail the worker's open calls; nothing more is sent to it, nothing it says is heard."""
        self._dead.add(device)
        self._silent_s.pop(device, None)
        self._hello.setdefault(device, asyncio.Event()).set()
        for owner, future in list(self._calls.values()):
            if owner == device and not future.done():
                future.set_exception(UnavailableError(f"worker {device} died"))

    async def _receive(self) -> None:
        while True:
            identity, data = await self._socket.recv_multipart()
            if not identity[1:].isdigit() or (device := int(identity[1:])) in self._dead:
                continue
            if device in self._silent_s:
                self._silent_s[device] = 0.0
            message = decode_to_engine(data)
            match message:
                case Hello():
                    self._silent_s[device] = 0.0
                    self._hello.setdefault(device, asyncio.Event()).set()
                case Beat():
                    continue
                case Reply():
                    _, future = self._calls.get(message.call_id, (0, None))
                    if future is not None and not future.done():
                        future.set_result(message)
                case _:
                    self._on_message(message)

    async def _watch(self) -> None:
        """Silence counts in ticks of this loop, so that its own stalls are held against nobody."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for device in list(self._silent_s):
                self._silent_s[device] += WATCH_INTERVAL_S
                if self._silent_s[device] >= self._config.heartbeat_timeout_s:
                    logger.error(
                        "worker %d was silent for %.1f s", device, self._silent_s.pop(device)
                    )
                    self._on_silence(device)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sockets.close()
