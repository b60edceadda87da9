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
from dataclasses import dataclass
from itertools import accumulate, pairwise

from engine.cluster import DISK, Transfer
from engine.migration.open_shop import Job, order_jobs
from engine.migration.pieces import Group, Piece
from engine.migration.roles import RoleTable
from engine.migration.sources import Sending, num_copies
from engine.migration.trees import Edge, cut_copies, device_shares

CHUNK_BYTES = 16 << 20  # of one transfer, unless a tensor that is not sliced is larger
MIN_JOB_BYTES = 1 << 18
JOBS_PER_PORT = 64  # about: enough for bytes to flow through a tree
NUM_JOBS = 16_000  # in all, about; beyond, jobs grow
SMALL_BYTES = 1 << 16  # tensors below are not cut
Slice = tuple[str, int | None, int, int, int]  # tensor, dim, start, stop, bytes


@dataclass(frozen=True, slots=True)
class _Line:
    """A piece laid out as a line of bytes: slices of tensors, and where each begins."""

    slices: tuple[tuple[Slice, int], ...]  # with the bytes of a row
    begins: tuple[int, ...]  # one more than slices
    small_bytes: int

    def snap(self, at: float) -> int:
        """The nearest place where the line may be cut."""
        i = min(bisect_right(self.begins, at) - 1, len(self.slices) - 1)
        (_, dim, _, _, nbytes), row_bytes = self.slices[i]
        step = nbytes if dim is None or nbytes <= self.small_bytes else row_bytes
        return self.begins[i] + round((at - self.begins[i]) / step) * step

    def cut(self, start: int, stop: int, chunk_bytes: int) -> Iterator[Slice]:
        """Slices of [start, stop), each of at most `chunk_bytes` where it can be cut."""
        i = bisect_right(self.begins, start) - 1
        while i < len(self.slices) and self.begins[i] < stop:
            (name, dim, first, _, _), row_bytes = self.slices[i]
            a = first + (max(start, self.begins[i]) - self.begins[i]) // row_bytes
            b = first + (min(stop, self.begins[i + 1]) - self.begins[i]) // row_bytes
            step = b - a if dim is None else max(1, chunk_bytes // row_bytes)
            for row in range(a, b, step):
                end = min(row + step, b)
                yield name, dim, row, end, (end - row) * row_bytes
            i += 1


def schedule(
    table: RoleTable,
    groups: Sequence[Group],
    pieces: Sequence[Piece],
    sending: Sending,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Transfer, ...]:
    """The transfers that bring every piece to its needers, in the order to carry them out.

    Pieces are cut into jobs of about 1/`JOBS_PER_PORT` of the busiest port's load, ordered as an
    open shop would begin them. What a device forwards has arrived earlier in the list.
    """
    total = sum(piece.nbytes * num_copies(piece, groups) for piece in pieces)
    job_bytes = max(MIN_JOB_BYTES, int(sending.port_bytes) // JOBS_PER_PORT, total // NUM_JOBS)
    senders = device_shares(groups, pieces, sending)
    lines = [_line(table, piece) for piece in pieces]
    jobs: list[Job] = []
    for p, (piece, line) in enumerate(zip(pieces, lines, strict=True)):
        targets = sorted(d for g in piece.needers for d in groups[g].devices)
        trees = cut_copies(piece.nbytes, targets, senders[p], line.snap)
        for start, stop, tree in trees:
            _add_jobs(jobs, p, line, start, stop, tree, job_bytes)
    with _uncollected():
        return tuple(_transfers(order_jobs(jobs), lines, chunk_bytes))


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


def _line(table: RoleTable, piece: Piece) -> _Line:
    found = [
        (tensor.layer or 0, c, (tensor.name, kind.dim, a, b, (b - a) * kind.row_bytes), kind)
        for c, a, b in piece.intervals
        for kind in (table.classes[c],)
        for tensor in kind.tensors
    ]
    found.sort(key=lambda entry: entry[:2])
    begins = tuple(accumulate((entry[2][4] for entry in found), initial=0))
    slices = tuple((entry[2], entry[3].row_bytes) for entry in found)
    return _Line(slices, begins, min(SMALL_BYTES, piece.nbytes // 64))


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
    cut: dict[tuple[int, int, int], list[Slice]] = {}
    for job in jobs:
        key = job.piece, job.start, job.stop
        if key not in cut:
            cut[key] = list(lines[job.piece].cut(job.start, job.stop, chunk_bytes))
        for name, dim, start, stop, nbytes in cut[key]:
            yield Transfer(name, dim, start, stop, job.src, job.dst, nbytes)


def port_bytes(transfers: Iterable[Transfer]) -> tuple[Counter[int], Counter[int]]:
    """Bytes (sent, received) by device; the disk sends through no port."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for t in transfers:
        if t.src != DISK:
            sent[t.src] += t.nbytes
        received[t.dst] += t.nbytes
    return sent, received
