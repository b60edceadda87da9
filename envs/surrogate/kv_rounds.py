"""Sequences of the surrogate on their way between replicas, copied while they run. Pure.

The rules are those of `engine.migration.sequences.SequenceMove`, of `engine.migration.binding` and
of the blocks kept for sequences at either end (`engine.migration.arrivals`), but that no two
sequences share a block. A test holds both equal.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from engine.cluster import Binding, Replica, SwitchPlan
from engine.migration.binding import NEVER
from engine.migration.kv import link_loads
from engine.migration.schedule import Links
from envs.surrogate import kernel
from envs.surrogate.phases import choose_rows

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster

Loads = tuple[tuple[int, int, int], ...]
Slots = NDArray[np.int64]
MOVE = np.dtype(  # of a sequence
    [
        ("key", "i8"),  # its index: slots are used again
        ("slot", "i8"),  # when it was last seen
        ("round", "i8"),  # in which that was
        ("row", "i8"),  # its new one
        ("binding", "i8"),
        ("drain_s", "f8"),
        ("recompute_s", "f8"),
        ("kept", "i8"),  # blocks kept for it in its new row
        ("kept_number", "i8"),  # by when the first of them were
        ("copied", "i8"),  # tokens that have been sent there
        ("preemptions", "i8"),  # of it until then
    ]
)
NOT_BOUND, MIGRATE, RECOMPUTE, DRAIN = 0, 1, 2, 3
BINDINGS = (Binding.RECOMPUTE, Binding.MIGRATE, Binding.RECOMPUTE, Binding.DRAIN)
"""By number; what is not bound is computed anew, at no cost."""


class KvRounds:
    """The sequences of the replicas `leaving`, on their way to `plan.target`.

    A client's `max_tokens` is not part of a request here, so a sequence may generate up to the end
    of the model's context: that is what decides whether its end is waited for.
    """

    def __init__(self, plan: SwitchPlan, leaving: list[Replica]) -> None:
        self._plan, self._leaving = plan, leaving
        self.kv_bytes = 0  # across links, copied by the rounds so far
        self._moves = np.zeros(0, MOVE)  # by key, of all sequences seen so far
        self._round = self._num_kept = 0
        self._num_owned = 0  # that have a new row, of those still here after the last round
        self._recompute = np.zeros(0, np.int64)  # their places in `_moves`
        self._known_loads: dict[tuple[int, int], tuple[Loads, int]] = {}

    def copy(self) -> KvRounds:
        other = copy(self)
        other._moves = self._moves.copy()
        return other

    def reserved_blocks(self) -> dict[int, int]:
        """By row."""
        kept = self._moves[self._moves["kept"] > 0]
        rows = np.bincount(kept["row"], kept["kept"]).astype(np.int64)
        return {row: blocks for row, blocks in enumerate(rows.tolist()) if blocks}

    # ---------------------------------------------------------------- what a switch reports

    @property
    def num_recomputed(self) -> int:
        return len(self._recompute)

    @property
    def num_migrated(self) -> int:
        return self._num_owned - len(self._recompute)

    @property
    def num_drained(self) -> int:
        return len(self.draining)

    @property
    def draining(self) -> dict[int, float]:
        """Seconds until the end, at most, of those that were to end where they are."""
        found = self._moves[self._moves["binding"] == DRAIN]
        return dict(zip(found["key"].tolist(), found["drain_s"].tolist(), strict=True))

    # ---------------------------------------------------------------- a round

    def begin(self, host: SurrogateCluster, now_s: float, is_last: bool) -> Links:
        """Choose, bind and reserve. What goes over which link; it counts as copied."""
        looked = self._look(host)
        for replica, of_replica in looked:
            host.state.hold_copied(host.rows.of(replica), of_replica, now_s)
        slots = np.concatenate([of_replica for _, of_replica in looked])
        at = self._find(host, slots)
        self._num_owned = len(at) if is_last else len(self._moves)
        sources = np.repeat(np.arange(len(looked)), [len(of_replica) for _, of_replica in looked])
        kv, seqs, replicas = self._plan.kv, host.state.seqs, host.state.replicas
        loads, token_bytes = self._loads(host), np.zeros((len(looked), len(replicas)), np.int64)
        for place, (_, nbytes) in loads.items():
            token_bytes[place] = nbytes
        costs = float(kv.decode_step_s), float(kv.link_bytes_per_s), float(kv.prefill_tokens_per_s)
        here = at, seqs, slots, sources
        longest = NEVER if is_last else host.spec.model.max_model_len
        _bind(self._moves, *here, token_bytes, costs, longest, not is_last)
        sent, woken = np.zeros_like(token_bytes), np.zeros(len(replicas), np.bool_)
        size = host.spec.block_size
        self._recompute, self._num_kept = _reserve(
            self._moves, *here, replicas, size, sent, woken, self._round, self._num_kept
        )
        self._wake(host, woken, now_s)
        copies = Links()
        for source, row in zip(*(found.tolist() for found in np.nonzero(sent)), strict=True):
            tokens = int(sent[source, row]) * size
            for src, dst, per_token in loads[source, row][0]:
                copies[src, dst] += tokens * per_token
        self.kv_bytes += copies.total()
        return copies

    def _look(self, host: SurrogateCluster) -> list[tuple[Replica, Slots]]:
        """Slots on each replica that goes, by arrival."""
        found = [host.state.sequences_of(host.rows.of(r)) for r in self._leaving]
        return [(r, np.array(s, np.int64)) for r, s in zip(self._leaving, found, strict=True)]

    def _find(self, host: SurrogateCluster, slots: Slots) -> Slots:
        """Places of these in `_moves`, where those seen first are entered with a new row each."""
        keys = host.state.seqs["index"][slots]
        is_fresh = np.isin(keys, self._moves["key"], invert=True)
        if is_fresh.any():
            owned, target = self._moves["row"], self._plan.target.replicas
            fresh = np.zeros(int(is_fresh.sum()), MOVE)
            fresh["key"] = keys[is_fresh]
            fresh["row"] = choose_rows(host, target, owned, slots[is_fresh])
            moves = np.concatenate([self._moves, fresh])
            self._moves = moves[np.argsort(moves["key"])]
        at: Slots = np.searchsorted(self._moves["key"], keys)
        self._round += 1
        self._moves["slot"][at], self._moves["round"][at] = slots, self._round
        return at

    def _loads(self, host: SurrogateCluster) -> dict[tuple[int, int], tuple[Loads, int]]:
        """`link_loads` and the bytes of a token on all of them, by place in `_leaving` and new row;
        each found once."""
        if not self._known_loads:
            for i, source in enumerate(self._leaving):
                for target in self._plan.target.replicas:
                    links = link_loads(host.spec.model, source, target)
                    total = sum(nbytes for _, _, nbytes in links)
                    self._known_loads[i, host.rows.of(target)] = links, total
        return self._known_loads

    def binding(self, key: int) -> Binding:
        """What becomes of a sequence, by its index."""
        found = self._moves["binding"][self._moves["key"] == key].tolist()
        return BINDINGS[found[0] if found else NOT_BOUND]

    def _wake(self, host: SurrogateCluster, woken: NDArray[np.bool_], now_s: float) -> None:
        """Replicas that stay may have lacked the blocks that were given back."""
        for row in np.flatnonzero(woken).tolist():
            host.state.wake(row, now_s)

    # ---------------------------------------------------------------- the end

    def next_end_s(self, host: SurrogateCluster, now_s: float) -> float | None:
        """When a sequence may end that is waited for, at the earliest; None when all have."""
        keys = list(self.draining)
        seqs = host.state.seqs
        replicas = {r for r, s in self._look(host) if np.isin(seqs["index"][s], keys).any()}
        return min([host.state.next_end_s(host.rows.of(r), now_s) for r in replicas], default=None)

    def undo(self, host: SurrogateCluster, now_s: float) -> None:
        """Give back what was kept at either end."""
        woken = np.zeros(len(host.state.replicas), np.bool_)
        for place in np.flatnonzero(self._moves["kept"]).tolist():
            _give_back(self._moves[place], host.state.replicas, woken)
        self._wake(host, woken, now_s)
        for replica in self._leaving:
            row = host.rows.of(replica)
            host.state.hold_copied(row, [], now_s)
            host.state.seqs["copied_blocks"][host.state.sequences_of(row)] = 0

    def hand_over(self, host: SurrogateCluster, now_s: float) -> None:
        """After the last round, when the old rows are gone: what was copied runs on in its new row,
        the others wait there."""
        state = host.state
        work_s = state.work_time(now_s)
        kept = self._moves[self._moves["kept"] > 0]
        kept = kept[np.argsort(kept["kept_number"])]
        self._moves["kept"] = 0
        anew = self._moves[self._recompute]
        slots, rows = (np.concatenate([kept[name], anew[name]]) for name in ("slot", "row"))
        num = len(kept)
        state.seqs["blocks"][slots[:num]] = kept["kept"]
        state.seqs["blocks"][slots[num:]] = 0
        state.seqs["copied_blocks"][slots] = 0
        state.seqs["num_moves"][slots] += 1
        arrays = state.seqs, state.replicas, state.lists, state.counts[0]
        for slot, row in zip(slots[:num].tolist(), rows[:num].tolist(), strict=True):
            kernel.adopt(*arrays, slot, row, work_s)
        kernel.enqueue_all(*arrays, slots[num:], rows[num:], work_s)


# --------------------------------------------------------------------------------------
# Compiled


@numba.njit(cache=True, nogil=True)
def _bind(
    moves: Any,
    at: Any,
    seqs: Any,
    slots: Any,
    sources: Any,
    token_bytes: Any,
    costs: Any,
    longest: int,
    may_drain: bool,
) -> None:
    """`bind_sequence` for the sequences slots[N], whose moves are moves[at], unless they are
    settled. They come from sources[N]; token_bytes[source, row] of KV cross links. None generates
    tokens past `longest`, or, where it may not drain, just so many more."""
    decode_step_s, link_bytes_per_s, prefill_tokens_per_s = costs
    for i in range(len(at)):
        move, seq = moves[at[i]], seqs[slots[i]]
        if move.binding == MIGRATE or (move.binding == RECOMPUTE and move.recompute_s > 0.0):
            continue
        if move.binding == DRAIN and may_drain:
            continue
        computed = seq.computed_tokens
        if computed == 0:
            move.binding = NOT_BOUND
            continue
        remaining = longest - seq.prompt_tokens - seq.output_tokens if may_drain else longest
        drain_s = remaining * decode_step_s
        migrate_s = computed * token_bytes[sources[i], move.row] / link_bytes_per_s
        recompute_s = computed / prefill_tokens_per_s
        move.drain_s, move.recompute_s = drain_s, recompute_s
        if migrate_s <= min(recompute_s, drain_s):
            move.binding = MIGRATE
        else:
            move.binding = RECOMPUTE if recompute_s <= drain_s else DRAIN


@numba.njit(cache=True, nogil=True)
def _give_back(move: Any, replicas: Any, woken: Any) -> None:
    replicas[move.row].free_blocks += move.kept
    woken[move.row] |= move.kept > 0
    move.kept = 0


@numba.njit(cache=True, nogil=True)
def _reserve(
    moves: Any,
    at: Any,
    seqs: Any,
    slots: Any,
    sources: Any,
    replicas: Any,
    size: int,
    sent: Any,
    woken: Any,
    number: int,
    num_kept: int,
) -> Any:
    """Keep blocks of `size` tokens for what has been computed of those that migrate, and give back
    those of all others. sent[source, row] are the blocks to send: whole ones always, since what
    came into one after it was sent is not there; for lack of room a sequence is computed anew. The
    places of these, and `num_kept` as it is then."""
    for k in range(len(moves)):
        if moves[k].kept and (moves[k].round != number or moves[k].binding != MIGRATE):
            _give_back(moves[k], replicas, woken)
    anew, count = np.empty(len(at), np.int64), 0
    for i in range(len(at)):
        if moves[at[i]].binding == NOT_BOUND or moves[at[i]].binding == RECOMPUTE:
            anew[count] = at[i]
            count += 1
    for i in range(len(at)):
        move, seq = moves[at[i]], seqs[slots[i]]
        if move.binding != MIGRATE:
            continue
        if move.kept and move.preemptions != seq.num_preemptions:
            _give_back(move, replicas, woken)  # all of it comes anew
        computed = seq.computed_tokens
        needed = (computed + size - 1) // size
        missing = needed - move.kept
        if needed == 0 or missing > max(0, replicas[move.row].free_blocks):
            _give_back(move, replicas, woken)
            move.binding = RECOMPUTE
            anew[count] = at[i]
            count += 1
            continue
        if move.kept == 0:
            move.kept_number, move.copied = num_kept, 0
            move.preemptions = seq.num_preemptions
            num_kept += 1
        replicas[move.row].free_blocks -= missing
        if computed > move.copied:
            sent[sources[i], move.row] += needed - move.copied // size
            move.copied = computed
        move.kept = needed
    return anew[:count], num_kept
