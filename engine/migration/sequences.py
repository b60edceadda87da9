"""Takes running requests from the replicas that go to those that come, while they run.

KV only grows: what was copied stays valid, so each round copies what has come since the one
before, and only the last is made while the sequences stand still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from engine.cluster import DISK, Binding, BoundSequence, Replica, Routing, SwitchPlan, Transfer
from engine.errors import UnavailableError
from engine.messages import (
    ImportSequences,
    KvMove,
    MoveKv,
    Quiesce,
    Reply,
    SequenceState,
    TakeSequences,
)
from engine.migration.binding import NEVER, bind_sequence, is_settled
from engine.migration.host import SwitchHost
from engine.migration.kv import FilledBlocks, kv_move_bytes, kv_moves, link_bytes_per_token
from engine.rank_calls import await_all
from engine.router import load_of, pick

MAX_MOVE_BYTES = 8 << 20  # of one copy: bounds the staging memory
Here = tuple[Replica, SequenceState]  # a sequence and the replica it is on


class SequenceMove:
    """The requests of the replicas `leaving`, on their way to `plan.target`.

    `owner` is the new replica of each, `bindings` says what becomes of it and why, `recompute`
    those that start over from their tokens, by new replica: settled by the last round.
    """

    def __init__(
        self, host: SwitchHost, plan: SwitchPlan, leaving: list[Replica], coming: list[Replica]
    ) -> None:
        self._host, self._plan = host, plan
        self._leaving, self._coming = leaving, coming
        self.owner: dict[str, int] = {}
        self.bindings: dict[str, BoundSequence] = {}
        self.recompute: dict[int, list[SequenceState]] = {}
        self.moved_bytes = 0  # across links, as the senders counted
        self.kv_bytes = 0  # the same, as the copies add up
        size = host.spec.block_size
        self._filled = {r.replica_id: FilledBlocks(size) for r in plan.target.replicas}
        self._reserved: set[int] = set()  # new replicas that hold blocks for some of them

    def num_bound(self, binding: Binding) -> int:
        return sum(bound.binding is binding for bound in self.bindings.values())

    @property
    def draining(self) -> dict[str, float]:
        """Seconds until the end, at most, of those that were to end where they are."""
        return {
            key: bound.drain_s or 0.0
            for key, bound in self.bindings.items()
            if bound.binding is Binding.DRAIN
        }

    def as_reported(self) -> tuple[BoundSequence, ...]:
        """All bindings, under the callers' request ids."""
        name = self._host.request_id_of
        return tuple(replace(b, request_id=name(key)) for key, b in self.bindings.items())

    async def copy(self, is_last: bool) -> None:
        """One round. In the last one the sequences stop first, at a step boundary."""
        kind = Quiesce if is_last else TakeSequences
        replies = await await_all(
            self._host.call(_leader(r), kind, replica_id=r.replica_id) for r in self._leaving
        )
        here = [
            (replica, state)
            for replica, reply in zip(self._leaving, replies, strict=True)
            for state in reply.sequences
        ]
        self._choose(state for _, state in here)
        self._bind(here, may_drain=not is_last)
        if is_last:
            present = {state.request_id for _, state in here}
            self.owner = {key: to for key, to in self.owner.items() if key in present}
        self.recompute = {}
        by_target: dict[int, list[Here]] = {id_: [] for id_ in self._reserved}
        for replica, state in here:
            by_target.setdefault(self.owner[state.request_id], []).append((replica, state))
        moves = await await_all(
            self._reserve(self._plan.target.replica(id_), mine) for id_, mine in by_target.items()
        )
        await self._move(list(chain.from_iterable(moves)), is_last)

    # ---------------------------------------------------------------- where, and how

    def _choose(self, states: Iterable[SequenceState]) -> None:
        """A new replica for each that has none."""
        replicas = self._plan.target.replicas
        self.owner |= choose_replicas(self._host, replicas, self._coming, self.owner, states)

    def _bind(self, here: Sequence[Here], may_drain: bool) -> None:
        """Those that are not settled. A block that several of them share is charged to the first,
        and to none where one that is to be moved holds it."""
        bound = self.bindings
        fresh = [h for h in here if not is_settled(bound.get(h[1].request_id), may_drain)]
        charged: set[tuple[int, int]] = set()
        if any(state.num_computed_tokens for _, state in fresh):
            keys = {state.request_id for _, state in fresh}
            charged = {
                (replica.replica_id, block)
                for replica, state in here
                if state.request_id not in keys
                and bound[state.request_id].binding is Binding.MIGRATE
                for block in state.block_table
            }
        for replica, state in fresh:
            num_tokens = self._num_own_tokens(replica, state, charged)
            bound[state.request_id] = self._cheapest(replica, state, num_tokens, may_drain)

    def _num_own_tokens(
        self, replica: Replica, state: SequenceState, charged: set[tuple[int, int]]
    ) -> int:
        """Tokens in the cache whose blocks are not `charged` yet; now they are."""
        size, computed = self._host.spec.block_size, state.num_computed_tokens
        total = 0
        for index, block in enumerate(state.block_table):
            if (replica.replica_id, block) not in charged:
                charged.add((replica.replica_id, block))
                total += max(0, min(size, computed - index * size))
        return total

    def _cheapest(
        self, replica: Replica, state: SequenceState, num_tokens: int, may_drain: bool
    ) -> BoundSequence:
        spec, target = self._host.spec, self._plan.target.replica(self.owner[state.request_id])
        room = spec.model.max_model_len - len(state.prompt_token_ids)
        remaining = min(state.params.max_tokens, room) - len(state.output_token_ids)
        return bind_sequence(
            self._plan.kv,
            state.request_id,
            state.num_computed_tokens,
            num_tokens * link_bytes_per_token(spec.model, replica, target),
            True,
            remaining if may_drain else NEVER,
        )

    # ---------------------------------------------------------------- blocks and bytes

    async def _reserve(self, target: Replica, mine: list[Here]) -> list[KvMove]:
        """Blocks at `target` for those that migrate; the copies that fill them."""
        by_binding = {binding: list[Here]() for binding in Binding}
        for replica, state in mine:
            by_binding[self.bindings[state.request_id].binding].append((replica, state))
        migrate = by_binding[Binding.MIGRATE]
        self.recompute[target.replica_id] = [s for _, s in by_binding[Binding.RECOMPUTE]]
        reply: Reply = await self._host.call(
            _leader(target),
            ImportSequences,
            replica_id=target.replica_id,
            sequences=[state for _, state in migrate],
        )
        self._reserved.add(target.replica_id)
        filled = self._filled[target.replica_id]
        filled.expect(reply.blocks_to_fill)
        copies: dict[Replica, tuple[list[int], list[int]]] = {}
        for (replica, state), table in zip(migrate, reply.block_tables, strict=True):
            if not table:
                self._start_over(target, state)
                continue
            src, dst = filled.take_copies(state.block_table, table, state.num_computed_tokens)
            all_src, all_dst = copies.setdefault(replica, ([], []))
            all_src += src
            all_dst += dst
        return [
            move
            for replica, (src, dst) in copies.items()
            for move in self._moves(replica, target, src, dst)
        ]

    def _start_over(self, target: Replica, state: SequenceState) -> None:
        """There is no room for its blocks."""
        self.recompute[target.replica_id].append(state)
        bound = self.bindings[state.request_id]
        self.bindings[state.request_id] = replace(bound, binding=Binding.RECOMPUTE, migrate_s=None)

    def _moves(
        self, src: Replica, dst: Replica, src_blocks: list[int], dst_blocks: list[int]
    ) -> Iterator[KvMove]:
        spec = self._host.spec
        per_block = spec.block_size * spec.model.kv_bytes_per_token(
            spec.model.num_layers, spec.model.num_kv_heads
        )
        step = max(1, MAX_MOVE_BYTES // per_block)
        for at in range(0, len(src_blocks), step):
            part = slice(at, at + step)
            yield from kv_moves(spec.model, src, dst, src_blocks[part], dst_blocks[part])

    async def _move(self, moves: Sequence[KvMove], is_last: bool) -> None:
        spec = self._host.spec
        replies = await await_all(
            self._host.call(device, MoveKv, moves=moves, is_last=is_last)
            for device in ends_of(moves)
        )
        check_sums(replies, "KV")
        self.kv_bytes += sum(kv_move_bytes(spec.model, m, spec.block_size) for m in moves)
        self.moved_bytes += sum(reply.sent_bytes for reply in replies)


def choose_replicas(
    host: SwitchHost,
    replicas: Sequence[Replica],
    coming: Sequence[Replica],
    owner: Mapping[str, int],
    states: Iterable[SequenceState],
) -> dict[str, int]:
    """A replica for each sequence that has none in `owner`: the router's rule without weights."""
    outstanding = {
        r.replica_id: 0 if r in coming else host.num_outstanding(r.replica_id) for r in replicas
    }
    for replica_id in owner.values():
        outstanding[replica_id] += 1
    chosen: dict[str, int] = {}
    for state in states:
        if state.request_id in owner:
            continue
        loads = [load_of(host.spec, r, outstanding[r.replica_id]) for r in replicas]
        prompt = len(state.prompt_token_ids)
        target = pick(Routing(()), loads, prompt, prompt + len(state.output_token_ids))
        assert target is not None, "every replica holds max_model_len tokens"
        outstanding[target] += 1
        chosen[state.request_id] = target
    return chosen


def check_sums(replies: Iterable[Reply], what: str) -> None:
    """Every slice must have left its source and reached its target with the same CRC."""
    seen: dict[int, int] = {}
    for reply in replies:
        for index, value in reply.checksums:
            if seen.setdefault(index, value) != value:
                raise UnavailableError(f"{what} transfer {index} arrived with a wrong checksum")


def ends_of(moves: Iterable[KvMove | Transfer]) -> list[int]:
    """Devices that send or receive."""
    return sorted({device for m in moves for device in (m.src, m.dst)} - {DISK})


def _leader(replica: Replica) -> int:
    return replica.placement.devices[0]
