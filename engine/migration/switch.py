"""One switch: prepare, transfer, verify, commit, release; or roll back.

Until commit the old generation is whole: its ranks keep their weights, sequences and blocks, and
only stand still while KV is copied. Whatever fails before commit undoes the new one and resumes
the old. After commit nothing is undone; a rank that breaks then is the engine's to recover.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.cluster import (
    Binding,
    ClusterSpec,
    Deployment,
    Replica,
    Routing,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import UnavailableError
from engine.messages import (
    AdoptSequences,
    CloseTransfer,
    ImportSequences,
    KvMove,
    MoveKv,
    MoveWeights,
    OpenTransfer,
    Quiesce,
    ReleaseRank,
    Reply,
    Resume,
    SequenceState,
)
from engine.migration.binding import bind_sequence
from engine.migration.kv import kv_move_bytes, kv_moves, take_copies
from engine.rank_calls import (
    Endpoints,
    activate_ranks,
    await_all,
    bind_ranks,
    build_ranks,
    host_store,
)
from engine.router import load_of, pick

logger = logging.getLogger(__name__)


class SwitchCancelledError(Exception):
    """Somebody asked for the switch to be cancelled before it committed."""


class SwitchHost(Protocol):
    """What a switch needs of the engine."""

    @property
    def spec(self) -> ClusterSpec: ...
    @property
    def deployment(self) -> Deployment: ...
    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply: ...
    def now_s(self) -> float: ...
    def num_outstanding(self, replica_id: int) -> int: ...
    def hold(self, replica_ids: Iterable[int]) -> None:
        """Send these replicas no further request until `commit` or `unhold`."""
        ...

    def unhold(self) -> None: ...
    def commit(self, target: Deployment, owner: dict[str, int]) -> None:
        """Make `target` current; `owner` names the new replica of every request that moved."""
        ...

    def abort_ended(self, owner: dict[str, int]) -> None:
        """Tell the new replicas of requests that were cancelled while they moved."""
        ...

    def publish(self, ticket: SwitchTicket) -> None: ...
    def failpoint(self, name: str) -> None:
        """Raises when a test wants this point to fail."""
        ...


@dataclass(slots=True)
class _Moved:
    """Sequences of the old replicas and where they go."""

    owner: dict[str, int] = field(default_factory=dict)
    recompute: dict[int, list[SequenceState]] = field(default_factory=dict)
    kv: list[KvMove] = field(default_factory=list)
    kv_replies: list[Reply] = field(default_factory=list)


class Switch:
    """Runs one plan. `ticket` is always the latest state; `run` never raises."""

    def __init__(self, host: SwitchHost, plan: SwitchPlan, ticket: SwitchTicket) -> None:
        self.host, self.plan, self.ticket = host, plan, ticket
        self._old = host.deployment
        kept = set(self._old.replicas) & set(plan.target.replicas)
        self.leaving = [r for r in self._old.replicas if r not in kept]
        self.coming = [r for r in plan.target.replicas if r not in kept]
        self.devices = sorted(self._old.devices | plan.target.devices)
        self._cancelled = False
        self._paused_at_s: float | None = None
        self._endpoints: Endpoints = {}

    # ---------------------------------------------------------------- life

    @property
    def committed(self) -> bool:
        return self.ticket.phase in (SwitchPhase.COMMIT, SwitchPhase.RELEASE, SwitchPhase.DONE)

    def cancel(self) -> None:
        """Takes effect at the next phase border before commit."""
        self._cancelled = True

    async def run(self) -> None:
        """The whole switch."""
        moved = _Moved()
        try:
            await self._phase(SwitchPhase.PREPARE, self._prepare)
            await self._phase(SwitchPhase.TRANSFER, lambda: self._transfer(moved))
            await self._phase(SwitchPhase.VERIFY, lambda: self._verify(moved))
            await self._phase(SwitchPhase.COMMIT, lambda: self._commit(moved))
        except Exception as error:
            if not self.committed:
                await self._roll_back(error)
                return
            logger.exception("switch %s: failed after its commit", self.ticket.ticket_id)
        try:
            await self._phase(SwitchPhase.RELEASE, self._release)
        except Exception:  # the new deployment serves; a rank that cannot be freed is logged
            logger.exception("switch %s: release failed", self.ticket.ticket_id)
        self._update(phase=SwitchPhase.DONE)

    async def _phase(self, phase: SwitchPhase, work: Callable[[], Awaitable[None]]) -> None:
        if phase is not SwitchPhase.RELEASE and self._cancelled:
            raise SwitchCancelledError("cancelled on request")
        started_s = self.host.now_s()
        if phase is not SwitchPhase.COMMIT:  # that phase is announced when it is a fact
            self._update(phase=phase)
        self.host.failpoint(f"before_{phase}")
        await work()
        self.host.failpoint(f"after_{phase}")
        elapsed_s = self.host.now_s() - started_s
        self._update(phase_s=(*self.ticket.phase_s, (phase.value, elapsed_s)))

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
        self._endpoints = await build_ranks(call, self.host.spec, self.coming, nonce, False)

    async def _transfer(self, moved: _Moved) -> None:
        await self._move_weights()
        if not self.leaving:
            return
        self.host.hold(r.replica_id for r in self.leaving)
        self._paused_at_s = self.host.now_s()
        sequences = await self._quiesce()
        await self._import(sequences, moved)
        moved.kv_replies = await await_all(
            self.host.call(d, MoveKv, moves=moved.kv) for d in _ends(moved.kv)
        )

    async def _move_weights(self) -> None:
        replica_on = {
            d: r.replica_id for r in self.plan.target.replicas for d in r.placement.devices
        }
        transfers = list(self.plan.transfers)
        receivers = [replica_on[t.dst] for t in transfers]
        replies = await await_all(
            self.host.call(d, MoveWeights, transfers=transfers, dst_replicas=receivers)
            for d in _ends(transfers)
        )
        check_sums(replies, "weight")
        await bind_ranks(self.host.call, self.coming)
        self._update(weight_bytes=self.plan.weight_bytes)

    async def _quiesce(self) -> list[tuple[Replica, SequenceState]]:
        replies = await await_all(
            self.host.call(_leader(r), Quiesce, replica_id=r.replica_id) for r in self.leaving
        )
        return [
            (replica, state)
            for replica, reply in zip(self.leaving, replies, strict=True)
            for state in reply.sequences
        ]

    async def _import(self, sequences: list[tuple[Replica, SequenceState]], moved: _Moved) -> None:
        """Choose a new replica for every sequence, reserve blocks, list the copies."""
        chosen = self._choose(state for _, state in sequences)
        for replica in self.plan.target.replicas:
            mine = [
                (old, state)
                for (old, state), target in zip(sequences, chosen, strict=True)
                if target == replica.replica_id
            ]
            await self._import_into(replica, mine, moved)
        block_size, model = self.host.spec.block_size, self.host.spec.model
        self._update(
            kv_bytes=sum(kv_move_bytes(model, m, block_size) for m in moved.kv),
            num_recomputed=sum(len(states) for states in moved.recompute.values()),
            num_migrated=len(moved.owner) - sum(len(s) for s in moved.recompute.values()),
        )

    async def _import_into(
        self, target: Replica, mine: list[tuple[Replica, SequenceState]], moved: _Moved
    ) -> None:
        model, kv = self.host.spec.model, self.plan.kv
        per_token = model.kv_bytes_per_token(model.num_layers, model.num_kv_heads)
        migrate, recompute = [], []
        for old, state in mine:
            moved.owner[state.request_id] = target.replica_id
            computed = state.num_computed_tokens
            bound = bind_sequence(
                kv, state.request_id, computed, computed * per_token, True, 1 << 30
            )
            if bound.binding is Binding.MIGRATE:
                migrate.append((old, state))
            else:
                recompute.append(state)
        if migrate:
            reply = await self.host.call(
                _leader(target),
                ImportSequences,
                replica_id=target.replica_id,
                sequences=[state for _, state in migrate],
            )
            to_fill = set(reply.blocks_to_fill)
            for (old, state), table in zip(migrate, reply.block_tables, strict=True):
                if table:
                    src_blocks, dst_blocks = take_copies(state.block_table, table, to_fill)
                    moved.kv += kv_moves(model, old, target, src_blocks, dst_blocks)
                else:
                    recompute.append(state)
        if mine:
            moved.recompute[target.replica_id] = recompute

    def _choose(self, states: Iterable[SequenceState]) -> list[int]:
        """The router's rule without weights, over the new deployment."""
        outstanding = {
            r.replica_id: 0 if r in self.coming else self.host.num_outstanding(r.replica_id)
            for r in self.plan.target.replicas
        }
        chosen = []
        for state in states:
            loads = [
                load_of(self.host.spec, r, outstanding[r.replica_id])
                for r in self.plan.target.replicas
            ]
            prompt = len(state.prompt_token_ids)
            target = pick(Routing(()), loads, prompt, prompt + len(state.output_token_ids))
            assert target is not None, "every replica holds max_model_len tokens"
            outstanding[target] += 1
            chosen.append(target)
        return chosen

    async def _verify(self, moved: _Moved) -> None:
        """KV arrived as it left, and the new ranks answer: activate them, followers first. They
        have nothing to run before commit. (Weights were checked before they were bound.)"""
        check_sums(moved.kv_replies, "KV")
        await activate_ranks(self.host.call, self.coming, self._endpoints)

    async def _commit(self, moved: _Moved) -> None:
        self.host.commit(self.plan.target, moved.owner)
        self._update(phase=SwitchPhase.COMMIT)
        for replica in self.plan.target.replicas:
            if replica.replica_id in moved.recompute:
                recompute = moved.recompute[replica.replica_id]
                try:
                    await self.host.call(
                        _leader(replica),
                        AdoptSequences,
                        replica_id=replica.replica_id,
                        recompute=recompute,
                    )
                except UnavailableError:  # its loss is noticed apart and its requests requeued
                    logger.exception("replica %d did not adopt", replica.replica_id)
        self.host.abort_ended(moved.owner)
        self._end_pause()

    async def _release(self) -> None:
        await await_all(
            self.host.call(d, ReleaseRank, replica_id=r.replica_id)
            for r in self.leaving
            for d in r.placement.devices
        )
        await await_all(self.host.call(d, CloseTransfer) for d in self.devices)

    async def _roll_back(self, error: Exception) -> None:
        logger.warning("switch %s rolled back: %s", self.ticket.ticket_id, error)
        calls: list[Awaitable[Reply]] = [
            self.host.call(d, ReleaseRank, replica_id=r.replica_id)
            for r in self.coming
            for d in r.placement.devices
        ]
        calls += [
            self.host.call(_leader(r), Resume, replica_id=r.replica_id) for r in self._old.replicas
        ]
        await asyncio.gather(*calls, return_exceptions=True)
        closed = (self.host.call(d, CloseTransfer) for d in self.devices)
        await asyncio.gather(*closed, return_exceptions=True)
        self.host.unhold()
        self._end_pause()
        cancelled = isinstance(error, SwitchCancelledError)
        self._update(
            phase=SwitchPhase.CANCELLED if cancelled else SwitchPhase.ROLLED_BACK,
            reason=str(error) or type(error).__name__,
        )

    def _end_pause(self) -> None:
        if self._paused_at_s is not None:
            self._update(pause_s=self.host.now_s() - self._paused_at_s)
            self._paused_at_s = None


def check_sums(replies: Sequence[Reply], what: str) -> None:
    """Every slice must have left its source and reached its target with the same CRC."""
    seen: dict[int, int] = {}
    for reply in replies:
        for index, crc in reply.checksums:
            if seen.setdefault(index, crc) != crc:
                raise UnavailableError(f"{what} transfer {index} arrived with a wrong checksum")


def _leader(replica: Replica) -> int:
    return replica.placement.devices[0]


def _ends(moves: Sequence[Any]) -> list[int]:
    return sorted({m.src for m in moves} | {m.dst for m in moves})
