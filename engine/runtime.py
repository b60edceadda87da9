"""EngineRuntime: the engine process's core. Request table, router, current deployment, switches.

It lives on one asyncio loop and never imports torch. It owns which requests exist: each ends here,
exactly once. Leaders own batches, blocks and token order while a request is with them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.channel import ChannelConfig, WorkerChannel
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    ClusterSpec,
    Deployment,
    EventBatch,
    EventKind,
    Replica,
    ReplicaStats,
    RequestOutcome,
    RequestStatus,
    Routing,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    StaleEpochError,
    SwitchInProgressError,
)
from engine.events import EventLog
from engine.executor import Executor, WorkerConfig
from engine.messages import (
    Abort,
    LeaderStats,
    RankFailed,
    ReleaseRank,
    Reply,
    SequenceState,
    Shutdown,
    Submit,
    Tokens,
    TokenUpdate,
)
from engine.migration.check import check_plan
from engine.migration.switch import Switch
from engine.rank_calls import activate_ranks, bind_ranks, build_ranks
from engine.request import SamplingParams, check_sampling
from engine.router import check_routing, load_of, pick
from engine.shards import num_kv_blocks

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
NUM_TICKETS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of a request; `finish_reason` is set on the last: stop, length, abort, error."""

    token_ids: list[int]
    finish_reason: str | None = None


@dataclass(slots=True)
class _Request:
    """A live request in the engine's table."""

    state: SequenceState  # as submitted; output tokens are below
    request_class: str
    client_id: str
    chunks: asyncio.Queue[TokenChunk]
    output_token_ids: list[int] = field(default_factory=list)
    replica_id: int | None = None  # None while held back
    first_token_s: float | None = None
    last_token_s: float | None = None
    longest_gap_s: float = 0.0
    num_moves: int = 0


class RequestStream:
    """The tokens of one request, as they come. Ends after the chunk with a finish reason."""

    def __init__(self, request_id: str, chunks: asyncio.Queue[TokenChunk], cancel: Any) -> None:
        self.request_id = request_id
        self._chunks, self._cancel = chunks, cancel
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._ended:
            raise StopAsyncIteration
        chunk = await self._chunks.get()
        self._ended = chunk.finish_reason is not None
        return chunk

    def cancel(self) -> None:
        """Stop generating; a no-op once the request has ended."""
        self._cancel(self.request_id)


