"""A request while the engine has it: its state, the stream of its tokens, how it ended."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from engine.cluster import RequestOutcome, RequestStatus
from engine.messages import SequenceState, TokenUpdate
from engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of a request; `finish_reason` is set on the last: stop, length, abort, error.

    `logprobs` and `num_cached_tokens` are those of `TokenUpdate`.
    """

    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0


class RequestStream:
    """The tokens of one request, as they come. Ends after the chunk with a finish reason.

    `wake` is set whenever there is something to take; streams that are read together share one.
    """

    __slots__ = ("_end", "_ended", "_key", "_updates", "request_id", "wake")

    def __init__(
        self,
        request_id: str,
        key: str,
        end: Callable[[str, RequestStatus, str], None],
        wake: asyncio.Event,
    ) -> None:
        self.request_id, self.wake = request_id, wake
        self._key, self._end = key, end
        self._updates: deque[TokenUpdate] = deque()
        self._ended = False

    def put(self, update: TokenUpdate) -> None:
        self._updates.append(update)
        self.wake.set()

    def take(self) -> TokenChunk | None:
        """The next chunk if it is there, else None; also None after the last."""
        if not self._updates:
            return None
        update = self._updates.popleft()
        reason = update.finish_reason or None
        self._ended = reason is not None
        tokens = [] if update.index < 0 else [update.token_id]
        return TokenChunk(tokens, reason, update.logprobs, update.num_cached_tokens)

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._ended:
            raise StopAsyncIteration
        while (chunk := self.take()) is None:
            self.wake.clear()
            await self.wake.wait()
        return chunk

    def cancel(self) -> None:
        """Stop generating; a no-op once the request has ended."""
        self._end(self._key, RequestStatus.CANCELLED, "abort")

    def finish(self, reason: str = "stop") -> None:
        """What has come is the whole answer: end the request as finished."""
        self._end(self._key, RequestStatus.FINISHED, reason)


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What is told of a request when it ends, to logs, metrics and traces; never its text."""

    outcome: RequestOutcome
    finish_reason: str  # stop, length, abort, error or rejected
    params: SamplingParams
    num_cached_tokens: int = 0
    trace_headers: Mapping[str, str] = field(default_factory=dict)  # W3C trace context


@dataclass(slots=True)
class LiveRequest:
    """A live request. `state` is as submitted, under the id that leaders know it by."""

    request_id: str  # the caller's
    state: SequenceState
    request_class: str
    client_id: str
    trace_headers: Mapping[str, str]
    stream: RequestStream
    output_token_ids: list[int] = field(default_factory=list)
    replica_id: int | None = None  # None while held back
    first_token_s: float | None = None
    last_token_s: float | None = None
    longest_gap_s: float = 0.0
    num_moves: int = 0
    num_losses: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    def state_now(self) -> SequenceState:
        """As a leader needs it to go on from the tokens that have come."""
        state = self.state
        return SequenceState(
            state.request_id,
            state.prompt_token_ids,
            self.output_token_ids,
            state.params,
            state.arrival_s,
        )

    def outcome(self, status: RequestStatus, now_s: float) -> RequestOutcome:
        finished = status is RequestStatus.FINISHED
        return RequestOutcome(
            request_id=self.request_id,
            status=status,
            arrival_s=self.state.arrival_s,
            first_token_s=self.first_token_s,
            finish_s=(finished and self.last_token_s) or now_s,
            prompt_tokens=len(self.state.prompt_token_ids),
            output_tokens=len(self.output_token_ids),
            replica_id=self.replica_id,
            longest_gap_s=self.longest_gap_s,
            num_preemptions=self.num_preemptions,
            num_moves=self.num_moves,
            request_class=self.request_class,
            client_id=self.client_id,
        )
