"""The request table: which requests exist, which replica has each, and what became of it.

Each request ends here, exactly once. It lives on the engine's event loop and knows nothing of
processes or switches; the runtime tells it which replicas may take requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from engine.cluster import (
    LABEL_CHARS,
    Arrival,
    ClusterSpec,
    Deployment,
    EventKind,
    RequestOutcome,
    RequestStatus,
    Routing,
)
from engine.counters import EngineCounters
from engine.errors import (
    InvalidRequestError,
    OverloadedError,
    TidewrightError,
    UnavailableError,
)
from engine.events import EventLog
from engine.live_request import EndedRequest, LiveRequest, RequestStream
from engine.messages import Abort, SequenceState, Submit, Tokens, TokenUpdate
from engine.request import SamplingParams, check_sampling
from engine.router import load_of, pick

MAX_LOSSES = 5  # replicas that broke under one request


class RequestHost(Protocol):
    """What the table needs of the engine."""

    @property
    def spec(self) -> ClusterSpec: ...
    @property
    def deployment(self) -> Deployment: ...
    @property
    def routing(self) -> Routing: ...
    @property
    def on_hold(self) -> set[int]:
        """Replicas that get no new request."""
        ...

    @property
    def not_ready(self) -> str:
        """Why no request can be taken; empty when one can."""
        ...

    def now_s(self) -> float: ...
    def send(self, replica_id: int, message: Any) -> None:
        """To that replica's leader."""
        ...


