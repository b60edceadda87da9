"""Sequences of the surrogate on their way between replicas, copied while they run. Pure.

The rules are those of `engine.migration.sequences.SequenceMove` and of the blocks kept for it at
either end (`engine.migration.arrivals`), but that no two sequences share a block. A test holds both
equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Binding, BoundSequence, ModelSpec, Replica, SwitchPlan
from engine.migration.binding import NEVER, bind_sequence, is_settled
from engine.migration.kv import link_loads
from engine.migration.schedule import Links
from envs.surrogate import kernel
from envs.surrogate.phases import choose_rows

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster

Loads = tuple[tuple[int, int, int], ...]
Slots = NDArray[np.int64]


class Here(NamedTuple):
    """A sequence on a replica that goes, as it stands when a round begins, with something computed
    then or before."""

    key: int  # its index: slots are used again
    slot: int
    source: Replica
    tokens: int  # prompt and output
    computed: int
    num_preemptions: int


class Kept(NamedTuple):
    """Blocks kept for a sequence in its new row."""

    row: int
    blocks: int
    copied: int  # tokens that have been sent there
    num_preemptions: int


class KvRounds:
    """The sequences of the replicas `leaving`, on their way to `plan.target`.

    A client's `max_tokens` is not part of a request here, so a sequence may generate up to the end
    of the model's context: that is what decides whether its end is waited for.
    """

    def __init__(self, plan: SwitchPlan, leaving: list[Replica]) -> None:
        self._plan, self._leaving = plan, leaving
        self.kv_bytes = 0  # across links, copied by the rounds so far
        self._owner: dict[int, int] = {}  # key -> new row
        self._bound: dict[int, BoundSequence] = {}  # others are computed anew, at no cost
        self._kept: dict[int, Kept] = {}
        self._slots: dict[int, int] = {}  # of those seen by the last round
        self._recompute: list[int] = []  # keys
        self._known_loads: dict[tuple[int, int], tuple[Loads, int]] = {}  # by replica ids

    def copy(self) -> KvRounds:
        other = copy(self)
        other._owner, other._bound = self._owner.copy(), self._bound.copy()
        other._kept = self._kept.copy()
        return other

    def reserved_blocks(self) -> dict[int, int]:
        """By row."""
        reserved: dict[int, int] = {}
        for kept in self._kept.values():
            reserved[kept.row] = reserved.get(kept.row, 0) + kept.blocks
        return reserved

    # ---------------------------------------------------------------- what a switch reports

    @property
    def num_recomputed(self) -> int:
        return len(self._recompute)

    @property
    def num_migrated(self) -> int:
        return len(self._owner) - len(self._recompute)

    @property
    def num_drained(self) -> int:
        return len(self.draining)

    @property
    def draining(self) -> dict[int, float]:
        """Seconds until the end, at most, of those that were to end where they are."""
        return {
            key: bound.drain_s or 0.0
            for key, bound in self._bound.items()
            if bound.binding is Binding.DRAIN
        }

    # ---------------------------------------------------------------- a round

    def begin(self, host: SurrogateCluster, now_s: float, is_last: bool) -> Links:
        """Choose, bind and reserve. What goes over which link; it counts as copied."""
        looked = self._look(host)
        slots = np.concatenate([of_replica for _, of_replica in looked])
        keys = host.state.seqs["index"][slots].tolist()
        self._slots = dict(zip(keys, slots.tolist(), strict=True))
        for replica, of_replica in looked:
            host.state.hold_copied(host.rows.of(replica), of_replica, now_s)
        fresh = [i for i, key in enumerate(keys) if key not in self._owner]
        chosen = choose_rows(host, self._plan.target.replicas, self._owner.values(), slots[fresh])
        self._owner |= {keys[i]: row for i, row in zip(fresh, chosen, strict=True)}
        targets = {host.rows.of(r): r for r in self._plan.target.replicas}
        here = [h for replica, of_replica in looked for h in self._here(host, replica, of_replica)]
        for h in here:
            self._bind(host, h, targets[self._owner[h.key]], may_drain=not is_last)
        if is_last:
            self._owner = {key: self._owner[key] for key in keys}
        return self._reserve(host, keys, here, targets, now_s)

    def _look(self, host: SurrogateCluster) -> list[tuple[Replica, Slots]]:
        """Slots on each replica that goes, by arrival."""
        found = [host.state.sequences_of(host.rows.of(r)) for r in self._leaving]
        return [(r, np.array(s, np.int64)) for r, s in zip(self._leaving, found, strict=True)]

    def _here(self, host: SurrogateCluster, replica: Replica, slots: Slots) -> Iterator[Here]:
        """In the order of `slots`. Most of a long queue has nothing computed, and is not among
        them."""
        found = host.state.seqs[slots]
        is_among = found["computed_tokens"] > 0
        if self._bound:
            is_among |= np.isin(found["index"], list(self._bound))
        found, slots = found[is_among], slots[is_among]
        tokens = (found["prompt_tokens"] + found["output_tokens"]).tolist()
        computed, lost = found["computed_tokens"].tolist(), found["num_preemptions"].tolist()
        for i, key in enumerate(found["index"].tolist()):
            yield Here(key, int(slots[i]), replica, tokens[i], computed[i], lost[i])

    def _bind(self, host: SurrogateCluster, h: Here, target: Replica, may_drain: bool) -> None:
        if is_settled(self._bound.get(h.key), may_drain):
            return
        if not h.computed:
            self._bound.pop(h.key, None)
            return
        model = host.spec.model
        _, per_token = self._loads(model, h.source, target)
        self._bound[h.key] = bind_sequence(
            self._plan.kv,
            "",
            h.computed,
            h.computed * per_token,
            True,
            model.max_model_len - h.tokens if may_drain else NEVER,
        )

    def _loads(self, model: ModelSpec, source: Replica, target: Replica) -> tuple[Loads, int]:
        """`link_loads`, found once, and the bytes of a token on all of them."""
        ids = source.replica_id, target.replica_id
        known = self._known_loads.get(ids)
        if known is None:
            loads = link_loads(model, source, target)
            known = self._known_loads[ids] = loads, sum(nbytes for _, _, nbytes in loads)
        return known

    def _reserve(
        self,
        host: SurrogateCluster,
        keys: list[int],
        here: list[Here],
        targets: dict[int, Replica],
        now_s: float,
    ) -> Links:
        """Blocks for those that migrate, and the copies that fill them."""
        migrate = [h for h in here if self.binding(h.key) is Binding.MIGRATE]
        for key in self._kept.keys() - {h.key for h in migrate}:
            self._give_back(host, key, now_s)
        self._recompute = [key for key in keys if self.binding(key) is Binding.RECOMPUTE]
        sent: Counter[tuple[int, int]] = Counter()  # blocks, by replica id and new row
        for h in migrate:
            row = self._owner[h.key]
            num_blocks = self._extend(host, h, row, now_s)
            if num_blocks is None:
                self._start_over(h.key)
            elif num_blocks:
                sent[h.source.replica_id, row] += num_blocks
        copies, sources = Links(), {r.replica_id: r for r in self._leaving}
        for (source, row), num_blocks in sent.items():
            tokens = num_blocks * host.spec.block_size
            loads, _ = self._loads(host.spec.model, sources[source], targets[row])
            for src, dst, per_token in loads:
                copies[src, dst] += tokens * per_token
        self.kv_bytes += copies.total()
        return copies

    def binding(self, key: int) -> Binding:
        """What becomes of a sequence, by its index."""
        bound = self._bound.get(key)
        return Binding.RECOMPUTE if bound is None else bound.binding

    def _extend(self, host: SurrogateCluster, h: Here, row: int, now_s: float) -> int | None:
        """Keep blocks for what has been computed. How many have to be sent, whole ones always,
        since what came into one after it was sent is not there; None without room."""
        size, free = host.spec.block_size, host.state.replicas["free_blocks"]
        kept = self._kept.get(h.key)
        if kept is not None and kept.num_preemptions != h.num_preemptions:
            self._give_back(host, h.key, now_s)  # all of it comes anew
            kept = None
        kept = kept or Kept(row, 0, 0, h.num_preemptions)
        needed = -(-h.computed // size)
        missing = needed - kept.blocks
        if not needed or missing > max(0, free[row]):
            self._give_back(host, h.key, now_s)
            return None
        free[row] -= missing
        self._kept[h.key] = Kept(row, needed, h.computed, h.num_preemptions)
        return needed - kept.copied // size if h.computed > kept.copied else 0

    def _start_over(self, key: int) -> None:
        """There is no room for its blocks, or nothing in them any more."""
        self._recompute.append(key)
        bound = self._bound[key]
        self._bound[key] = BoundSequence(
            bound.request_id, Binding.RECOMPUTE, bound.drain_s, None, bound.recompute_s
        )

    def _give_back(self, host: SurrogateCluster, key: int, now_s: float) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            host.state.replicas[kept.row]["free_blocks"] += kept.blocks
            host.state.wake(kept.row, now_s)  # a replica that stays may have lacked them

    # ---------------------------------------------------------------- the end

    def next_end_s(self, host: SurrogateCluster, now_s: float) -> float | None:
        """When a sequence may end that is waited for, at the earliest; None when all have."""
        draining = self.draining
        keys = list(draining)
        seqs = host.state.seqs
        replicas = {r for r, s in self._look(host) if np.isin(seqs["index"][s], keys).any()}
        return min([host.state.next_end_s(host.rows.of(r), now_s) for r in replicas], default=None)

    def undo(self, host: SurrogateCluster, now_s: float) -> None:
        """Give back what was kept at either end."""
        for key in list(self._kept):
            self._give_back(host, key, now_s)
        for replica in self._leaving:
            row = host.rows.of(replica)
            host.state.hold_copied(row, [], now_s)
            host.state.seqs["copied_blocks"][host.state.sequences_of(row)] = 0

    def hand_over(self, host: SurrogateCluster, now_s: float) -> None:
        """After the last round, when the old rows are gone: what was copied runs on in its new row,
        the others wait there."""
        state = host.state
        kept, self._kept = self._kept, {}
        work_s = state.work_time(now_s)
        keys = [*kept, *self._recompute]
        slots = np.array([self._slots[key] for key in keys], np.int64)
        rows = np.array([self._owner[key] for key in keys], np.int64)
        num = len(kept)
        state.seqs["blocks"][slots[:num]] = [k.blocks for k in kept.values()]
        state.seqs["blocks"][slots[num:]] = 0
        state.seqs["copied_blocks"][slots] = 0
        state.seqs["num_moves"][slots] += 1
        arrays = state.seqs, state.replicas, state.lists, state.counts[0]
        for slot, row in zip(slots[:num].tolist(), rows[:num].tolist(), strict=True):
            kernel.adopt(*arrays, slot, row, work_s)
        kernel.enqueue_all(*arrays, slots[num:], rows[num:], work_s)
