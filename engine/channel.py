"""The engine process's end of the channel to its workers: calls with replies, one-way messages.

Every message is also a sign of life. A worker that gives none for `heartbeat_timeout_s` is told of
as silent; whoever started it kills it. A device has one worker at a time: each has an incarnation,
which its identity bears, so that nothing said by or meant for a predecessor reaches another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from engine.errors import StaleEpochError, UnavailableError
from engine.messages import (
    MIGRATION_CALLS,
    UNDO_CALLS,
    Beat,
    Hello,
    Reply,
    Shutdown,
    decode_to_engine,
    encode,
)
from engine.sockets import CurveKeys, Sockets

logger = logging.getLogger(__name__)
CALL_TIMEOUT_S = 60.0
WATCH_INTERVAL_S = 0.25
SERVING, MIGRATION = SOCKETS = (b"w", b"m")  # of a worker: what its identities begin with


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """`host` is the engine's own address for `tcp://`; empty for `ipc://`. `keys` are those of
    CURVE, None for a network that the operator trusts."""

    host: str = ""
    keys: CurveKeys | None = None
    heartbeat_timeout_s: float = 10.0


@dataclass(slots=True)
class _Peer:
    """The present worker of a device."""

    device: int
    incarnation: int = 0
    hellos: set[bytes] = field(default_factory=set)  # sockets that have reported
    is_dead: bool = False
    silent_s: float = 0.0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it said hello, or is dead

    @property
    def is_there(self) -> bool:
        return len(self.hellos) == len(SOCKETS) and not self.is_dead

    def identity(self, socket: bytes) -> bytes:
        return socket + f"{self.device}.{self.incarnation}".encode()


class WorkerChannel:
    """Owns the ROUTER socket. Replies resolve their call; everything else goes to `on_message`.
    `on_silence(device)` is called once for a worker that is given up, and dead by then.
    Everything sent bears `fence`, see `engine.fence`; whoever starts a switch raises it."""

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
        self.fence = 0
        self._calls: dict[int, tuple[int, asyncio.Future[Reply]]] = {}
        self._next_call_id = 0
        self._peers: dict[int, _Peer] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closing = False

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._receive(), name="worker-channel"),
            asyncio.create_task(self._watch(), name="worker-heartbeats"),
        ]

    def expect(self, device: int, incarnation: int) -> None:
        """From now on this device's worker is that one: no other is heard or sent to."""
        self._peers[device] = _Peer(device, incarnation)

    async def wait_for_hello(self, device: int, timeout_s: float) -> None:
        """Raises UnavailableError when the worker has not reported in time, or has ended."""
        peer = self._peers[device]
        try:
            await asyncio.wait_for(peer.settled.wait(), timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"worker {device} did not start within {timeout_s:.0f} s; see its log above."
            ) from None
        if peer.is_dead:
            raise UnavailableError(f"worker {device} ended while starting; see its log above.")

    def send(self, device: int, message: Any) -> None:
        """Hand over a one-way message; dropped when the worker is not there."""
        peer = self._peers[device]
        if peer.is_there:
            # a ROUTER queues without blocking below its high-water mark
            fence = str(self.fence).encode()
            socket = MIGRATION if isinstance(message, MIGRATION_CALLS) else SERVING
            self._socket.send_multipart([peer.identity(socket), fence, encode(message)])

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        """Send a call and await its reply. Raises UnavailableError on error, death or deadline,
        StaleEpochError when the worker has heard of a later switch than `fence`."""
        if not self._peers[device].is_there:
            raise UnavailableError(f"worker {device} is dead")
        call_id = self._next_call_id
        self._next_call_id += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (device, future)
        try:
            self.send(device, kind(call_id=call_id, **fields))
            reply = await asyncio.wait_for(future, CALL_TIMEOUT_S)
        except TimeoutError:
            raise self._unanswered(device, kind) from None
        finally:
            self._calls.pop(call_id, None)
        if reply.error:
            raise _error_of(reply, f"{kind.__name__} on worker {device}")
        return reply

    def _unanswered(self, device: int, kind: type[Any]) -> UnavailableError:
        """Nobody knows what a worker is doing that does not even undo: it is given up."""
        what = f"worker {device} did not answer {kind.__name__} within {CALL_TIMEOUT_S:.0f} s"
        if kind in UNDO_CALLS and self._peers[device].is_there:
            self._give_up(device, what)
        return UnavailableError(what)

    def _give_up(self, device: int, why: str) -> None:
        logger.error("%s", why)
        self.mark_dead(device)
        self._on_silence(device)

    def mark_dead(self, device: int) -> None:
        """Fail the worker's open calls; nothing more is sent to it, nothing it says is heard."""
        peer = self._peers[device]
        peer.is_dead = True
        peer.settled.set()
        for owner, future in list(self._calls.values()):
            if owner == device and not future.done():
                future.set_exception(UnavailableError(f"worker {device} died"))

    def _peer_of(self, identity: bytes) -> _Peer | None:
        """Who speaks; None for a worker that is dead or was never expected."""
        name, _, incarnation = identity[1:].partition(b".")
        if not (name.isdigit() and incarnation.isdigit()):
            return None
        peer = self._peers.get(int(name))
        if peer is None or peer.is_dead or peer.incarnation != int(incarnation):
            return None
        return peer

    async def _receive(self) -> None:
        while True:
            identity, data = await self._socket.recv_multipart()
            if (peer := self._peer_of(identity)) is None:
                continue
            peer.silent_s = 0.0
            message = decode_to_engine(data)
            match message:
                case Hello():
                    peer.hellos.add(identity[:1])
                    if peer.is_there:
                        peer.settled.set()
                    if self._is_closing:
                        self.send(peer.device, Shutdown())
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
            for peer in [p for p in self._peers.values() if p.is_there]:
                peer.silent_s += WATCH_INTERVAL_S
                if peer.silent_s >= self._config.heartbeat_timeout_s:
                    what = f"worker {peer.device} was silent for {peer.silent_s:.1f} s"
                    self._give_up(peer.device, what)

    def shut_down(self) -> None:
        """Tell every worker to end; also those that have yet to say hello."""
        self._is_closing = True
        for device in self._peers:
            self.send(device, Shutdown())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._peers.values():
            peer.is_dead = True
        self._sockets.close()


def _error_of(reply: Reply, what: str) -> Exception:
    kind = StaleEpochError if reply.is_stale else UnavailableError
    return kind(f"{what}: {reply.error}")