class RequestTable:
    """See the module. `key` is the id a request has with leaders: unlike the caller's, it is never
    used twice, so that nothing said of an ended request can be taken for another."""

    def __init__(self, host: RequestHost, max_queue: int, log: EventLog) -> None:
        self._host, self._max_queue, self._log = host, max_queue, log
        self._requests: dict[str, LiveRequest] = {}
        self._in_use: set[str] = set()  # callers' ids
        self._held: list[str] = []  # wait for a replica, in arrival order
        self._outstanding: Counter[int] = Counter()  # by replica
        self._generated: Counter[int] = Counter()
        self._num_keys = 0
        self.counters = EngineCounters()
        self.counts = dict.fromkeys(("arrived", "finished", "rejected"), 0)
        self.on_end: list[Callable[[EndedRequest], None]] = []

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def num_outstanding(self, replica_id: int) -> int:
        return self._outstanding[replica_id]

    def generated_tokens(self, replica_id: int) -> int:
        return self._generated[replica_id]

    @staticmethod
    def request_id_of(key: str) -> str:
        """The caller's id, also of a request that has ended."""
        return key.rpartition(".")[0]

    def is_live(self, key: str) -> bool:
        return key in self._requests

    def is_in_use(self, request_id: str) -> bool:
        return request_id in self._in_use

    # ---------------------------------------------------------------- coming

    def add(
        self,
        arrival: Arrival,
        prompt_token_ids: list[int],
        params: SamplingParams,
        trace_headers: Mapping[str, str],
        wake: asyncio.Event | None,
    ) -> RequestStream:
        """See `EngineRuntime.generate`."""
        if arrival.request_id in self._in_use:
            raise InvalidRequestError(
                f"request id {arrival.request_id!r} is in use; choose another or leave it out."
            )
        if max(len(arrival.request_class), len(arrival.client_id)) > LABEL_CHARS:
            raise InvalidRequestError(
                f"request class and client id have at most {LABEL_CHARS} characters, got "
                f"{len(arrival.request_class)} and {len(arrival.client_id)}; shorten them."
            )
        self.counts["arrived"] += 1
        self._log.append(self._host.now_s(), EventKind.ARRIVED, arrival=arrival)
        try:
            self._check(prompt_token_ids, params)
        except TidewrightError:
            self._reject(arrival, params, trace_headers)
            raise
        key = f"{arrival.request_id}.{self._num_keys:x}"  # see `request_id_of`
        self._num_keys += 1
        state = SequenceState(key, list(prompt_token_ids), [], params, arrival.arrival_s)
        stream = RequestStream(arrival.request_id, key, self.end, wake or asyncio.Event())
        request = LiveRequest(
            arrival.request_id,
            state,
            arrival.request_class,
            arrival.client_id,
            trace_headers,
            stream,
        )
        self._requests[key] = request
        self._in_use.add(arrival.request_id)
        self._dispatch(request)
        return stream

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        model = self._host.spec.model
        if len(prompt_token_ids) >= model.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; it must leave room for one more "
                f"in the context of {model.max_model_len}. Shorten it.",
                param="prompt",
                code="context_length_exceeded",
            )
        if not prompt_token_ids:
            raise InvalidRequestError(
                "the prompt has 0 tokens; it must have at least 1.", param="prompt"
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= model.vocab_size:
            raise InvalidRequestError(
                f"a prompt token is outside the vocabulary [0, {model.vocab_size}).",
                param="prompt",
            )
        check_sampling(params)
        self.check_ready()
        if len(self._requests) >= self._max_queue:
            raise OverloadedError(
                f"{len(self._requests)} requests are in the engine, max_queue is "
                f"{self._max_queue}; retry later."
            )

    def check_ready(self) -> None:
        """Raise UnavailableError, with the reason, while no request can be taken."""
        if self._host.not_ready:
            raise UnavailableError(f"{self._host.not_ready}; retry later or elsewhere.")

    def _reject(
        self, arrival: Arrival, params: SamplingParams, trace_headers: Mapping[str, str]
    ) -> None:
        self.counts["rejected"] += 1
        outcome = RequestOutcome(
            request_id=arrival.request_id,
            status=RequestStatus.REJECTED,
            arrival_s=arrival.arrival_s,
            first_token_s=None,
            finish_s=self._host.now_s(),
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=0,
            request_class=arrival.request_class,
            client_id=arrival.client_id,
        )
        self._tell(EndedRequest(outcome, "rejected", params, 0, trace_headers))

    def _dispatch(self, request: LiveRequest) -> None:
        """Send a request to the replica the router picks, or hold it while none may take it."""
        host = self._host
        loads = [
            load_of(host.spec, r, self._outstanding[r.replica_id])
            for r in host.deployment.replicas
            if r.replica_id not in host.on_hold
        ]
        prompt = len(request.state.prompt_token_ids)
        replica_id = pick(host.routing, loads, prompt, prompt + len(request.output_token_ids))
        self._assign(request, replica_id)
        if replica_id is None:
            self._held.append(request.state.request_id)
        else:
            host.send(replica_id, Submit(replica_id, request.state_now()))

    def _assign(self, request: LiveRequest, replica_id: int | None) -> None:
        """The one place that changes which replica has a request."""
        if request.replica_id is not None:
            self._outstanding[request.replica_id] -= 1
        if replica_id is not None:
            self._outstanding[replica_id] += 1
        request.replica_id = replica_id

    # ---------------------------------------------------------------- moving

    def dispatch_held(self) -> None:
        held, self._held = self._held, []
        for key in held:
            if key in self._requests:
                self._dispatch(self._requests[key])

    def move(self, owner: Mapping[str, int]) -> None:
        """A switch has taken these requests (by key) to these replicas."""
        for key, replica_id in owner.items():
            if (request := self._requests.get(key)) is not None:
                self._assign(request, replica_id)
                request.num_moves += 1

    def abort_ended(self, owner: Mapping[str, int]) -> None:
        """Tell the new replicas of requests that ended while they moved."""
        for key, replica_id in owner.items():
            if key not in self._requests:
                self._host.send(replica_id, Abort(replica_id, key))

    def requeue(self, replica_id: int) -> None:
        """That replica is gone: its requests start over elsewhere, or wait while none is left. One
        that has lost many may be what breaks them, and fails."""
        for request in [r for r in self._requests.values() if r.replica_id == replica_id]:
            request.num_moves += 1
            request.num_losses += 1
            if request.num_losses > MAX_LOSSES:
                self.end(request.state.request_id, RequestStatus.FAILED, "error")
            else:
                self._dispatch(request)

    def fail_held(self) -> None:
        """No replica will take them."""
        for key in list(self._held):
            self.end(key, RequestStatus.FAILED, "error")

    def keep_only(self, replica_ids: tuple[int, ...]) -> None:
        """Forget what was counted for replicas that are gone."""
        self.counters.keep_only(replica_ids)
        self._outstanding += Counter()  # drops zeros
        for gone in set(self._generated) - set(replica_ids):
            del self._generated[gone]

    # ---------------------------------------------------------------- tokens and ends

    def take_tokens(self, message: Tokens, now_s: float) -> None:
        """Pass new tokens on. What comes from a replica that has lost the request is dropped."""
        replica_id, taken, requests = message.replica_id, 0, self._requests
        for update in message.updates:
            request = requests.get(update.request_id)
            if (
                request is None
                or request.replica_id != replica_id
                or update.index != len(request.output_token_ids)
            ):
                continue
            taken += 1
            self._take_token(request, update, now_s)
        self._generated[replica_id] += taken
        self.counters.generation_tokens += taken

    def _take_token(self, request: LiveRequest, update: TokenUpdate, now_s: float) -> None:
        request.output_token_ids.append(update.token_id)
        if request.last_token_s is None:
            self._take_first(request, update, now_s)
        else:
            gap_s = now_s - request.last_token_s
            self.counters.inter_token_s.observe(gap_s)
            if gap_s > request.longest_gap_s:
                request.longest_gap_s = gap_s
        request.last_token_s = now_s
        request.stream.put(update)
        if update.finish_reason:
            request.num_preemptions = update.num_preemptions
            request.num_cached_tokens = update.num_cached_tokens or request.num_cached_tokens
            self._close(request, RequestStatus.FINISHED, update.finish_reason)

    def _take_first(self, request: LiveRequest, update: TokenUpdate, now_s: float) -> None:
        request.first_token_s = now_s
        request.num_cached_tokens = update.num_cached_tokens
        self.counters.prompt_tokens += len(request.state.prompt_token_ids)
        if update.queue_s is not None:
            self.counters.queue_s.observe(update.queue_s)
            self.counters.prefill_s.observe(
                max(0.0, now_s - request.state.arrival_s - update.queue_s)
            )

    def end(self, key: str, status: RequestStatus, reason: str) -> None:
        """End a request from this side: tell its leader and its stream. A no-op when it is over."""
        request = self._requests.get(key)
        if request is None:
            return
        if request.replica_id is not None and status is not RequestStatus.FAILED:
            self._host.send(request.replica_id, Abort(request.replica_id, key))
        self._close(request, status, reason)
        request.stream.put(TokenUpdate(key, -1, 0, reason))

    def end_all(self, status: RequestStatus, reason: str) -> None:
        for key in list(self._requests):
            self.end(key, status, reason)

    def cancel(self, request_id: str) -> None:
        """Cancel by the caller's id; a no-op when it is over."""
        for key, request in list(self._requests.items()):
            if request.request_id == request_id:
                self.end(key, RequestStatus.CANCELLED, "abort")

    def _close(self, request: LiveRequest, status: RequestStatus, reason: str) -> None:
        del self._requests[request.state.request_id]
        self._in_use.remove(request.request_id)
        replica_id = request.replica_id
        outcome = request.outcome(status, self._host.now_s())
        self._assign(request, None)
        self.counts["finished"] += status is RequestStatus.FINISHED
        if replica_id is None and request.state.request_id in self._held:
            self._held.remove(request.state.request_id)
        self._tell(
            EndedRequest(
                outcome,
                reason,
                request.state.params,
                request.num_cached_tokens,
                request.trace_headers,
            )
        )

    def _tell(self, ended: EndedRequest) -> None:
        self._log.append(self._host.now_s(), EventKind.ENDED, outcome=ended.outcome)
        for listener in self.on_end:
            listener(ended)
