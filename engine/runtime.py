"""EngineRuntime: the engine process's core. Workers, current deployment, routing, switches.

It lives on one asyncio loop and never imports torch. Its request table owns which requests exist;
leaders own batches, blocks and token order while a request is with them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.channel import ChannelConfig
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    ClusterSpec,
    Deployment,
    EventBatch,
    EventKind,
    KvCostParams,
    ParallelConfig,
    Replica,
    ReplicaStats,
    RequestStatus,
    Routing,
    SwitchPlan,
    SwitchTicket,
)
from engine.counters import SwitchCounters
from engine.errors import StaleEpochError, SwitchInProgressError, UnavailableError
from engine.events import EventLog
from engine.executor import Executor, WorkerConfig
from engine.healing import Healing
from engine.live_request import RequestStream
from engine.messages import (
    LeaderStats,
    RankFailed,
    ReleaseRank,
    Reply,
    StepReport,
    Tokens,
)
from engine.migration.plan import plan_switch
from engine.rank_calls import activate_ranks, bind_ranks, build_ranks
from engine.request import SamplingParams
from engine.request_table import RequestTable
from engine.router import check_routing
from engine.shards import num_kv_blocks
from engine.switchboard import Switchboard
from engine.worker_pool import RecoveryConfig, WorkerPool

logger = logging.getLogger(__name__)
RECOMPUTE_NEVER, DRAIN_NEVER_S = 1e-3, 1e6  # tokens per second, seconds per step


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
        recovery: RecoveryConfig | None = None,
    ) -> None:
        self.spec, self.profile_json = spec, profile_json
        self.deployment, self.epoch = initial, 0
        self.routing = Routing(tuple(r.replica_id for r in initial.replicas))
        self.failpoint: Callable[[str], None] = lambda name: None
        self.on_step: Callable[[int, StepReport], None] = lambda replica_id, step: None
        self._executor, self._run_dir = executor, run_dir
        recovery = recovery or RecoveryConfig()
        self.workers = WorkerPool(
            self, executor, worker_configs, channel_config or ChannelConfig(), recovery
        )
        self._healing = Healing(self, recovery, initial)
        self.on_hold: set[int] = set()  # replicas that get no new request
        self._stats: dict[int, ReplicaStats] = {}
        self._broken: dict[Replica, str] = {}  # to recover once no switch runs, and why
        self._state = "starting"
        self._changed, self._measured = asyncio.Event(), asyncio.Event()
        self._log = EventLog(on_append=self._notify)
        self.requests = RequestTable(self, max_queue, self._log)
        self._switches = Switchboard(self, self._log, self._recover_lost)
        self._started_at = time.monotonic()

    # ---------------------------------------------------------------- life

    def now_s(self) -> float:
        """Seconds since the runtime was made: the cluster's clock."""
        return time.monotonic() - self._started_at

    async def start(self) -> None:
        """Start the workers and load the initial deployment from disk. Raises UnavailableError."""
        await self.workers.start(self._run_dir)
        await self._load(self.deployment.replicas, "start")
        if self._state == "starting":
            self._state = "serving"
            self.workers.open()
            if not self.deployment.replicas:  # lost when they had just been loaded
                self._healing.start()

    async def _load(self, replicas: Sequence[Replica], nonce: str) -> None:
        endpoints = await build_ranks(self.call, self.spec, replicas, nonce, from_disk=True)
        await bind_ranks(self.call, replicas)
        await activate_ranks(self.call, replicas, endpoints)

    async def close(self) -> None:
        """End every request and every worker. Safe to call twice."""
        await self._switches.close()
        await self._healing.close()
        self._state = "closed"
        self.requests.end_all(RequestStatus.CANCELLED, "abort")
        await self.workers.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until none is left; False when some still are after
        `timeout_s`."""
        self._state = "draining"
        deadline = time.monotonic() + timeout_s
        while len(self.requests) and time.monotonic() < deadline:
            await self.wait_for_change(min(0.5, deadline - time.monotonic()))
        return not len(self.requests)

    @property
    def not_ready(self) -> str:
        """Why no request can be taken at present; empty when one can."""
        if self._state != "serving":
            return f"the engine is {self._state}"
        if self.deployment.replicas:
            return ""
        return f"no replica is left to serve; {self._healing.status}"

    # ---------------------------------------------------------------- requests

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_class: str = "",
        client_id: str = "",
        arrival_s: float | None = None,
        trace_headers: Mapping[str, str] | None = None,
        wake: asyncio.Event | None = None,
    ) -> RequestStream:
        """Accept a request and start it. Streams given the same `wake` can be read together.

        Raises InvalidRequestError (prompt empty or too long, id in use), OverloadedError and
        UnavailableError; a request refused like that is counted as rejected.
        """
        arrived_s = self.now_s() if arrival_s is None else arrival_s
        arrival = Arrival(request_id, arrived_s, len(prompt_token_ids), request_class, client_id)
        return self.requests.add(arrival, prompt_token_ids, params, trace_headers or {}, wake)

    def cancel_request(self, request_id: str) -> None:
        self.requests.cancel(request_id)

    def num_outstanding(self, replica_id: int) -> int:
        return self.requests.num_outstanding(replica_id)

    def kv_blocks_used(self, replica_id: int) -> int:
        stats = self._stats.get(replica_id)
        return stats.kv_blocks_used if stats is not None else 0

    def request_id_of(self, key: str) -> str:
        return self.requests.request_id_of(key)

    async def wait_until_ended(self, keys: Iterable[str], timeout_s: float) -> None:
        """Return when none of these requests exists any more, at the latest after `timeout_s`."""
        deadline, left = time.monotonic() + timeout_s, set(keys)
        while (left := {k for k in left if self.requests.is_live(k)}) and (
            remaining_s := deadline - time.monotonic()
        ) > 0:
            await self.wait_for_change(remaining_s)

    def send(self, replica_id: int, message: Any) -> None:
        """To that replica's leader."""
        leader = self.deployment.replica(replica_id).placement.devices[0]
        self.workers.send(leader, message)

    # ---------------------------------------------------------------- what workers say

    def on_message(self, message: Any) -> None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case RankFailed():
                for replica in self.deployment.replicas:
                    if replica.replica_id == message.replica_id:
                        self._lose({replica: message.error})

    def _on_tokens(self, message: Tokens) -> None:
        now_s = self.now_s()
        if message.updates:
            self.requests.take_tokens(message, now_s)
        if message.step is not None:
            self.on_step(message.replica_id, message.step)
        self._take_stats(message.replica_id, message.stats, now_s)

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
            generated_tokens_total=self.requests.generated_tokens(replica_id),
            num_preemptions_total=stats.num_preemptions_total,
        )
        self.requests.counters.add_growth(replica_id, stats)
        self._measured.set()

    # ---------------------------------------------------------------- loss and recovery

    @property
    def dead_devices(self) -> set[int]:
        return self.workers.dead_devices

    def on_lost(self, device: int) -> None:
        """A worker is gone, and with it every replica that had a rank there."""
        self._log.append(self.now_s(), EventKind.DEVICE_LOST, device=device)
        if self._switches.current is not None:
            self._switches.current.cancel()
        self._lose(self._without_worker())

    def on_joined(self, device: int) -> None:
        """A fresh worker holds nothing; the next deployment may use it."""
        self._log.append(self.now_s(), EventKind.DEVICE_JOINED, device=device)

    def _without_worker(self) -> dict[Replica, str]:
        """Replicas with a rank on a device that has no worker, and why they are lost."""
        return {
            replica: f"worker {min(gone)} is lost"
            for replica in self.deployment.replicas
            if (gone := self.dead_devices & set(replica.placement.devices))
        }

    def _lose(self, broken: dict[Replica, str]) -> None:
        """Take broken replicas out and recompute their requests elsewhere; after a running switch,
        which fails on its own and must not see the deployment change under it."""
        if self._switches.current is not None:
            self._broken |= broken
            self.on_hold |= {r.replica_id for r in broken}
            self._switches.current.cancel()
            return
        left = tuple(r for r in self.deployment.replicas if r not in broken)
        if len(left) == len(self.deployment.replicas):
            return
        self._set_deployment(Deployment(left))
        for replica, reason in broken.items():
            logger.error("replica %d (%s): its requests start over", replica.replica_id, reason)
            self._abandon(replica)
        for replica in broken:
            self.requests.requeue(replica.replica_id)
        if not left and self._state in ("serving", "draining"):
            self._healing.start()

    def _abandon(self, replica: Replica) -> None:
        """Tell the ranks that are left of it, and wait for none."""
        for device in set(replica.placement.devices) - self.dead_devices:
            task = asyncio.ensure_future(
                self.call(device, ReleaseRank, replica_id=replica.replica_id)
            )
            task.add_done_callback(lambda t: t.cancelled() or t.exception())

    def _recover_lost(self) -> None:
        """No switch runs any more: take out the replicas that broke meanwhile."""
        broken, self._broken = self._broken, {}
        current = {r: why for r, why in broken.items() if r in self.deployment.replicas}
        self.on_hold -= {r.replica_id for r in broken}
        self._lose(current | self._without_worker())

    async def until_idle(self) -> None:
        """Return when no switch runs."""
        await self._switches.until_idle()

    async def reload(self, replicas: Sequence[Replica]) -> None:
        """Load replicas from disk and make them the deployment, when there is none. Raises
        UnavailableError, and nothing of them is left then."""
        devices = sorted(Deployment(tuple(replicas)).devices)
        fence, lives = self.workers.raise_fence(), self.workers.lives(devices)
        try:
            await self._load(replicas, f"load-{fence}")
            if self.workers.lives(devices) != lives:
                raise UnavailableError("a worker was lost while its replica was loaded")
        except UnavailableError:
            for replica in replicas:
                self._abandon(replica)
            raise
        self._set_deployment(Deployment(tuple(replicas)))
        self.requests.dispatch_held()

    def fail_held(self) -> None:
        self.requests.fail_held()

    # ---------------------------------------------------------------- switching

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        return await self.workers.call(device, kind, **fields)

    def raise_fence(self) -> int:
        """See `WorkerPool.raise_fence`."""
        return self.workers.raise_fence()

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        """Start a switch. See `engine.cluster.Cluster.apply` for what it raises."""
        if self._healing.is_loading:
            raise SwitchInProgressError(f"{self._healing.status}; plan again when it is.")
        return self._switches.start(plan)

    def check(self, plan: SwitchPlan) -> None:
        """Raises what `apply` would."""
        self._switches.check(plan)

    def plan(self, target: Sequence[ParallelConfig], kv: KvCostParams | None = None) -> SwitchPlan:
        """A plan from the present state. Without `kv`, every sequence that finds room migrates.
        Raises InfeasibleError."""
        snapshot = self.snapshot()
        return plan_switch(
            self.spec,
            snapshot.deployment,
            snapshot.epoch,
            target,
            kv or KvCostParams(self.spec.link_bytes_per_s, RECOMPUTE_NEVER, DRAIN_NEVER_S),
            dead_devices=snapshot.dead_devices,
            kv_blocks_used=snapshot.kv_blocks_used,
        )

    @property
    def switch_counters(self) -> SwitchCounters:
        return self._switches.counters

    def ticket(self, ticket_id: str) -> SwitchTicket:
        return self._switches.ticket(ticket_id)

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """Ask for a rollback before commit."""
        return self._switches.cancel(ticket_id)

    def publish(self, ticket: SwitchTicket) -> None:
        self._switches.publish(ticket)

    def lives(self, devices: Iterable[int]) -> dict[int, int | None]:
        return self.workers.lives(devices)

    def lose(self, replica_id: int, reason: str) -> None:
        """A switch leaves this replica broken: it is taken out when the switch has ended."""
        self._broken[self.deployment.replica(replica_id)] = reason

    def hold(self, replica_ids: Iterable[int]) -> None:
        self.on_hold |= set(replica_ids)

    def unhold(self) -> None:
        self.on_hold = set()
        self.requests.dispatch_held()

    def commit(self, target: Deployment, owner: dict[str, int]) -> None:
        self.requests.move(owner)
        self._set_deployment(target)
        self._healing.wanted = target
        self.on_hold = set()
        self.requests.dispatch_held()

    def abort_ended(self, owner: dict[str, int]) -> None:
        self.requests.abort_ended(owner)

    def _set_deployment(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.epoch += 1
        ids = tuple(r.replica_id for r in deployment.replicas)
        self.routing = Routing(ids)
        self._stats = {k: v for k, v in self._stats.items() if k in ids}
        self.requests.keep_only(ids)

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
            switch=self._switches.latest,
            dead_devices=tuple(sorted(self.dead_devices)),
            num_arrived=self.requests.counts["arrived"],
            num_finished=self.requests.counts["finished"],
            num_rejected=self.requests.counts["rejected"],
            num_queued_unrouted=self.requests.num_held,
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
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next event, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def wait_for_stats(self) -> None:
        """Return when the next report of a leader's load has come."""
        self._measured.clear()
        await self._measured.wait()

    async def wait_for_events(self, cursor: int, timeout_s: float) -> EventBatch:
        """Events since `cursor`; waits up to `timeout_s` while there are none."""
        batch = self.events(cursor)
        if not batch.events and not batch.num_lost:
            await self.wait_for_change(timeout_s)
            batch = self.events(cursor)
        return batch

    def watch_ticket(self, ticket_id: str) -> AsyncIterator[SwitchTicket]:
        """Every state of a ticket that can be seen, up to the terminal one."""
        return self._switches.watch(ticket_id)

    async def ended(self, ticket_id: str) -> SwitchTicket:
        """The terminal state of a ticket, once it is there."""
        async for _ in self.watch_ticket(ticket_id):
            continue
        return self.ticket(ticket_id)


def make_run_dir() -> Path:
    """A private folder for sockets and rendezvous files; short, since ipc paths are limited."""
    return Path(tempfile.mkdtemp(prefix="tw-"))
