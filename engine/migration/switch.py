"""One switch: prepare, transfer, verify, commit, release; or roll back.

Until commit the old generation is whole, and it serves: weights and KV are copied beside it, KV in
rounds, the last of them in one short stop that the commit ends. Whatever fails before commit
undoes the new one and resumes the old. After commit nothing is undone; a rank that breaks then is
the engine's to recover.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.cluster import Binding, Replica, SwitchPhase, SwitchPlan, SwitchTicket, Transfer
from engine.errors import UnavailableError
from engine.messages import (
    AdoptSequences,
    CloseTransfer,
    LimitBlocks,
    MoveWeights,
    OpenTransfer,
    ReleaseRank,
    Reply,
    Resume,
)
from engine.migration.host import SwitchCancelledError, SwitchHost
from engine.migration.order import default_staging_bytes
from engine.migration.room import kv_limits
from engine.migration.sequences import SequenceMove, check_sums, ends_of
from engine.rank_calls import (
    Endpoints,
    activate_ranks,
    await_all,
    bind_ranks,
    build_ranks,
    host_store,
)

logger = logging.getLogger(__name__)
BATCH_BYTES = 128 << 20  # of weights between two looks at progress and cancellation
MAX_ROUNDS = 5  # of KV copies while sequences run
DRAIN_SLACK = 1.5  # a sequence may take so much longer than predicted to end


class Switch:
    """Runs one plan. `ticket` is always the latest state; `run` never raises."""

    def __init__(self, host: SwitchHost, plan: SwitchPlan, ticket: SwitchTicket) -> None:
        self.host, self.plan, self.ticket = host, plan, ticket
        self._old = host.deployment
        kept = set(self._old.replicas) & set(plan.target.replicas)
        self.leaving = [r for r in self._old.replicas if r not in kept]
        self.coming = [r for r in plan.target.replicas if r not in kept]
        self.devices = sorted(self._old.devices | plan.target.devices)
        self._sequences = SequenceMove(host, plan, self.leaving, self.coming)
        self._weight_bytes_sent = 0
        self._cancelled = self._committed = False
        self._paused_at_s: float | None = None
        self._endpoints: Endpoints = {}

    # ---------------------------------------------------------------- life

    @property
    def committed(self) -> bool:
        return self._committed

    def cancel(self) -> None:
        """Takes effect before commit, at the next phase border or batch of copies."""
        self._cancelled = True

    async def run(self) -> None:
        """The whole switch."""
        try:
            await self._phase(SwitchPhase.PREPARE, self._prepare)
            await self._phase(SwitchPhase.TRANSFER, self._transfer)
            await self._phase(SwitchPhase.VERIFY, self._verify)
            await self._phase(SwitchPhase.COMMIT, self._commit)
        except Exception as error:
            if not self._committed:
                await self._roll_back(error)
                return
            logger.exception("switch %s: failed after its commit", self.ticket.ticket_id)
        try:
            await self._phase(SwitchPhase.RELEASE, self._release)
        except Exception:  # the new deployment serves; a rank that cannot be freed is logged
            logger.exception("switch %s: release failed", self.ticket.ticket_id)
        self._update(phase=SwitchPhase.DONE)

    async def _phase(self, phase: SwitchPhase, work: Callable[[], Awaitable[None]]) -> None:
        self._stop_if_cancelled()
        started_s = self.host.now_s()
        if phase is not SwitchPhase.COMMIT:  # that phase is announced when it is a fact
            self._update(phase=phase)
        self.host.failpoint(f"before_{phase}")
        await work()
        self.host.failpoint(f"after_{phase}")
        elapsed_s = self.host.now_s() - started_s
        self._update(phase_s=(*self.ticket.phase_s, (phase.value, elapsed_s)))

    def _stop_if_cancelled(self) -> None:
        if self._cancelled and not self._committed:
            raise SwitchCancelledError("cancelled on request")

    def _update(self, **changes: Any) -> None:
        self.ticket = replace(self.ticket, updated_s=self.host.now_s(), **changes)
        self.host.publish(self.ticket)

    # ---------------------------------------------------------------- phases

    async def _prepare(self) -> None:
        """Groups, modules and weight storage of the new ranks, beside the old ones."""
        call, nonce, devices = self.host.call, self.ticket.ticket_id, self.devices
        store = await host_store(call, devices[0], f"move-{nonce}")
        await await_all(
            call(d, OpenTransfer, nonce=nonce, devices=devices, store=store) for d in devices
        )
        limits = kv_limits(
            self.host.spec,
            self._old,
            self.plan.target,
            {r.replica_id: self.host.kv_blocks_used(r.replica_id) for r in self.leaving},
            default_staging_bytes(self.host.spec),
        )
        await self._limit_blocks(self.leaving, limits)
        self._endpoints = await build_ranks(call, self.host.spec, self.coming, nonce, False)
        await self._limit_blocks(self.coming, limits)

    async def _limit_blocks(
        self, replicas: Iterable[Replica], limits: Mapping[int, int] | None
    ) -> None:
        """Memory is for two while both generations are there. None: all of it is theirs again."""
        await await_all(
            self.host.call(
                r.placement.devices[0],
                LimitBlocks,
                replica_id=r.replica_id,
                max_used=None if limits is None else limits[r.replica_id],
            )
            for r in replicas
        )

    async def _transfer(self) -> None:
        await self._move_weights()
        if self.leaving:
            await self._copy_sequences()

    async def _move_weights(self) -> None:
        """In batches, each sent before the one ahead of it has ended, so that links stay busy."""
        under_way: deque[asyncio.Task[None]] = deque()
        try:
            for first, transfers in _batches(self.plan.transfers):
                self._stop_if_cancelled()
                under_way.append(asyncio.create_task(self._move_batch(first, transfers)))
                if len(under_way) == 2:
                    await under_way.popleft()
            while under_way:
                await under_way.popleft()
        finally:
            await asyncio.gather(*under_way, return_exceptions=True)
        await bind_ranks(self.host.call, self.coming)
        self._update(weight_bytes=self.plan.weight_bytes)

    async def _move_batch(self, first: int, transfers: Sequence[Transfer]) -> None:
        new_replicas = {
            d: r.replica_id for r in self.plan.target.replicas for d in r.placement.devices
        }
        replies = await await_all(
            self.host.call(
                device,
                MoveWeights,
                transfers=transfers,
                dst_replicas=[new_replicas[t.dst] for t in transfers],
                src_replicas=new_replicas,
                first_index=first,
            )
            for device in ends_of(transfers)
        )
        check_sums(replies, "weight")
        self._weight_bytes_sent += sum(reply.sent_bytes for reply in replies)
        self._update(moved_bytes=self._weight_bytes_sent)

    async def _copy_sequences(self) -> None:
        """KV in rounds while sequences run, until a round is as short as a step or they grow as
        fast as they are copied; and the end of those that are to end where they are."""
        before_s = float("inf")
        for number in range(MAX_ROUNDS):
            self._stop_if_cancelled()
            self.host.failpoint(f"before_round_{number}")
            round_began_s = self.host.now_s()
            await self._copy_round(is_last=False)
            round_s = self.host.now_s() - round_began_s
            if round_s < self.plan.kv.decode_step_s or round_s > before_s / 2:
                break
            before_s = round_s
        if draining := self._sequences.draining:
            deadline_s = max(draining.values()) * DRAIN_SLACK
            await self.host.wait_until_ended(draining, deadline_s)
            await self._copy_round(is_last=False)

    async def _copy_round(self, is_last: bool) -> None:
        moving = self._sequences
        await moving.copy(is_last)
        self._update(
            kv_bytes=moving.kv_bytes,
            moved_bytes=self._weight_bytes_sent + moving.moved_bytes,
            num_kv_rounds=self.ticket.num_kv_rounds + 1,
        )

    async def _verify(self) -> None:
        """The new ranks answer: activate them, followers first. They have nothing to run before
        commit. (Weights and KV are checked as they arrive.)"""
        await activate_ranks(self.host.call, self.coming, self._endpoints)

    async def _commit(self) -> None:
        moving = self._sequences
        if self.leaving:
            self._paused_at_s = self.host.now_s()
            self.host.hold(r.replica_id for r in self.leaving)
            await self._copy_round(is_last=True)
            self.host.failpoint("after_stop")
            self._stop_if_cancelled()
        self.host.commit(self.plan.target, moving.owner)
        self._committed = True
        await await_all(
            self._adopt(r.placement.devices[0], r.replica_id)
            for r in self.plan.target.replicas
            if r.replica_id in moving.recompute
        )
        if self._paused_at_s is not None:
            self._update(pause_s=self.host.now_s() - self._paused_at_s)
        self.host.abort_ended(moving.owner)
        num_recomputed = sum(map(len, moving.recompute.values()))
        self._update(
            phase=SwitchPhase.COMMIT,
            num_recomputed=num_recomputed,
            num_migrated=len(moving.owner) - num_recomputed,
            num_drained=moving.num_bound(Binding.DRAIN),
            bindings=moving.as_reported(),
        )

    async def _adopt(self, leader: int, replica_id: int) -> None:
        recompute = self._sequences.recompute[replica_id]
        try:
            await self.host.call(leader, AdoptSequences, replica_id=replica_id, recompute=recompute)
        except UnavailableError:  # its loss is noticed apart and its requests requeued
            logger.exception("replica %d did not adopt", replica_id)

    async def _release(self) -> None:
        await await_all(
            self.host.call(d, ReleaseRank, replica_id=r.replica_id)
            for r in self.leaving
            for d in r.placement.devices
        )
        await self._limit_blocks(self.coming, None)
        await await_all(self.host.call(d, CloseTransfer) for d in self.devices)

    async def _roll_back(self, error: Exception) -> None:
        logger.warning("switch %s rolled back: %s", self.ticket.ticket_id, error)
        calls: list[Awaitable[Reply]] = [
            self.host.call(d, ReleaseRank, replica_id=r.replica_id)
            for r in self.coming
            for d in r.placement.devices
        ]
        calls += [
            self.host.call(r.placement.devices[0], Resume, replica_id=r.replica_id)
            for r in self._old.replicas
        ]
        await asyncio.gather(*calls, return_exceptions=True)
        closed = (self.host.call(d, CloseTransfer) for d in self.devices)
        await asyncio.gather(*closed, return_exceptions=True)
        self.host.unhold()
        if self._paused_at_s is not None:
            self._update(pause_s=self.host.now_s() - self._paused_at_s)
        cancelled = isinstance(error, SwitchCancelledError)
        self._update(
            phase=SwitchPhase.CANCELLED if cancelled else SwitchPhase.ROLLED_BACK,
            reason=str(error) or type(error).__name__,
            bindings=self._sequences.as_reported(),
        )


def _batches(transfers: Sequence[Transfer]) -> Iterator[tuple[int, Sequence[Transfer]]]:
    """(index of the first, transfers) of stretches of about BATCH_BYTES."""
    first = nbytes = 0
    for index, transfer in enumerate(transfers, 1):
        nbytes += transfer.nbytes
        if nbytes >= BATCH_BYTES or index == len(transfers):
            yield first, transfers[first:index]
            first, nbytes = index, 0
