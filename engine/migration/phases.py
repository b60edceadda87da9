"""The skeleton of a switch, in either mode: phases, ticket, cancellation, pause."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.cluster import Replica, SwitchPhase, SwitchPlan, SwitchTicket, Transfer
from engine.errors import UnavailableError
from engine.messages import (
    AdoptSequences,
    CloseTransfer,
    MoveWeights,
    OpenTransfer,
    ReleaseRank,
    SequenceState,
)
from engine.migration.host import SwitchCancelledError, SwitchHost
from engine.migration.sequences import check_sums, ends_of
from engine.rank_calls import await_all, host_store, meet_at

logger = logging.getLogger(__name__)


class PhasedSwitch(ABC):
    """Runs one plan. `ticket` is always the latest state; `run` never raises."""

    def __init__(self, host: SwitchHost, plan: SwitchPlan, ticket: SwitchTicket) -> None:
        self.host, self.plan, self.ticket = host, plan, ticket
        self._old = host.deployment
        kept = set(self._old.replicas) & set(plan.target.replicas)
        self.leaving = [r for r in self._old.replicas if r not in kept]
        self.coming = [r for r in plan.target.replicas if r not in kept]
        self.devices = sorted(self._old.devices | plan.target.devices)
        self._cancelled = self._committed = False
        self._paused_at_s: float | None = None

    @property
    def committed(self) -> bool:
        return self._committed

    @property
    def can_roll_back(self) -> bool:
        return not self._committed

    def cancel(self) -> None:
        """Takes effect as long as it can roll back, at the next border of phases or copies."""
        self._cancelled = True

    @abstractmethod
    async def prepare(self) -> None: ...
    @abstractmethod
    async def transfer(self) -> None: ...
    @abstractmethod
    async def verify(self) -> None: ...
    @abstractmethod
    async def commit(self) -> None:
        """Sets `_committed` once the new deployment is the current one."""

    @abstractmethod
    async def roll_back(self, error: Exception) -> None: ...
    async def roll_forward(self, error: Exception) -> bool:
        """Commit in spite of a failure from which there is no way back; False when that cannot
        be done."""
        raise AssertionError("there is a way back until the commit") from error

    async def run(self) -> None:
        """The whole switch."""
        try:
            await self._phase(SwitchPhase.PREPARE, self.prepare)
            await self._phase(SwitchPhase.TRANSFER, self.transfer)
            await self._phase(SwitchPhase.VERIFY, self.verify)
            await self._phase(SwitchPhase.COMMIT, self.commit)
        except Exception as error:
            if not await self._recover(error):
                return
        try:
            await self._phase(SwitchPhase.RELEASE, self.release)
        except Exception:  # the new deployment serves; a rank that cannot be freed is logged
            logger.exception("switch %s: release failed", self.ticket.ticket_id)
        self.update(phase=SwitchPhase.DONE)

    async def _recover(self, error: Exception) -> bool:
        """Whether the switch goes through in spite of `error`."""
        name = self.ticket.ticket_id
        if self._committed:
            logger.exception("switch %s: failed after its commit", name)
            return True
        if not self.can_roll_back:
            logger.warning("switch %s rolls forward: %s", name, error)
            return await self.roll_forward(error)
        logger.warning("switch %s rolled back: %s", name, error)
        await self.roll_back(error)
        self.host.unhold()
        self.end_pause()
        cancelled = isinstance(error, SwitchCancelledError)
        self.update(
            phase=SwitchPhase.CANCELLED if cancelled else SwitchPhase.ROLLED_BACK,
            reason=str(error) or type(error).__name__,
        )
        return False

    async def _phase(self, phase: SwitchPhase, work: Callable[[], Awaitable[None]]) -> None:
        self.stop_if_cancelled()
        started_s = self.host.now_s()
        if phase is not SwitchPhase.COMMIT:  # that phase is announced when it is a fact
            self.update(phase=phase)
        self.host.failpoint(f"before_{phase}")
        await work()
        self.host.failpoint(f"after_{phase}")
        elapsed_s = self.host.now_s() - started_s
        self.update(phase_s=(*self.ticket.phase_s, (phase.value, elapsed_s)))

    # ---------------------------------------------------------------- what both modes do

    def stop_if_cancelled(self) -> None:
        if self._cancelled and self.can_roll_back:
            raise SwitchCancelledError("cancelled on request")

    def update(self, **changes: Any) -> None:
        """Change the ticket and tell of it."""
        self.ticket = replace(self.ticket, updated_s=self.host.now_s(), **changes)
        self.host.publish(self.ticket)

    def begin_pause(self) -> None:
        """The replicas that go get no further request, and are about to stop."""
        self._paused_at_s = self.host.now_s()
        self.host.hold(r.replica_id for r in self.leaving)

    def end_pause(self) -> None:
        if self._paused_at_s is not None:
            self.update(pause_s=self.host.now_s() - self._paused_at_s)
            self._paused_at_s = None

    async def open_transfer(self) -> None:
        """The group of all devices, old and new, over which bytes move."""
        call, nonce, devices = self.host.call, self.ticket.ticket_id, self.devices
        store = await host_store(call, devices[0], f"move-{nonce}")
        calls = (call(d, OpenTransfer, nonce=nonce, devices=devices, store=store) for d in devices)
        await meet_at(call, devices, store, calls)

    async def move_weights(self, transfers: Sequence[Transfer], first_index: int = 0) -> int:
        """Carry out a stretch of the plan's transfers and compare checksums; bytes sent."""
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
                first_index=first_index,
            )
            for device in ends_of(transfers)
        )
        check_sums(replies, "weight")
        return sum(reply.sent_bytes for reply in replies)

    async def adopt(self, replica: Replica, recompute: Sequence[SequenceState]) -> None:
        """After the commit: what was imported runs there, and these start over."""
        replica_id, leader = replica.replica_id, replica.placement.devices[0]
        try:
            await self.host.call(leader, AdoptSequences, replica_id=replica_id, recompute=recompute)
        except UnavailableError:  # its loss is noticed apart and its requests requeued
            logger.exception("replica %d did not adopt", replica_id)

    async def close_transfer(self) -> None:
        """On every device that answers."""
        closed = (self.host.call(d, CloseTransfer) for d in self.devices)
        await asyncio.gather(*closed, return_exceptions=True)

    async def release(self) -> None:
        await await_all(
            self.host.call(d, ReleaseRank, replica_id=r.replica_id)
            for r in self.leaving
            for d in r.placement.devices
        )
        await await_all(self.host.call(d, CloseTransfer) for d in self.devices)
