"""Replays a trace against an OpenAI-compatible server, at the trace's arrival times, and measures.

The client is the public `openai` package, streaming, so what is measured is what a user sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
from openai import APIError, APIStatusError, AsyncOpenAI

from engine.cluster import RequestStatus
from envs.workload import Trace

REJECTING_STATUS = frozenset({400, 413, 422, 429, 503})  # the server said no before any token


@dataclass(frozen=True, slots=True)
class ReplayRecord:
    """How one request went, seen by the client; times in seconds, arrival since the first send."""

    index: int
    status: RequestStatus
    arrival_s: float
    prompt_tokens: int
    output_tokens: int  # received, as the server counted them
    latency_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    longest_gap_s: float = 0.0  # between two messages that carried tokens
    reason: str = ""  # of a rejection or loss


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds; zero when nothing was measured."""

    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """A replay in numbers. Every request sent is finished, rejected or lost."""

    requests_sent: int
    requests_finished: int
    requests_rejected: int
    requests_lost: int  # admitted and not answered in full
    tokens: int
    duration_s: float
    ttft: Percentiles
    tpot: Percentiles
    latency_mean_s: float
    longest_gap_s: float


def percentiles(values: Sequence[float]) -> Percentiles:
    if not values:
        return Percentiles(0.0, 0.0, 0.0)
    p50, p95, p99 = (float(v) for v in np.percentile(values, (50, 95, 99)))
    return Percentiles(p50, p95, p99)


def summarise(records: Sequence[ReplayRecord], duration_s: float) -> ReplaySummary:
    done = [r for r in records if r.status is RequestStatus.FINISHED]
    rejected = sum(r.status is RequestStatus.REJECTED for r in records)
    return ReplaySummary(
        requests_sent=len(records),
        requests_finished=len(done),
        requests_rejected=rejected,
        requests_lost=len(records) - len(done) - rejected,
        tokens=sum(r.output_tokens for r in done),
        duration_s=duration_s,
        ttft=percentiles([r.ttft_s for r in done if r.ttft_s is not None]),
        tpot=percentiles([r.tpot_s for r in done if r.tpot_s is not None]),
        latency_mean_s=float(np.mean([r.latency_s for r in done])) if done else 0.0,
        longest_gap_s=max((r.longest_gap_s for r in done), default=0.0),
    )


def random_prompts(trace: Trace, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of each request's prompt, uniform over the vocabulary: same seed, same prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, int(n)).tolist() for n in trace.prompt_tokens]


@dataclass(slots=True)
class TokenClock:
    """When the tokens of one stream came: seconds since it was sent."""

    start_s: float
    first_s: float | None = None
    last_s: float = 0.0
    longest_gap_s: float = 0.0

    def mark(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
        self.last_s = now_s


@dataclass(slots=True)
class Replay:
    """One replay in progress. Read `num_sent` and `records` from outside to follow it."""

    client: AsyncOpenAI
    model: str
    trace: Trace
    prompts: list[list[int]]
    on_record: Callable[[ReplayRecord], None] | None = None
    num_sent: int = 0
    records: list[ReplayRecord] = field(default_factory=list)

    async def run(self) -> ReplaySummary:
        """Send every request at its time and wait for all of them."""
        with contextlib.suppress(APIError):
            await self.client.models.list()  # the client's own first call is slow
        start_s = time.monotonic()
        origin_s = float(self.trace.arrival_s[0]) if len(self.trace) else 0.0
        async with asyncio.TaskGroup() as group:
            for index, arrival_s in enumerate(self.trace.arrival_s):
                due_s = start_s + float(arrival_s) - origin_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                group.create_task(self._request(index, time.monotonic() - start_s))
                self.num_sent += 1
        return summarise(self.records, time.monotonic() - start_s)

    async def _request(self, index: int, arrival_s: float) -> None:
        clock = TokenClock(time.monotonic())
        status, tokens, reason = RequestStatus.FAILED, 0, ""
        try:
            tokens = await self._stream(index, clock)
            reason = self._shortfall(index, tokens)
            if not reason:
                status = RequestStatus.FINISHED
        except APIStatusError as error:
            reason = f"HTTP {error.status_code}: {error.message}"
            if error.status_code in REJECTING_STATUS:
                status = RequestStatus.REJECTED
        except (APIError, httpx.HTTPError) as error:  # the latter when a stream breaks
            reason = str(error) or type(error).__name__
        self._record(index, arrival_s, clock, status, tokens, reason)

    def _shortfall(self, index: int, tokens: int) -> str:
        """What a stream that ended without an error lacks; empty when it is whole."""
        wanted = int(self.trace.output_tokens[index])
        return "" if tokens == wanted else f"ended after {tokens} of {wanted} tokens"

    async def _stream(self, index: int, clock: TokenClock) -> int:
        """Number of tokens the server says it gave; `clock` is marked as they come."""
        tokens = 0
        stream = await self.client.completions.create(
            model=self.model,
            prompt=self.prompts[index],
            max_tokens=int(self.trace.output_tokens[index]),
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices:
                    clock.mark(time.monotonic() - clock.start_s)
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
        return tokens

    def _record(
        self,
        index: int,
        arrival_s: float,
        clock: TokenClock,
        status: RequestStatus,
        tokens: int,
        reason: str,
    ) -> None:
        tpot_s = None
        if clock.first_s is not None and tokens > 1:
            tpot_s = (clock.last_s - clock.first_s) / (tokens - 1)
        record = ReplayRecord(
            index=index,
            status=status,
            arrival_s=arrival_s,
            prompt_tokens=int(self.trace.prompt_tokens[index]),
            output_tokens=tokens,
            latency_s=time.monotonic() - clock.start_s,
            ttft_s=clock.first_s,
            tpot_s=tpot_s,
            longest_gap_s=clock.longest_gap_s,
            reason=reason,
        )
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)


def build_replay(
    base_url: str,
    model: str,
    trace: Trace,
    vocab_size: int,
    seed: int = 0,
    timeout_s: float = 120.0,
    on_record: Callable[[ReplayRecord], None] | None = None,
    api_key: str = "none",
) -> Replay:
    """A replay against `base_url` (ending in /v1). The caller closes `replay.client`."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout_s)
    return Replay(client, model, trace, random_prompts(trace, vocab_size, seed), on_record)
