"""The arrays that the surrogate kernel works on, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

import numba
import numpy as np
from numpy.typing import ArrayLike

from engine.cluster import ClusterSpec, ParallelConfig, Replica, ReplicaStats, Request
from engine.profile import Crowding
from envs.surrogate import kernel, layout
from envs.surrogate.layout import FAILED, IN_RUNNING, IN_WAITING, NONE, RUNNING, WAITING
from envs.surrogate.record import Records, Slots
from policies.base import LengthSampler

FIRST_SLOTS = 256
ARRAYS = (
    "seqs", "replicas", "lists", "batches", "limits", "counts", "clock", "ended", "trace"
)  # fmt: skip
LOOK_S = 1e-6  # so late may it be noticed that a step has begun, or has ended on shared cores


def new_records(
    arrival_s: ArrayLike, prompt_tokens: ArrayLike, target_tokens: ArrayLike
) -> Records:
    """Records of requests that have not arrived yet."""
    records = np.zeros(len(np.asarray(arrival_s)), layout.SEQUENCE)
    records["arrival_s"], records["prompt_tokens"] = arrival_s, prompt_tokens
    records["target_tokens"] = target_tokens
    records["row"] = records["next"] = records["prev"] = NONE
    return records


@numba.njit(cache=True, nogil=True)
def _place(seqs: Any, slots: Any, records: Any, first: int) -> None:
    """records[N] in their slots, numbered by arrival from `first`."""
    for i in range(len(slots)):
        seqs[slots[i]] = records[i]
        seqs[slots[i]].index = first + i


@numba.njit(cache=True, nogil=True)
def _figures(seqs: Any, replicas: Any, lists: Any, rows: Any) -> Any:
    """[R, 8] those of `ReplicaStats` in each row, in their order."""
    found = np.empty((len(rows), 8), np.int64)
    for i in range(len(rows)):
        row = rows[i]
        replica, running, waiting = replicas[row], lists[row, RUNNING], lists[row, WAITING]
        found[i, 0], found[i, 1] = running.count, waiting.count
        found[i, 2], found[i, 3], s = waiting.prompt_tokens, 0, running.head
        while s != NONE:
            found[i, 3] += seqs[s].computed_tokens
            s = seqs[s].next
        found[i, 4] = replica.num_blocks
        found[i, 5] = replica.num_blocks - replica.free_blocks - replica.withheld_blocks
        found[i, 6], found[i, 7] = replica.generated_total, replica.preemptions_total
    return found


def request_records(requests: list[Request]) -> Records:
    """The same, from objects."""
    return new_records(
        [r.arrival_s for r in requests],
        [r.prompt_tokens for r in requests],
        [r.output_tokens for r in requests],
    )


class SurrogateState:
    """Slots for sequences, rows for replicas. Twice as many rows as devices: two deployments."""

    def __init__(
        self,
        spec: ClusterSpec,
        max_queue: int,
        crowding: Crowding,
        prefix_hit_rate: float = 0.0,
        trace_items: int = 0,
    ) -> None:
        self.spec = spec
        num_rows = 2 * spec.num_devices
        self.seqs = np.zeros(0, layout.SEQUENCE)
        self._requests: dict[int, Request] = {}  # by slot
        self.replicas = np.zeros(num_rows, layout.REPLICA)
        self.lists = np.zeros((num_rows + 1, 2), layout.LIST)
        self.lists["head"] = self.lists["tail"] = NONE
        self.batches = np.zeros((num_rows, spec.num_devices), layout.BATCH)
        self.limits = np.zeros(1, layout.LIMITS)
        self.limits[0] = (
            spec.block_size,
            spec.max_num_seqs,
            spec.max_num_batched_tokens,
            spec.model.max_model_len,
            max_queue,
            prefix_hit_rate,
        )
        self.counts = np.zeros(1, layout.COUNTS)
        self.clock = np.zeros(1, layout.CLOCK)
        clock = self.clock[0]
        clock["num_knots"], clock["rate"] = len(crowding.processors), 1.0
        for i, knot in enumerate(crowding.processors):
            clock["busy"][i], clock["slowdown"][i] = knot
        clock["num_memory_knots"] = len(crowding.memory)
        for i, knot in enumerate(crowding.memory):
            clock["memory_busy"][i], clock["memory_slowdown"][i] = knot
        self.trace = np.zeros(trace_items, layout.ITEM)
        self.ended = np.zeros(0, np.int64)
        self._num_added = 0
        self._free_slots = np.zeros(0, np.int64)  # of which the first `_num_free` are free
        self._num_free = 0
        self._grow()

    def copy(self) -> SurrogateState:
        """An independent copy; requests are frozen and shared."""
        other = object.__new__(SurrogateState)
        other.spec, other._num_added = self.spec, self._num_added
        for name in ARRAYS:
            setattr(other, name, getattr(self, name).copy())
        other._requests = self._requests.copy()
        other._free_slots, other._num_free = self._free_slots.copy(), self._num_free
        return other

    def redraw(self, lengths: LengthSampler) -> None:
        """New output lengths for every live sequence, in the order of their slots."""
        is_live = np.ones(len(self.seqs), np.bool_)
        is_live[self._free_slots[: self._num_free]] = False
        live = self.seqs[is_live]
        live["target_tokens"] = lengths(live["prompt_tokens"], live["output_tokens"])
        assert (live["target_tokens"] > live["output_tokens"]).all(), "a length is not to come"
        self.seqs[is_live] = live

    # ---------------------------------------------------------------- slots

    def _grow(self) -> None:
        size = len(self.seqs)
        new_size = max(FIRST_SLOTS, 2 * size)
        self.seqs = np.concatenate([self.seqs, np.zeros(new_size - size, layout.SEQUENCE)])
        self.ended = np.zeros(new_size, np.int64)
        fresh = np.arange(new_size - 1, size - 1, -1)
        rest = np.zeros(size - self._num_free, np.int64)
        self._free_slots = np.concatenate([self._free_slots[: self._num_free], fresh, rest])
        self._num_free += len(fresh)

    def add_records(self, records: Records) -> Slots:
        """Slots for requests that arrive next; see `new_records`."""
        while self._num_free < len(records):
            self._grow()
        first = self._num_free - len(records)
        slots = self._free_slots[first : self._num_free].copy()
        self._num_free = first
        _place(self.seqs, slots, records, self._num_added)
        self._num_added += len(slots)
        return slots

    def add_requests(self, requests: list[Request]) -> Slots:
        """The same, kept as objects for `requests_of`."""
        slots = self.add_records(request_records(requests))
        for slot, request in zip(slots.tolist(), requests, strict=True):
            self._requests[slot] = request
        return slots

    def requests_of(self, slots: list[int]) -> list[Request]:
        return [self._requests[slot] for slot in slots]

    def release(self, slots: Slots) -> None:
        if self._requests:
            for slot in slots.tolist():
                self._requests.pop(slot, None)
        self._free_slots[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def linked(self, row: int, column: int) -> list[int]:
        """Slots of one list, in order."""
        slots, is_whole = kernel.slots_of(self.seqs, self.lists[row, column])
        assert is_whole, (row, column)
        found: list[int] = slots.tolist()
        return found

    def sequences_of(self, row: int) -> list[int]:
        """Running and waiting slots of a replica, in arrival order."""
        slots = np.array(self.linked(row, RUNNING) + self.linked(row, WAITING), np.int64)
        found = self.seqs[slots]
        ordered: list[int] = slots[np.lexsort((found["number"], found["arrival_s"]))].tolist()
        return ordered

    def take_held(self) -> list[int]:
        """Slots of the list of held sequences, which is empty then."""
        held_row = len(self.replicas)
        held = self.linked(held_row, WAITING)
        self.clear_lists(held_row)
        return held

    def fail(self, slots: Slots, now_s: float) -> None:
        """They end, and are in no list."""
        self.seqs["status"][slots], self.seqs["last_token_s"][slots] = FAILED, now_s
        self.counts["failed"] += len(slots)
        self.counts["live"] -= len(slots)

    def start_over(self, slots: list[int]) -> None:
        """Their replica is gone with all they had there but the tokens."""
        for name in ("blocks", "copied_blocks", "computed_tokens", "in_flight_tokens"):
            self.seqs[name][slots] = 0
        self.seqs["num_moves"][slots] += 1

    # ---------------------------------------------------------------- rows

    def add_replica(self, row: int, parallel: ParallelConfig, step: Records, blocks: int) -> None:
        """An idle, closed replica of `blocks` KV blocks in `row`; `step` is a `layout.STEP`."""
        record = np.zeros((), layout.REPLICA)
        record["step"] = step
        record["depth"], record["num_devices"] = parallel.pp, parallel.num_devices
        record["num_blocks"] = record["free_blocks"] = blocks
        self.replicas[row] = record
        self.clear_lists(row)

    def clear_lists(self, row: int) -> None:
        self.lists[row]["head"] = self.lists[row]["tail"] = NONE
        self.lists[row]["count"] = self.lists[row]["prompt_tokens"] = 0

    def limit_blocks(self, row: int, max_used: int | None) -> None:
        """`engine.block_manager.BlockManager.limit`."""
        replica = self.replicas[row]
        withheld = 0 if max_used is None else max(0, int(replica["num_blocks"]) - max_used)
        replica["free_blocks"] += replica["withheld_blocks"] - withheld
        replica["withheld_blocks"] = withheld

    def hold_copied(self, row: int, slots: Slots | list[int], now_s: float) -> None:
        """`engine.migration.arrivals.Departures`: the blocks of the tokens computed so far stay in
        use until the next call, whatever becomes of these sequences."""
        replica, computed = self.replicas[row], self.seqs["computed_tokens"][slots]
        self.seqs["copied_blocks"][slots] = -(-computed // self.spec.block_size)
        replica["free_blocks"] += replica["copied_blocks"]
        replica["copied_blocks"] = 0
        self.wake(row, now_s)

    def preempt_all(self, row: int) -> None:
        """`engine.scheduler.BatchScheduler.start_over`: what the blocks of a row hold is lost."""
        for slot in self.linked(row, RUNNING):
            kernel.preempt(self.seqs, self.replicas[row], self.lists[row], slot)

    def used_blocks(self, row: int) -> int:
        """Those that sequences hold there or will hold."""
        replica = self.replicas[row]
        idle = replica["free_blocks"] + replica["withheld_blocks"]
        return int(replica["num_blocks"] - idle)

    def work_time(self, now_s: float) -> float:
        """`now_s` on the clock that the replicas' times are on."""
        return float(kernel.work_time(self.clock[0], now_s))

    def wake(self, row: int, now_s: float) -> None:
        """Let a replica look at its lists again."""
        kernel.wake(self.replicas[row], self.work_time(now_s))

    def quiet_s(self, row: int, now_s: float) -> float:
        """When its steps in flight have ended, at the earliest; `now_s` when there are none."""
        replica = self.replicas[row]
        if not replica["num_batches"]:
            return now_s
        return self._seen_s(float(replica["last_end_s"]), now_s)

    def next_end_s(self, row: int, now_s: float) -> float:
        """When a step ends there, at the earliest, or one that is about to start can be seen; never
        while it has nothing to do."""
        replica = self.replicas[row]
        if replica["num_batches"]:
            end_s = float(self.batches[row, replica["first_batch"]]["end_s"])
            if replica["step"]["leader_computes"]:
                end_s = max(end_s, float(replica["ready_s"]))  # as `kernel._next_end`
            return self._seen_s(end_s, now_s)
        return now_s + LOOK_S if replica["may_start"] else inf

    def _seen_s(self, work_s: float, now_s: float) -> float:
        """The work clock shows `work_s` then, at the earliest."""
        if not self.clock[0]["num_knots"]:
            return work_s
        return max(now_s + (work_s - self.work_time(now_s)), now_s + LOOK_S)

    def stats(self, rows: Slots, replicas: Iterable[Replica], now_s: float) -> list[ReplicaStats]:
        """Of replicas in these rows."""
        figures = _figures(self.seqs, self.replicas, self.lists, rows).tolist()
        return [
            ReplicaStats(replica.replica_id, now_s, *own)
            for replica, own in zip(replicas, figures, strict=True)
        ]

    # ---------------------------------------------------------------- checks

    def check_row(self, row: int, reserved_blocks: int) -> None:
        """Raise AssertionError unless lists, blocks and counters of a replica agree."""
        replica, seqs = self.replicas[row], self.seqs
        running, waiting = self.linked(row, RUNNING), self.linked(row, WAITING)
        for slots, column, status in (
            (running, RUNNING, IN_RUNNING),
            (waiting, WAITING, IN_WAITING),
        ):
            prompt_tokens = seqs["prompt_tokens"][slots].sum()
            assert prompt_tokens == self.lists[row, column]["prompt_tokens"], (row, column)
            assert (seqs["status"][slots] == status).all(), (row, column)
            assert (seqs["row"][slots] == row).all(), (row, column)
            keys = seqs[["arrival_s", "number"]][slots].tolist()
            assert keys == sorted(keys), "not in arrival order"
        held = int(seqs["blocks"][running].sum())
        copied = int(replica["copied_blocks"])
        assert held + copied + reserved_blocks == self.used_blocks(row), row
        assert (seqs["copied_blocks"] <= seqs["blocks"])[running].all(), row
        assert replica["free_blocks"] >= -replica["withheld_blocks"], row
        needed = -(-seqs["computed_tokens"][running] // self.spec.block_size)
        assert (seqs["blocks"][running] >= needed).all(), row
        assert not seqs["blocks"][waiting].any(), row
        assert replica["num_outstanding"] == len(running) + len(waiting), row
        in_flight = int((seqs["in_flight_tokens"][running] > 0).sum())
        assert (in_flight > 0) == (replica["num_batches"] > 0), row

    def check_counts(self, rows: list[int]) -> None:
        """Raise AssertionError unless every arrived request is in exactly one place."""
        counts = self.counts[0]
        held = self.linked(len(self.replicas), WAITING)
        here = [s for row in rows for s in self.sequences_of(row)] + held
        assert len(set(here)) == len(here) == counts["live"], (len(here), counts["live"])
        ended = counts["finished"] + counts["rejected"] + counts["failed"]
        assert counts["arrived"] == ended + counts["live"], counts
        used = set(range(len(self.seqs))) - set(self._free_slots[: self._num_free].tolist())
        assert set(here) == used, "a slot is used and in no list"
