"""A surrogate whose equal replicas hand running requests to one another, as Llumnix's do. Pure.

Llumnix (arXiv 2406.03243) copies a request's keys and values while it decodes, and stops it only
for the last few: about as long as one step, whatever its length. Here a request that moves loses
the step that it is in, and is in its new place at once; the links are not charged for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.surrogate import kernel
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.layout import NONE, RUNNING, WAITING

EVERY_S = 1.0


class RebalancingCluster(SurrogateCluster):
    """Once a second, while no switch is in flight, one running request goes from each replica that
    is nearly full to one that is far from it: the fullest to the emptiest, and so on."""

    full, empty = 100.0, 300.0  # below and above that `freeness`

    def advance(self, until_s: float) -> None:
        while (due_s := EVERY_S * (self._now_s // EVERY_S + 1.0)) <= until_s:
            super().advance(due_s)
            if self._switch is None:
                self._rebalance()
        super().advance(until_s)

    def _rebalance(self) -> None:
        rows = [self.rows.of(r) for r in self._deployment.replicas]
        ordered = sorted(rows, key=self.freeness)
        for full, empty in zip(ordered, reversed(ordered), strict=True):
            if self.freeness(full) >= self.full or self.freeness(empty) <= self.empty:
                return
            slot = self._choose(full)
            if slot is not None and self._fits(slot, empty):
                self._move(slot, full, empty)

    def freeness(self, row: int) -> float:
        """Steps until a replica's blocks are all taken, with those counted as taken that the first
        in its queue asks for; below 0 when it can't have them, or no place in the batch."""
        state = self.state
        running, waiting = state.lists[row, RUNNING], state.lists[row, WAITING]
        free = int(state.replicas[row]["free_blocks"])
        if waiting["head"] != NONE:
            if running["count"] >= self.spec.max_num_seqs:
                return -1.0
            first = state.seqs[waiting["head"]]
            free -= self._blocks(int(first["prompt_tokens"] + first["output_tokens"]))
        return self.spec.block_size * free / max(1, int(running["count"]))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_size)

    def _choose(self, row: int) -> int | None:
        """The running request with the least context that has made a token, and whose step has
        others in it."""
        state = self.state
        slots = np.array(state.linked(row, RUNNING), np.int64)
        seqs: Any = state.seqs[slots]
        movable = (seqs["output_tokens"] > 0) & (seqs["copied_blocks"] == 0)
        steps = map(self._items, self._batches(row))
        movable &= ~np.isin(slots, [items[0] for items in steps if len(items) == 1])
        if not movable.any():
            return None
        context = np.where(movable, seqs["computed_tokens"], np.iinfo(np.int64).max)
        return int(slots[context.argmin()])

    def _batches(self, row: int) -> list[Any]:
        replica = self.state.replicas[row]
        first, depth = int(replica["first_batch"]), int(replica["depth"])
        numbers = [(first + i) % depth for i in range(int(replica["num_batches"]))]
        return [self.state.batches[row, number] for number in numbers]

    def _items(self, batch: Any) -> list[int]:
        found, slot = [], int(batch["head"])
        while slot != NONE:
            found.append(slot)
            slot = int(self.state.seqs["next_in_batch"][slot])
        return found

    def _fits(self, slot: int, row: int) -> bool:
        needed = self._blocks(int(self.state.seqs["computed_tokens"][slot]))
        return needed <= int(self.state.replicas[row]["free_blocks"])

    def _move(self, slot: int, source: int, target: int) -> None:
        state, seqs = self.state, self.state.seqs
        for batch in self._batches(source):
            items = self._items(batch)
            if slot in items:
                items.remove(slot)
                batch["head"] = items[0]
                seqs["next_in_batch"][items] = [*items[1:], NONE]
        replica = state.replicas[source]
        kernel.remove(seqs, state.lists[source, RUNNING], slot)
        replica["free_blocks"] += seqs["blocks"][slot]
        replica["num_outstanding"] -= 1
        seqs["in_flight_tokens"][slot] = 0
        seqs["blocks"][slot] = self._blocks(int(seqs["computed_tokens"][slot]))
        seqs["num_moves"][slot] += 1
        state.replicas[target]["free_blocks"] -= seqs["blocks"][slot]
        state.wake(source, self._now_s)
        work_s = state.work_time(self._now_s)
        kernel.adopt(seqs, state.replicas, state.lists, state.counts[0], slot, target, work_s)
