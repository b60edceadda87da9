"""Pure: from shares of groups to transfers between devices, in an order that keeps ports busy.

Who sends what is cut as `engine.migration.trees` says, at whole rows, or at whole tensors where
these are small or cannot be cut: the largest port load differs from the programme's optimum by at
most a row (or such a tensor) per cut.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import overload

import numpy as np

from engine.cluster import DISK, Transfer
from engine.migration.open_shop import Job, order_jobs
from engine.migration.pieces import Group, Interval, Piece
from engine.migration.roles import RoleTable
from engine.migration.sources import Sending, num_copies
from engine.migration.trees import Edge, cut_copies, device_shares

CHUNK_BYTES = 16 << 20  # of one transfer, unless a tensor that is not sliced is larger
MIN_JOB_BYTES = 1 << 18
JOBS_PER_PORT = 64  # about: enough for bytes to flow through a tree
NUM_JOBS = 16_000  # in all, about; beyond, jobs grow
SMALL_BYTES = 1 << 16  # tensors below are not cut
Slice = tuple[str, int | None, int, int, int]  # tensor, dim, start, stop, bytes
Links = Counter[tuple[int, int]]  # bytes by (source, destination)


class _Line:
    """A piece laid out as a line of bytes: slices of tensors, layer by layer."""

    def __init__(self, table: RoleTable, intervals: tuple[Interval, ...]) -> None:
        self._table, self._intervals = table, intervals
        layers = [table.layers[c] for c, _, _ in intervals]
        lengths = [len(of) for of in layers]
        classes = np.repeat([c for c, _, _ in intervals], lengths)
        order = np.lexsort((classes, np.concatenate(layers)))
        self._nbytes = [(b - a) * table.classes[c].row_bytes for c, a, b in intervals]
        which = np.repeat(np.arange(len(intervals)), lengths)[order]
        ends = np.cumsum(np.array(self._nbytes, np.int64)[which])
        self.begins: list[int] = [0, *ends.tolist()]  # of the slices; one more than those
        self._order, self._which = order, which.tolist()  # by slice: tensor, interval
        self._small_bytes = min(SMALL_BYTES, self.begins[-1] // 64)

    def snap(self, at: float) -> int:
        """The nearest place where the line may be cut."""
        i = min(bisect_right(self.begins, at) - 1, len(self._which) - 1)
        interval = self._which[i]
        kind, nbytes = self._table.classes[self._intervals[interval][0]], self._nbytes[interval]
        step = nbytes if kind.dim is None or nbytes <= self._small_bytes else kind.row_bytes
        return self.begins[i] + round((at - self.begins[i]) / step) * step

    def slices(self) -> list[tuple[Slice, int]]:
        """With the bytes of a row."""
        found = [
            ((tensor.name, kind.dim, a, b, (b - a) * kind.row_bytes), kind.row_bytes)
            for c, a, b in self._intervals
            for kind in (self._table.classes[c],)
            for tensor in kind.tensors
        ]
        return [found[i] for i in self._order.tolist()]


@lru_cache(maxsize=256)
def _line(table: RoleTable, intervals: tuple[Interval, ...]) -> _Line:
    return _Line(table, intervals)


def _cut(
    begins: Sequence[int],
    slices: Sequence[tuple[Slice, int]],
    start: int,
    stop: int,
    chunk_bytes: int,
) -> Iterator[Slice]:
    """Slices of [start, stop) of a line, each of at most `chunk_bytes` where it can be cut."""
    i = bisect_right(begins, start) - 1
    while i < len(slices) and begins[i] < stop:
        (name, dim, first, _, _), row_bytes = slices[i]
        a = first + (max(start, begins[i]) - begins[i]) // row_bytes
        b = first + (min(stop, begins[i + 1]) - begins[i]) // row_bytes
        step = b - a if dim is None else max(1, chunk_bytes // row_bytes)
        for row in range(a, b, step):
            end = min(row + step, b)
            yield name, dim, row, end, (end - row) * row_bytes
        i += 1


class Schedule(Sequence[Transfer]):
    """The transfers that bring every piece to its needers, in the order to carry them out.

    What goes over which link (`link_bytes`) is known at once; the transfers are made when they are
    looked at. Equal to the tuple of them.

    Pieces are cut into jobs of about 1/`JOBS_PER_PORT` of the busiest port's load, ordered as an
    open shop would begin them. What a device forwards has arrived earlier in the list.
    """

    def __init__(
        self,
        table: RoleTable,
        groups: Sequence[Group],
        pieces: Sequence[Piece],
        sending: Sending,
        chunk_bytes: int = CHUNK_BYTES,
        node_size: int = 0,
    ) -> None:
        total = sum(piece.nbytes * num_copies(piece, groups) for piece in pieces)
        self._job_bytes = max(
            MIN_JOB_BYTES, int(sending.port_bytes) // JOBS_PER_PORT, total // NUM_JOBS
        )
        self._chunk_bytes = chunk_bytes
        senders = device_shares(groups, pieces, sending)
        self._lines = [_line(table, piece.intervals) for piece in pieces]
        self._parts: list[tuple[int, int, int, list[Edge]]] = []  # of pieces, with their trees
        self.link_bytes = Links()
        for p, (piece, line) in enumerate(zip(pieces, self._lines, strict=True)):
            targets = sorted(d for g in piece.needers for d in groups[g].devices)
            trees = cut_copies(piece.nbytes, targets, senders[p], line.snap, node_size)
            for start, stop, tree in trees:
                self._parts.append((p, start, stop, tree))
                for src, dst, _ in tree:
                    self.link_bytes[src, dst] += stop - start

    @cached_property
    def _transfers(self) -> tuple[Transfer, ...]:
        jobs: list[Job] = []
        for p, start, stop, tree in self._parts:
            _add_jobs(jobs, p, self._lines[p], start, stop, tree, self._job_bytes)
        with _uncollected():
            return tuple(_transfers(order_jobs(jobs), self._lines, self._chunk_bytes))

    def __len__(self) -> int:
        return len(self._transfers)

    @overload
    def __getitem__(self, index: int) -> Transfer: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Transfer, ...]: ...

    def __getitem__(self, index: int | slice) -> Transfer | tuple[Transfer, ...]:
        return self._transfers[index]

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._transfers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Schedule):
            return self is other or self._transfers == other._transfers
        return self._transfers == other

    def __hash__(self) -> int:
        return hash(self._transfers)

    def __repr__(self) -> str:
        return repr(self._transfers)

    def __reduce__(self) -> tuple[type[tuple[Transfer, ...]], tuple[tuple[Transfer, ...]]]:
        return tuple, (self._transfers,)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Up to a million small objects without cycles: the collector would only walk them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _add_jobs(
    jobs: list[Job],
    piece: int,
    line: _Line,
    start: int,
    stop: int,
    tree: Sequence[Edge],
    job_bytes: int,
) -> None:
    parts = max(1, -(-(stop - start) // job_bytes))
    cuts = {line.snap(start + (stop - start) * k / parts) for k in range(1, parts)}
    inner = {c for c in cuts if start < c < stop}
    for a, b in pairwise(sorted({start, stop, *inner})):
        first = len(jobs)
        for src, dst, parent in tree:
            after = -1 if parent < 0 else first + parent
            jobs.append(Job(piece, a, b, src, dst, after, (a - start) / (stop - start)))


def _transfers(jobs: Sequence[Job], lines: Sequence[_Line], chunk_bytes: int) -> Iterator[Transfer]:
    slices = [line.slices() for line in lines]
    cut: dict[tuple[int, int, int], list[Slice]] = {}
    for job in jobs:
        key = job.piece, job.start, job.stop
        if key not in cut:
            begins = lines[job.piece].begins
            cut[key] = list(_cut(begins, slices[job.piece], job.start, job.stop, chunk_bytes))
        for name, dim, start, stop, nbytes in cut[key]:
            yield Transfer(name, dim, start, stop, job.src, job.dst, nbytes)


def link_bytes(transfers: Iterable[Transfer] | Links) -> Links:
    """Bytes by (source, destination); of a schedule without making its transfers."""
    if isinstance(transfers, Counter):
        return transfers
    if isinstance(transfers, Schedule):
        return transfers.link_bytes
    found = Links()
    for t in transfers:
        found[t.src, t.dst] += t.nbytes
    return found


def port_bytes(transfers: Iterable[Transfer] | Links) -> tuple[Counter[int], Counter[int]]:
    """Bytes (sent, received) by device; the disk sends through no port."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for (src, dst), nbytes in link_bytes(transfers).items():
        if src != DISK:
            sent[src] += nbytes
        received[dst] += nbytes
    return sent, received


def devices_of(transfers: Iterable[Transfer] | Links) -> set[int]:
    """All that send or receive."""
    return {device for link in link_bytes(transfers) for device in link} - {DISK}