class EngineRuntime:
    """See the module. All methods but start, close and the waits are synchronous, on the loop."""

    def __init__(
        self,
        spec: ClusterSpec,
        initial: Deployment,
        executor: Executor,
        worker_configs: list[WorkerConfig],
        run_dir: Path,
        max_queue: int,
        profile_json: dict[str, Any] | None = None,
        channel_config: ChannelConfig | None = None,
    ) -> None:
        self.spec, self.profile_json = spec, profile_json
        self.deployment, self.epoch = initial, 0
        self.routing = Routing(tuple(r.replica_id for r in initial.replicas))
        self.failpoint: Callable[[str], None] = lambda name: None
        self._executor, self._worker_configs, self._run_dir = executor, worker_configs, run_dir
        self._max_queue = max_queue
        self._channel_config = channel_config or ChannelConfig()
        self._requests: dict[str, _Request] = {}
        self._held: list[str] = []  # wait for a replica, in arrival order
        self._on_hold: set[int] = set()  # replicas that get no new request
        self._dead_devices: set[int] = set()
        self._stats: dict[int, ReplicaStats] = {}
        self._generated: dict[int, int] = {}
        self._tickets: dict[str, SwitchTicket] = {}
        self._switch: Switch | None = None
        self._switch_task: asyncio.Task[None] | None = None
        self._lost: list[tuple[int, str]] = []  # replicas to recover once no switch runs
        self._changed = asyncio.Event()
        self.listeners: list[Callable[[ClusterEvent], None]] = []
        self._log = EventLog(on_append=self._notify)
        self._counts = dict.fromkeys(("arrived", "finished", "rejected"), 0)
        self._started_at = time.monotonic()

    # ---------------------------------------------------------------- life

    def now_s(self) -> float:
        """Seconds since the runtime was made: the cluster's clock."""
        return time.monotonic() - self._started_at

    async def start(self) -> None:
        """Start the workers and load the initial deployment from disk. Raises UnavailableError."""
        self._channel = WorkerChannel(
            self._run_dir, self._channel_config, self._on_message, self._on_silence
        )
        self._channel.start()
        loop, endpoint = asyncio.get_running_loop(), self._channel.endpoint
        configs = [replace(c, engine_endpoint=endpoint) for c in self._worker_configs]

        def on_death(device: int) -> None:
            loop.call_soon_threadsafe(self._on_worker_death, device)

        await asyncio.to_thread(self._executor.start, configs, on_death)
        for config in self._worker_configs:
            await self._channel.wait_for_hello(config.device, START_TIMEOUT_S)
        await self._load(self.deployment.replicas)

    async def _load(self, replicas: Sequence[Replica]) -> None:
        endpoints = await build_ranks(self.call, self.spec, replicas, "start", from_disk=True)
        await bind_ranks(self.call, replicas)
        await activate_ranks(self.call, replicas, endpoints)

    async def close(self) -> None:
        """End every request and every worker. Safe to call twice."""
        if self._switch_task is not None and not self._switch_task.done():
            self._switch_task.cancel()
            await asyncio.gather(self._switch_task, return_exceptions=True)
        for request_id in list(self._requests):
            self._end(request_id, RequestStatus.CANCELLED, "abort")
        if not hasattr(self, "_channel"):
            return
        configs, self._worker_configs = self._worker_configs, []
        for config in configs:
            self._channel.send(config.device, Shutdown())
        await asyncio.to_thread(self._executor.close)
        await self._channel.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no request is left; False when some still are after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._requests and time.monotonic() < deadline:
            await self.wait_for_change(min(0.5, deadline - time.monotonic()))
        return not self._requests

    # ---------------------------------------------------------------- requests

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_class: str = "",
        client_id: str = "",
        arrival_s: float | None = None,
    ) -> RequestStream:
        """Accept a request and start it.

        Raises InvalidRequestError (prompt empty or too long, id in use) and OverloadedError; a
        request refused like that is counted as rejected.
        """
        arrived_s = self.now_s() if arrival_s is None else arrival_s
        if request_id in self._requests:
            raise InvalidRequestError(
                f"request id {request_id!r} is in use; choose another or leave it out."
            )
        self._counts["arrived"] += 1
        arrival = Arrival(request_id, arrived_s, len(prompt_token_ids), request_class, client_id)
        self._log.append(self.now_s(), EventKind.ARRIVED, arrival=arrival)
        try:
            self._check_request(request_id, prompt_token_ids, params)
        except (InvalidRequestError, OverloadedError):
            self._reject(arrival)
            raise
        state = SequenceState(request_id, list(prompt_token_ids), [], params, arrived_s)
        request = _Request(state, request_class, client_id, asyncio.Queue())
        self._requests[request_id] = request
        self._dispatch(request)
        return RequestStream(request_id, request.chunks, self.cancel_request)

    def _check_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        model = self.spec.model
        if not 0 < len(prompt_token_ids) < model.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; it must have at least 1 and leave "
                f"room for one more in the context of {model.max_model_len}. Shorten it."
            )
        if not all(0 <= t < model.vocab_size for t in prompt_token_ids):
            raise InvalidRequestError(
                f"a prompt token is outside the vocabulary [0, {model.vocab_size})."
            )
        check_sampling(params)
        if len(self._requests) >= self._max_queue:
            raise OverloadedError(
                f"{len(self._requests)} requests are in the engine, max_queue is "
                f"{self._max_queue}; retry later."
            )

    def _reject(self, arrival: Arrival) -> None:
        self._counts["rejected"] += 1
        outcome = RequestOutcome(
            request_id=arrival.request_id,
            status=RequestStatus.REJECTED,
            arrival_s=arrival.arrival_s,
            first_token_s=None,
            finish_s=self.now_s(),
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=0,
            request_class=arrival.request_class,
            client_id=arrival.client_id,
        )
        self._log.append(self.now_s(), EventKind.ENDED, outcome=outcome)

    def _dispatch(self, request: _Request) -> None:
        """Send a request to the replica the router picks, or hold it while none may take it."""
        loads = [
            load_of(self.spec, r, self.num_outstanding(r.replica_id))
            for r in self.deployment.replicas
            if r.replica_id not in self._on_hold
        ]
        prompt = len(request.state.prompt_token_ids)
        replica_id = pick(self.routing, loads, prompt, prompt + len(request.output_token_ids))
        request.replica_id = replica_id
        if replica_id is None:
            self._held.append(request.state.request_id)
            return
        leader = self.deployment.replica(replica_id).placement.devices[0]
        self._channel.send(leader, Submit(replica_id, self._state_now(request)))

    def _state_now(self, request: _Request) -> SequenceState:
        state = request.state
        return SequenceState(
            state.request_id,
            state.prompt_token_ids,
            request.output_token_ids,
            state.params,
            state.arrival_s,
        )

    def _dispatch_held(self) -> None:
        held, self._held = self._held, []
        for request_id in held:
            if request_id in self._requests:
                self._dispatch(self._requests[request_id])

    def num_outstanding(self, replica_id: int) -> int:
        return sum(r.replica_id == replica_id for r in self._requests.values())

    def cancel_request(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.replica_id is not None:
            self._abort(request_id, request.replica_id)
        self._end(request_id, RequestStatus.CANCELLED, "abort")

    def _abort(self, request_id: str, replica_id: int) -> None:
        leader = self.deployment.replica(replica_id).placement.devices[0]
        self._channel.send(leader, Abort(replica_id, request_id))

    def _end(self, request_id: str, status: RequestStatus, finish_reason: str) -> None:
        request = self._requests.pop(request_id)
        now_s, finished = self.now_s(), status is RequestStatus.FINISHED
        outcome = RequestOutcome(
            request_id=request_id,
            status=status,
            arrival_s=request.state.arrival_s,
            first_token_s=request.first_token_s,
            finish_s=(finished and request.last_token_s) or now_s,
            prompt_tokens=len(request.state.prompt_token_ids),
            output_tokens=len(request.output_token_ids),
            replica_id=request.replica_id,
            longest_gap_s=request.longest_gap_s,
            num_moves=request.num_moves,
            request_class=request.request_class,
            client_id=request.client_id,
        )
        self._counts["finished"] += finished
        if not finished:
            request.chunks.put_nowait(TokenChunk([], finish_reason))
        self._log.append(now_s, EventKind.ENDED, outcome=outcome)

    # ---------------------------------------------------------------- what workers say

    def _on_message(self, message: Any) -> None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case RankFailed():
                self._lose_replica(message.replica_id, message.error)

    def _on_tokens(self, message: Tokens) -> None:
        now_s = self.now_s()
        for update in message.updates:
            request = self._requests.get(update.request_id)
            stale = request is None or update.index != len(request.output_token_ids)
            if request is None or stale or request.replica_id != message.replica_id:
                continue  # cancelled, or from a replica that has lost the request
            self._take_token(request, update, now_s)
            count = self._generated.get(message.replica_id, 0)
            self._generated[message.replica_id] = count + 1
        self._take_stats(message.replica_id, message.stats, now_s)

    def _take_token(self, request: _Request, update: TokenUpdate, now_s: float) -> None:
        request.output_token_ids.append(update.token_id)
        if request.last_token_s is None:
            request.first_token_s = now_s
        else:
            request.longest_gap_s = max(request.longest_gap_s, now_s - request.last_token_s)
        request.last_token_s = now_s
        reason = update.finish_reason or None
        request.chunks.put_nowait(TokenChunk([update.token_id], reason))
        if reason is not None:
            self._end(update.request_id, RequestStatus.FINISHED, reason)

    def _take_stats(self, replica_id: int, stats: LeaderStats, now_s: float) -> None:
        try:
            replica = self.deployment.replica(replica_id)
        except KeyError:
            return
        self._stats[replica_id] = ReplicaStats(
            replica_id=replica_id,
            measured_at_s=now_s,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            waiting_prompt_tokens=stats.waiting_prompt_tokens,
            running_context_tokens=stats.running_context_tokens,
            kv_blocks_total=num_kv_blocks(self.spec, replica.parallel),
            kv_blocks_used=stats.kv_blocks_used,
            generated_tokens_total=self._generated.get(replica_id, 0),
            num_preemptions_total=stats.num_preemptions_total,
        )

    def _on_silence(self, device: int) -> None:
        """A rank that gives no sign of life is killed, not waited for."""
        self._executor.kill(device)
        self._on_worker_death(device)

    def _on_worker_death(self, device: int) -> None:
        if device in self._dead_devices or not self._worker_configs:
            return  # known, or ended by `close`
        logger.error("worker %d died", device)
        self._dead_devices.add(device)
        self._channel.mark_dead(device)
        self._log.append(self.now_s(), EventKind.DEVICE_LOST, device=device)
        for replica in self.deployment.replicas:
            if device in replica.placement.devices:
                self._lose_replica(replica.replica_id, f"worker {device} died")

    def _lose_replica(self, replica_id: int, reason: str) -> None:
        """Take a broken replica out and recompute its requests elsewhere; after a running switch,
        which fails on its own and must not see the deployment change under it."""
        if self._switch is not None:
            self._lost.append((replica_id, reason))
            self._on_hold.add(replica_id)
            self._switch.cancel()
            return
        broken = [r for r in self.deployment.replicas if r.replica_id == replica_id]
        if not broken:
            return
        logger.error("replica %d is lost (%s); its requests start over", replica_id, reason)
        left = tuple(r for r in self.deployment.replicas if r.replica_id != replica_id)
        orphans = [r for r in self._requests.values() if r.replica_id == replica_id]
        self._set_deployment(Deployment(left))
        for device in broken[0].placement.devices:
            if device not in self._dead_devices:
                task = asyncio.ensure_future(self.call(device, ReleaseRank, replica_id=replica_id))
                task.add_done_callback(lambda t: t.exception())
        for request in orphans:
            request.num_moves += 1
            if left:
                self._dispatch(request)
            else:
                self._end(request.state.request_id, RequestStatus.FAILED, "error")

    # ---------------------------------------------------------------- switching

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        return await self._channel.call(device, kind, **fields)

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        """Start a switch. See `engine.cluster.Cluster.apply` for what it raises."""
        if self._switch is not None:
            raise SwitchInProgressError(
                f"switch {self._switch.ticket.ticket_id} is in phase "
                f"{self._switch.ticket.phase}; wait for it or cancel it."
            )
        if plan.expected_epoch != self.epoch:
            raise StaleEpochError(
                f"the plan was made for epoch {plan.expected_epoch}, the current one is "
                f"{self.epoch}; plan again from a new snapshot."
            )
        check_plan(self.spec, self.deployment, plan)
        now_s = self.now_s()
        ticket = SwitchTicket(
            ticket_id=f"switch-{len(self._tickets):04d}",
            phase=SwitchPhase.PREPARE,
            from_key=self.deployment.key,
            to_key=plan.target.key,
            from_epoch=self.epoch,
            started_s=now_s,
            updated_s=now_s,
            decision_id=plan.decision_id,
        )
        self._tickets[ticket.ticket_id] = ticket
        self._switch = Switch(self, plan, ticket)
        self._switch_task = asyncio.create_task(self._run_switch(), name=ticket.ticket_id)
        return ticket

    async def _run_switch(self) -> None:
        assert self._switch is not None
        try:
            await self._switch.run()
        finally:
            self._switch = None
            lost, self._lost = self._lost, []
            for replica_id, reason in lost:
                self._on_hold.discard(replica_id)
                self._lose_replica(replica_id, reason)

    def ticket(self, ticket_id: str) -> SwitchTicket:
        if ticket_id not in self._tickets:
            raise NotFoundError(f"there is no switch {ticket_id!r}.")
        return self._tickets[ticket_id]

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """Ask for a rollback before commit."""
        ticket = self.ticket(ticket_id)
        if self._switch is not None and self._switch.ticket.ticket_id == ticket_id:
            self._switch.cancel()
        return ticket

    def hold(self, replica_ids: Iterable[int]) -> None:
        self._on_hold |= set(replica_ids)

    def unhold(self) -> None:
        self._on_hold = set()
        self._dispatch_held()

    def commit(self, target: Deployment, owner: dict[str, int]) -> None:
        for request_id, replica_id in owner.items():
            request = self._requests.get(request_id)
            if request is not None:
                request.replica_id = replica_id
                request.num_moves += 1
        self._set_deployment(target)
        self._on_hold = set()
        self._dispatch_held()

    def abort_ended(self, owner: dict[str, int]) -> None:
        for request_id, replica_id in owner.items():
            if request_id not in self._requests:
                self._abort(request_id, replica_id)

    def _set_deployment(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.epoch += 1
        ids = tuple(r.replica_id for r in deployment.replicas)
        self.routing = Routing(ids)
        self._stats = {k: v for k, v in self._stats.items() if k in ids}

    def publish(self, ticket: SwitchTicket) -> None:
        self._tickets[ticket.ticket_id] = ticket
        self._log.append(self.now_s(), EventKind.SWITCH, ticket=ticket)

    # ---------------------------------------------------------------- what controllers see

    def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(
            now_s=self.now_s(),
            epoch=self.epoch,
            deployment=self.deployment,
            routing=self.routing,
            replicas=tuple(
                self._stats[r.replica_id]
                for r in self.deployment.replicas
                if r.replica_id in self._stats
            ),
            switch=next(reversed(self._tickets.values()), None),
            dead_devices=tuple(sorted(self._dead_devices)),
            num_arrived=self._counts["arrived"],
            num_finished=self._counts["finished"],
            num_rejected=self._counts["rejected"],
            num_queued_unrouted=len(self._held),
        )

    def set_routing(self, routing: Routing) -> None:
        check_routing(routing)
        current = {r.replica_id for r in self.deployment.replicas}
        if set(routing.replica_ids) != current:
            raise StaleEpochError(
                f"routing names replicas {sorted(routing.replica_ids)}, the deployment has "
                f"{sorted(current)}; take a new snapshot."
            )
        self.routing = routing

    def events(self, cursor: int) -> EventBatch:
        return self._log.since(cursor)

    def _notify(self, event: ClusterEvent) -> None:
        for listener in self.listeners:
            listener(event)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next event, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def wait_for_events(self, cursor: int, timeout_s: float) -> EventBatch:
        """Events since `cursor`; waits up to `timeout_s` while there are none."""
        batch = self.events(cursor)
        if not batch.events and not batch.num_lost:
            await self.wait_for_change(timeout_s)
            batch = self.events(cursor)
        return batch

    async def watch_ticket(self, ticket_id: str) -> AsyncIterator[SwitchTicket]:
        """Every state of a ticket that can be seen, up to the terminal one."""
        seen: SwitchTicket | None = None
        while True:
            ticket = self.ticket(ticket_id)
            if ticket != seen:
                yield (seen := replace(ticket))
            if ticket.phase.is_terminal:
                return
            await self.wait_for_change(1.0)

    async def ended(self, ticket_id: str) -> SwitchTicket:
        """The terminal state of a ticket, once it is there."""
        async for _ in self.watch_ticket(ticket_id):
            continue
        return self.ticket(ticket_id)


def make_run_dir() -> Path:
    """A private folder for sockets and rendezvous files; short, since ipc paths are limited."""
    return Path(tempfile.mkdtemp(prefix="tw-"))
