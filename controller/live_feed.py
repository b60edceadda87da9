"""Server-sent events of one controller: its ticks, its state, and the engine while someone looks.

Events: `hello` (facts and history), `tick`, `state`, `engine` and `ping`. The id of an event is
this run of the controller and the tick that was seen last; a client that comes back with it gets
the ticks that it missed, and a new `hello` when the controller was started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable

from controller.history import History, Plain, engine_view
from controller.loop import ControlLoop
from controller.service import Bell
from engine.errors import OverloadedError, TidewrightError

MAX_WATCHERS = 32
PING_S = 2.0  # a client that hears nothing for some of these is not connected
LOOK_S = 1.0  # between two looks at the engine
LOOK_SWITCH_S = 0.2  # while a switch runs


def encode(event: str, data: Plain, event_id: str = "") -> bytes:
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event}\ndata: {text}\n\n".encode()


class LiveFeed:
    """Made and closed on the event loop. `state` gives the state as plain data."""

    def __init__(
        self, loop: ControlLoop, history: History, state: Callable[[], Awaitable[Plain]]
    ) -> None:
        self._loop, self._history, self._state = loop, history, state
        self._bell, self._num_watchers, self._is_closed = Bell(), 0, False
        self._engine: Plain = {}
        self._num_looks = 0
        self._looking: asyncio.Task[None] | None = None
        loop.listeners.append(self._bell.ring)

    def check_room(self) -> None:
        """Raises OverloadedError when too many watch."""
        if self._num_watchers >= MAX_WATCHERS:
            raise OverloadedError(f"{MAX_WATCHERS} pages watch already; close one of them.")

    async def events(self, last_id: str) -> AsyncGenerator[bytes, None]:
        """Endless, until closed. `last_id` is that of the last event seen, or empty."""
        self._num_watchers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="dashboard-look")
        try:
            async for event in self._events(last_id):
                yield event
        finally:
            self._num_watchers -= 1

    async def _events(self, last_id: str) -> AsyncGenerator[bytes, None]:
        yield b"retry: 1000\n\n"
        wanted, revision, looks = self._wanted(last_id), -1, 0
        if wanted is None:
            found = self._history.since(0)
            samples = found["samples"]
            wanted = samples[-1]["seq"] + 1 if samples else 1
            yield encode("hello", self._history.facts() | found, self._id(wanted))
        while not self._is_closed:
            rung = self._bell.next
            missed = self._history.since(wanted)
            if missed["samples"]:
                wanted = missed["samples"][-1]["seq"] + 1
                missed["slo"] = self._history.facts()["slo"]
                yield encode("tick", missed, self._id(wanted))
            if revision != self._loop.revision:
                revision = self._loop.revision
                yield encode("state", await self._state())
            if looks != self._num_looks:
                looks = self._num_looks
                yield encode("engine", self._engine)
            try:
                await asyncio.wait_for(rung.wait(), PING_S)
            except TimeoutError:
                yield encode("ping", {"wall_s": self._history.wall_clock()})

    def _id(self, wanted: int) -> str:
        return f"{self._history.life}:{wanted - 1}"

    def _wanted(self, last_id: str) -> int | None:
        """The tick after that id; None for a client that is new or knows another run."""
        life, _, seq = last_id.rpartition(":")
        known = life == self._history.life and seq.isdecimal() and len(seq) < 16
        return int(seq) + 1 if known else None

    # ---------------------------------------------------------------- the engine between ticks

    async def _look(self) -> None:
        """One looker for all; it ends when nobody watches."""
        while self._num_watchers and not self._is_closed:
            try:
                snapshot = await asyncio.to_thread(self._loop.cluster.snapshot)
                self._engine = engine_view(snapshot, self._history.wall_clock())
                wait_s = LOOK_SWITCH_S if snapshot.switch_in_flight else LOOK_S
            except TidewrightError as error:
                now_s = self._history.wall_clock()
                self._engine, wait_s = {"wall_s": now_s, "error": str(error)}, LOOK_S
            self._num_looks += 1
            self._bell.ring()
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Ends every stream."""
        self._is_closed = True
        self._bell.ring()
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
