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
from collections.abc import Iterable, Iterator, Mapping, Sequence

from engine.cluster import Binding, Replica, SwitchPhase, SwitchPlan, SwitchTicket, Transfer
from engine.messages import (
    LimitBlocks,
    Resume,
)
from engine.migration.binding import drain_timeout_s, is_round_due
from engine.migration.host import SwitchHost
from engine.migration.new_ranks import release_ranks
from engine.migration.order import default_staging_bytes
from engine.migration.phases import PhasedSwitch
from engine.migration.room import kv_limits
from engine.migration.sequences import SequenceMove
from engine.rank_calls import (
    Endpoints,
    activate_ranks,
    await_all,
    bind_ranks,
    build_ranks,
)

logger = logging.getLogger(__name__)
BATCH_BYTES = 128 << 20  # of weights between two looks at progress and cancellation


class Switch(PhasedSwitch):
    """A live switch: both generations side by side until the commit."""

    def __init__(self, host: SwitchHost, plan: SwitchPlan, ticket: SwitchTicket) -> None:
        super().__init__(host, plan, ticket)
        self._sequences = SequenceMove(host, plan, self.leaving, self.coming)
        self._weight_bytes_sent = 0
        self._endpoints: Endpoints = {}

    # ---------------------------------------------------------------- phases

    async def prepare(self) -> None:
        """Groups, modules and weight storage of the new ranks, beside the old ones."""
        await self.open_transfer()
        limits = kv_limits(
            self.host.spec,
            self._old,
            self.plan.target,
            {r.replica_id: self.host.kv_blocks_used(r.replica_id) for r in self.leaving},
            default_staging_bytes(self.host.spec),
        )
        await self._limit_blocks(self.leaving, limits)
        self._endpoints = await build_ranks(
            self.host.call, self.host.spec, self.coming, self.ticket.ticket_id, from_disk=False
        )
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

    async def transfer(self) -> None:
        await self._move_weights()
        if self.leaving:
            await self._copy_sequences()

    async def _move_weights(self) -> None:
        """In batches, each sent before the one ahead of it has ended, so that links stay busy."""
        under_way: deque[asyncio.Task[None]] = deque()
        try:
            for first, transfers in _batches(self.plan.transfers):
                self.stop_if_cancelled()
                under_way.append(asyncio.create_task(self._move_batch(first, transfers)))
                if len(under_way) == 2:
                    await under_way.popleft()
            while under_way:
                await under_way.popleft()
        finally:
            await asyncio.gather(*under_way, return_exceptions=True)
        await bind_ranks(self.host.call, self.coming)
        self.update(weight_bytes=self.plan.weight_bytes)

    async def _move_batch(self, first: int, transfers: Sequence[Transfer]) -> None:
        self._weight_bytes_sent += await self.move_weights(transfers, first)
        self.update(moved_bytes=self._weight_bytes_sent)

    async def _copy_sequences(self) -> None:
        """KV in rounds while sequences run, and the end of those that are to end where they are."""
        rounds_s: list[float] = []
        while is_round_due(rounds_s, self.plan.kv.decode_step_s):
            self.stop_if_cancelled()
            self.host.failpoint(f"before_round_{len(rounds_s)}")
            round_began_s = self.host.now_s()
            await self._copy_round(is_last=False)
            rounds_s.append(self.host.now_s() - round_began_s)
        if draining := self._sequences.draining:
            await self.host.wait_until_ended(draining, drain_timeout_s(draining.values()))
            await self._copy_round(is_last=False)

    async def _copy_round(self, is_last: bool) -> None:
        moving = self._sequences
        await moving.copy(is_last)
        self.update(
            kv_bytes=moving.kv_bytes,
            moved_bytes=self._weight_bytes_sent + moving.moved_bytes,
            num_kv_rounds=self.ticket.num_kv_rounds + 1,
        )

    async def verify(self) -> None:
        """The new ranks answer: activate them, followers first. They have nothing to run before
        commit. (Weights and KV are checked as they arrive.)"""
        await activate_ranks(self.host.call, self.coming, self._endpoints)

    async def commit(self) -> None:
        moving = self._sequences
        if self.leaving:
            self.begin_pause()
            await self._copy_round(is_last=True)
            self.host.failpoint("after_stop")
            self.stop_if_cancelled()
        self.host.commit(self.plan.target, moving.owner)
        self._committed = True
        await await_all(
            self.adopt(r, moving.recompute[r.replica_id])
            for r in self.plan.target.replicas
            if r.replica_id in moving.recompute
        )
        self.end_pause()
        self.host.abort_ended(moving.owner)
        num_recomputed = sum(map(len, moving.recompute.values()))
        self.update(
            phase=SwitchPhase.COMMIT,
            num_recomputed=num_recomputed,
            num_migrated=len(moving.owner) - num_recomputed,
            num_drained=moving.num_bound(Binding.DRAIN),
            bindings=moving.as_reported(),
        )

    async def release(self) -> None:
        await super().release()
        await self._limit_blocks(self.coming, None)

    async def roll_back(self, error: Exception) -> None:
        self.update(bindings=self._sequences.as_reported())
        resumed = (
            self.host.call(r.placement.devices[0], Resume, replica_id=r.replica_id)
            for r in self._old.replicas
        )
        released = release_ranks(self.host, self.coming)
        await asyncio.gather(released, *resumed, return_exceptions=True)
        await self.close_transfer()


def _batches(transfers: Sequence[Transfer]) -> Iterator[tuple[int, Sequence[Transfer]]]:
    """(index of the first, transfers) of stretches of about BATCH_BYTES."""
    first = nbytes = 0
    for index, transfer in enumerate(transfers, 1):
        nbytes += transfer.nbytes
        if nbytes >= BATCH_BYTES or index == len(transfers):
            yield first, transfers[first:index]
            first, nbytes = index, 0
