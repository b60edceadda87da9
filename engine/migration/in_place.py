"""A switch for when memory is too short for two generations beside each other.

The replicas that go stop and give up their KV caches, so that all their sequences are recomputed;
then tensors move step by step, and each step frees what the next one needs. Until the first old
shard is dropped the switch can be undone: the old ranks get KV caches again and start their
sequences over. From then on no generation is whole, so it only goes forward: new ranks that a
failure has left incomplete are read from disk, and replicas that lack a device are left out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from engine.cluster import (
    Binding,
    BoundSequence,
    Deployment,
    Replica,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import UnavailableError
from engine.messages import (
    FreeShards,
    MakeShards,
    Quiesce,
    Resume,
    SequenceState,
)
from engine.migration.host import SwitchHost
from engine.migration.new_ranks import NewRanks, release_ranks
from engine.migration.order import InPlaceStep, default_staging_bytes, in_place_order
from engine.migration.phases import PhasedSwitch
from engine.migration.sequences import choose_replicas
from engine.rank_calls import await_all, size_kv
from engine.shards import num_kv_blocks

logger = logging.getLogger(__name__)


class InPlaceSwitch(PhasedSwitch):
    """`journal` lists the steps that are done, by number."""

    def __init__(self, host: SwitchHost, plan: SwitchPlan, ticket: SwitchTicket) -> None:
        super().__init__(host, plan, ticket)
        self.steps: tuple[InPlaceStep, ...] = ()
        self.journal: list[int] = []
        self._states: list[SequenceState] = []  # of the sequences that were on `leaving`
        self._new = NewRanks(host, self.coming, ticket.ticket_id)
        self._left_out: list[Replica] = []  # new replicas that could not be completed
        self._kv_is_dropped = False  # of the old ranks
        self._old_is_whole = True  # their weights

    @property
    def can_roll_back(self) -> bool:
        return self._old_is_whole and not self._committed

    def cancel(self) -> None:
        """Takes effect while the old weights are whole; later the ticket says that it does not."""
        super().cancel()
        if not self.can_roll_back and not self._committed:
            self.update(reason="cannot be cancelled: old weights are gone, it rolls forward")

    # ---------------------------------------------------------------- phases

    async def prepare(self) -> None:
        """The steps; groups and modules of the new ranks, while the old ones serve."""
        host = self.host
        self.steps = in_place_order(
            host.spec,
            self._old,
            self.plan.target,
            self.plan.transfers,
            default_staging_bytes(host.spec),
        )
        await self.open_transfer()
        await self._new.build_bare()

    async def transfer(self) -> None:
        await self._stop_leaving()
        for number, step in enumerate(self.steps):
            self.host.failpoint(f"before_step_{number}")
            await self._move(step)
            self.journal.append(number)
            self.host.failpoint(f"after_step_{number}")
        self.update(weight_bytes=self.plan.weight_bytes)

    async def _stop_leaving(self) -> None:
        """The replicas that go stand still, and their KV is given up."""
        if not self.leaving:
            return
        self.begin_pause()
        replies = await await_all(
            self.host.call(_leader(r), Quiesce, replica_id=r.replica_id) for r in self.leaving
        )
        self._states = [state for reply in replies for state in reply.sequences]
        self.update(bindings=tuple(map(self._bind, self._states)))
        self._kv_is_dropped = True
        await await_all(size_kv(self.host.call, r, 0) for r in self.leaving)

    def _bind(self, state: SequenceState) -> BoundSequence:
        """There is nowhere to move KV to, nor time to wait for an end."""
        return BoundSequence(
            request_id=self.host.request_id_of(state.request_id),
            binding=Binding.RECOMPUTE,
            drain_s=None,
            migrate_s=None,
            recompute_s=state.num_computed_tokens / self.plan.kv.prefill_tokens_per_s,
        )

    async def _move(self, step: InPlaceStep) -> None:
        """One step, see `InPlaceStep`. Nothing is freed before every copy has been checked."""
        call, old, new = self.host.call, _replica_on(self.leaving), _replica_on(self.coming)
        parked = _by_device(step.parked)
        if parked:
            self._let_go_of_old()
        await await_all(
            call(d, MakeShards, replica_id=new[d], tensors=names, parked=parked.get(d, []))
            for d, names in _by_device(step.made).items()
        )
        sent_bytes = await self.move_weights(step.transfers)
        self.update(moved_bytes=self.ticket.moved_bytes + sent_bytes)
        if step.freed:
            self._let_go_of_old()
        await await_all(
            call(d, FreeShards, replica_id=old[d], tensors=names)
            for d, names in _by_device(step.freed).items()
        )

    def _let_go_of_old(self) -> None:
        """From here on there is no way back."""
        self.stop_if_cancelled()
        self._old_is_whole = False

    async def verify(self) -> None:
        await await_all(map(self._new.make_ready, self.coming))

    async def commit(self) -> None:
        await self._commit_to(self.plan.target)

    async def _commit_to(self, target: Deployment) -> None:
        for replica in target.replicas:
            if replica in self.coming and self._new.is_lost(replica):
                raise UnavailableError(self._new.why_lost(replica))
        host, states = self.host, self._states
        owner = choose_replicas(host, target.replicas, self.coming, {}, states)
        host.commit(target, owner)
        self._committed = True
        await await_all(
            self.adopt(r, [s for s in states if owner[s.request_id] == r.replica_id])
            for r in target.replicas
            if r.replica_id in owner.values()
        )
        self.end_pause()
        host.abort_ended(owner)
        self.update(phase=SwitchPhase.COMMIT, num_recomputed=len(states))

    async def release(self) -> None:
        await release_ranks(self.host, [*self.leaving, *self._left_out])
        await self.close_transfer()

    # ---------------------------------------------------------------- failures

    async def roll_back(self, error: Exception) -> None:
        await release_ranks(self.host, self.coming)
        for replica, failure in await _try_all(self._restore, self.leaving):
            self.host.lose(replica.replica_id, f"it was not restored: {failure}")
        await self.close_transfer()

    async def _restore(self, replica: Replica) -> None:
        call = self.host.call
        if self._kv_is_dropped:
            await size_kv(call, replica, num_kv_blocks(self.host.spec, replica.parallel))
        await call(_leader(replica), Resume, replica_id=replica.replica_id)

    async def roll_forward(self, error: Exception) -> bool:
        """Commit to all that can be completed. False when that is nothing: then the old replicas
        are the engine's to recover from."""
        reason = f"rolled forward after: {error}"
        await self.close_transfer()
        await release_ranks(self.host, self.leaving)
        failures = dict(await _try_all(self._complete, self.coming))
        for replica in self.coming:
            if self._new.is_lost(replica):
                failures.setdefault(replica, self._new.why_lost(replica))
        self._left_out = list(failures)
        reason += "".join(f"; left out {r.parallel.key}: {why}" for r, why in failures.items())
        target = Deployment(tuple(r for r in self.plan.target.replicas if r not in failures))
        if not target.replicas:
            await release_ranks(self.host, self._left_out)
            for replica in self.leaving:
                self.host.lose(replica.replica_id, reason)
            self.host.unhold()
            self.end_pause()
            self.update(phase=SwitchPhase.ROLLED_BACK, reason=reason)
            return False
        self.update(reason=reason, to_key=target.key)
        await self._commit_to(target)
        return True

    async def _complete(self, replica: Replica) -> None:
        """With the weights it has got when those are all of them, else from disk."""
        devices, todo = set(replica.placement.devices), self.steps[len(self.journal) :]
        is_whole = not any(device in devices for step in todo for device, _ in step.made)
        await self._new.complete(replica, is_whole)


async def _try_all(
    work: Callable[[Replica], Awaitable[None]], replicas: list[Replica]
) -> list[tuple[Replica, str]]:
    """Do it for every replica; those for which it failed, and why."""
    results = await asyncio.gather(*map(work, replicas), return_exceptions=True)
    return [
        (replica, str(result) or type(result).__name__)
        for replica, result in zip(replicas, results, strict=True)
        if isinstance(result, BaseException)
    ]


def _replica_on(replicas: Iterable[Replica]) -> dict[int, int]:
    """Device -> id of the replica that has it."""
    return {device: r.replica_id for r in replicas for device in r.placement.devices}


def _by_device(pairs: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for device, name in pairs:
        names.setdefault(device, []).append(name)
    return names


def _leader(replica: Replica) -> int:
    return replica.placement.devices[0]
