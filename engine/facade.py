"""EngineCluster: the real engine as a synchronous `Drivable`, with workers of its own.

It runs an `EngineRuntime` on an event loop in a thread, so that environments and tests can step
the engine exactly as they step the surrogate. Time is real: `advance` waits.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from engine.cluster import (
    ClusterSnapshot,
    ClusterSpec,
    EventBatch,
    Request,
    Routing,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import InvalidRequestError, OverloadedError, UnavailableError
from engine.request import SamplingParams
from engine.runtime import EngineRuntime

T = TypeVar("T")
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 30.0


def prompt_of(request: Request, vocab_size: int) -> list[int]:
    """Token ids that stand in for a trace's unknown prompt: random, fixed by the request id."""
    draw = random.Random(request.request_id)
    return [draw.randrange(vocab_size) for _ in range(request.prompt_tokens)]


class EngineCluster:
    """Owns the runtime, its loop and its workers; `close` ends them all."""

    def __init__(self, build: Callable[[], EngineRuntime]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._pending: list[Request] = []
        try:
            self.runtime = self.run(self._start(build), START_TIMEOUT_S)
        except BaseException:
            self._stop_loop()
            raise

    async def _start(self, build: Callable[[], EngineRuntime]) -> EngineRuntime:
        runtime = build()
        try:
            await runtime.start()
        except BaseException:
            await runtime.close()
            raise
        return runtime

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Run a coroutine on the engine's loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def on_loop(self, function: Callable[[], T]) -> T:
        """Run a synchronous function on the engine's loop and return what it returns."""

        async def work() -> T:
            return function()

        return self.run(work())

    # ---------------------------------------------------------------- Cluster

    @property
    def spec(self) -> ClusterSpec:
        return self.runtime.spec

    def snapshot(self) -> ClusterSnapshot:
        return self.on_loop(self.runtime.snapshot)

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        return self.on_loop(lambda: self.runtime.apply(plan))

    def ticket(self, ticket_id: str) -> SwitchTicket:
        return self.on_loop(lambda: self.runtime.ticket(ticket_id))

    def cancel(self, ticket_id: str) -> SwitchTicket:
        return self.on_loop(lambda: self.runtime.cancel(ticket_id))

    def set_routing(self, routing: Routing) -> None:
        self.on_loop(lambda: self.runtime.set_routing(routing))

    def events(self, cursor: int) -> EventBatch:
        return self.on_loop(lambda: self.runtime.events(cursor))

    # ---------------------------------------------------------------- Drivable

    def submit(self, request: Request) -> None:
        """Queue a request for its arrival time; `advance` hands it to the engine then."""
        self._pending.append(request)
        self._pending.sort(key=lambda r: r.arrival_s)

    def advance(self, until_s: float) -> None:
        """Let real time pass up to `until_s`, submitting what arrives meanwhile."""
        while self._pending and self._pending[0].arrival_s <= until_s:
            request = self._pending.pop(0)
            self._sleep_until(request.arrival_s)
            self.on_loop(lambda request=request: self._generate(request))  # type: ignore[misc]
        self._sleep_until(until_s)

    def _sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - self.runtime.now_s()))

    def _generate(self, request: Request) -> None:
        params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        prompt = prompt_of(request, self.spec.model.vocab_size)
        try:
            self.runtime.generate(
                request.request_id,
                prompt,
                params,
                request.request_class,
                request.client_id,
                arrival_s=request.arrival_s,
            )
        except (InvalidRequestError, OverloadedError, UnavailableError):
            return  # counted and logged as rejected by the engine

    def close(self) -> None:
        try:
            self.run(self.runtime.close(), CALL_TIMEOUT_S)
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def __enter__(self) -> EngineCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
