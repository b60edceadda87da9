"""Steady load: streams that always run, and every token they get, with time and replica."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from engine.live_request import EndedRequest, RequestStream
from engine.request import SamplingParams
from engine.runtime import EngineRuntime


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """`num_streams` requests run at any time; lengths are drawn uniformly, both ends included."""

    num_streams: int = 12
    prompt_tokens: tuple[int, int] = (64, 200)
    output_tokens: tuple[int, int] = (200, 400)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """From one token of a request, made by `replica_id`, to its next, made by `next_replica_id`,
    as its client saw them."""

    request_id: str
    replica_id: int
    next_replica_id: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class Client:
    """One request as its client sees it. Times are on the engine's clock."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    sent_s: float
    stream: RequestStream
    token_s: list[float] = field(default_factory=list)
    replica_ids: list[int] = field(default_factory=list)  # that had it, per token
    finish_reason: str = ""

    def awaits_token(self, leaving: Collection[int]) -> bool:
        """Whether it runs and has no token yet but from replicas that go."""
        return not self.finish_reason and (not self.token_s or self.replica_ids[-1] in leaving)

    def first_token_s(self, since_s: float, leaving: Collection[int]) -> float | None:
        """When its first token from another replica than these came; None if none has."""
        tokens = zip(self.token_s, self.replica_ids, strict=True)
        return next((t for t, r in tokens if t > since_s and r not in leaving), None)


class Load:
    """Owns the clients of a run. `start` and `stop` are called on the engine's loop."""

    def __init__(self, runtime: EngineRuntime, spec: LoadSpec) -> None:
        self.runtime, self.spec = runtime, spec
        self.clients: list[Client] = []
        self._draw = random.Random(spec.seed)
        self._ends: Counter[str] = Counter()  # how often the engine said that a request has ended
        self._tasks: list[asyncio.Task[None]] = []
        runtime.requests.on_end.append(self._count_end)

    def _count_end(self, ended: EndedRequest) -> None:
        self._ends[ended.outcome.request_id] += 1

    # ---------------------------------------------------------------- streams

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._stream()) for _ in range(self.spec.num_streams)]

    async def stop(self) -> None:
        """Cancel what runs; those requests count neither as finished nor as lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self.running:
            client.stream.cancel()
            client.finish_reason = "stopped"

    async def _stream(self) -> None:
        while True:
            await self._serve(self._submit())

    def _submit(self) -> Client:
        draw, runtime = self._draw, self.runtime
        vocab = runtime.spec.model.vocab_size
        prompt = [draw.randrange(3, vocab) for _ in range(draw.randint(*self.spec.prompt_tokens))]
        least, most = self.spec.output_tokens
        if len(self.clients) < self.spec.num_streams:
            least = 1 + most // 20  # the first ones end at different times, as if long under way
        length = draw.randint(least, most)
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        name = f"s{len(self.clients)}"
        stream = runtime.generate(name, prompt, params)
        client = Client(name, len(prompt), length, runtime.now_s(), stream)
        self.clients.append(client)
        return client

    async def _serve(self, client: Client) -> None:
        async for chunk in client.stream:
            now_s = self.runtime.now_s()
            for _ in chunk.token_ids:
                client.token_s.append(now_s)
                client.replica_ids.append(self.replica_of(client))
            client.finish_reason = chunk.finish_reason or ""

    def replica_of(self, client: Client) -> int:
        """The replica that has a request; of one that has just ended, the last one known."""
        live = self.runtime.requests._requests.get(client.stream._key)
        if live is not None and live.replica_id is not None:
            return live.replica_id
        return client.replica_ids[-1] if client.replica_ids else -1

    # ---------------------------------------------------------------- what was seen

    @property
    def running(self) -> list[Client]:
        return [c for c in self.clients if not c.finish_reason]

    def on_replicas(self, replica_ids: Collection[int]) -> list[Client]:
        """Running requests that these replicas have."""
        return [c for c in self.running if self.replica_of(c) in replica_ids]

    def gaps(self, start_s: float, end_s: float) -> Iterator[Gap]:
        """Every gap between two tokens that overlaps [start_s, end_s]."""
        for c in self.clients:
            for i, (before_s, after_s) in enumerate(pairwise(c.token_s)):
                if before_s <= end_s and after_s >= start_s:
                    yield Gap(c.request_id, *c.replica_ids[i : i + 2], before_s, after_s)

    def num_tokens(self, start_s: float, end_s: float) -> int:
        return sum(start_s <= t < end_s for c in self.clients for t in c.token_s)

    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second up to the first token, median over the requests so far."""
        rates = sorted(
            c.prompt_tokens / (c.token_s[0] - c.sent_s) for c in self.clients if c.token_s
        )
        return rates[len(rates) // 2]

    def num_lost(self) -> int:
        """Requests that did not end exactly once, as finished, with the tokens asked for."""
        return sum(not self._is_whole(c) for c in self.clients if c.finish_reason != "stopped")

    def num_ended(self) -> int:
        return sum(c.finish_reason not in ("", "stopped") for c in self.clients)

    def _is_whole(self, client: Client) -> bool:
        return (
            client.finish_reason == "length"
            and len(client.token_s) == client.max_tokens
            and self._ends[client.request_id] == 1
        )


def percentile(values: Iterable[float], q: float) -> float:
    """Nearest rank: a value that was seen; nan for none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[max(0, math.ceil(q / 100 * len(ordered)) - 1)]
