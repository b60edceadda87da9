"""Pure: from shares of groups to transfers between devices, in an order that keeps ports busy.

Realised: a group's work over all pieces is laid end to end and cut into equal portions, one per
device (McNaughton's wrap-around), and so are a piece's copies: holders first, then devices that
have received it. At every byte the senders then form a tree whose root is a holder. Cuts are moved
to whole rows, or to whole tensors where these are small or cannot be cut: the largest port load
differs from the programme's optimum by at most a row (or such a tensor) per cut.
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
from engine.migration.pieces import Group, Piece
from engine.migration.roles import RoleTable
from engine.migration.rounds import Job, order_jobs
from engine.migration.sources import Sending, num_copies

CHUNK_BYTES = 16 << 20  # of one transfer, unless a tensor that is not sliced is larger
MIN_JOB_BYTES = 1 << 18
NUM_ROUNDS = 64  # jobs per busiest port, about: enough for a chain to flow
NUM_JOBS = 16_000  # about; beyond, jobs grow, and rounds are fewer
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

    In every round of the order a device sends at most one job and receives at most one; a job is
    about 1/`NUM_ROUNDS` of the busiest port's load. What a device forwards has arrived earlier.
    """
    total = sum(piece.nbytes * num_copies(piece, groups) for piece in pieces)
    job_bytes = max(MIN_JOB_BYTES, int(sending.port_bytes) // NUM_ROUNDS, total // NUM_JOBS)
    senders = _device_shares(groups, pieces, sending)
    lines = [_line(table, piece) for piece in pieces]
    jobs: list[Job] = []
    for p, (piece, line) in enumerate(zip(pieces, lines, strict=True)):
        targets = sorted(d for g in piece.needers for d in groups[g].devices)
        trees = _trees(piece, line, targets, senders[p], num_copies(piece, groups))
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


def _device_shares(
    groups: Sequence[Group], pieces: Sequence[Piece], sending: Sending
) -> list[list[tuple[int, float, bool]]]:
    """By piece (device, bytes to send, whether it holds the piece), holders first."""
    result: list[list[tuple[int, float, bool]]] = [[] for _ in pieces]
    for g, group in enumerate(groups):
        work = [(p, share[g]) for p, share in enumerate(sending.shares) if g in share]
        portion = sum(nbytes for _, nbytes in work) / len(group.devices)
        i, left = 0, portion
        for p, nbytes in work:
            while nbytes > 0:
                last = i == len(group.devices) - 1
                part = nbytes if last else min(nbytes, left)
                if part > 0:
                    result[p].append((group.devices[i], part, g in pieces[p].holders))
                nbytes, left = nbytes - part, left - part
                if left <= 0 and not last:
                    i, left = i + 1, portion
    for senders in result:
        senders.sort(key=lambda sender: not sender[2])
    return result


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


Edge = tuple[int, int, int]  # source, destination, edge that brings the bytes to the source or -1


def _trees(
    piece: Piece,
    line: _Line,
    targets: Sequence[int],
    senders: Sequence[tuple[int, float, bool]],
    copies: int,
) -> Iterator[tuple[int, int, list[Edge]]]:
    """Intervals of the line, each with the edges that bring it to all targets, parents first."""
    size = piece.nbytes
    if not senders:
        yield 0, size, [(DISK, d, -1) for d in targets]
        return
    ends = list(accumulate(nbytes for _, nbytes, _ in senders))
    held_end = sum(nbytes for _, nbytes, holds in senders if holds)
    only_holders = held_end >= copies * size - 0.5
    inner = [e for e in ends if 0.5 < e < copies * size - 0.5]
    if only_holders:  # targets need not agree on where to cut
        for j, target in enumerate(targets):
            here = {line.snap(e - j * size) for e in inner if j * size < e < (j + 1) * size}
            for start, stop in pairwise(sorted({0, size, *here})):
                middle = j * size + (start + stop) / 2
                yield start, stop, [(_sender(senders, ends, middle)[0], target, -1)]
        return
    for start, stop in pairwise(sorted({0, size, *(line.snap(e % size) for e in inner)})):
        middle = (start + stop) / 2
        sends = [_sender(senders, ends, j * size + middle) for j in range(copies)]
        if not sends[0][2]:  # the solver's tolerance may leave holders a few bytes short
            sends[0] = [sender for sender in senders if sender[2]][-1]
        yield start, stop, _tree(sends, targets)


def _sender(
    senders: Sequence[tuple[int, float, bool]], ends: Sequence[float], at: float
) -> tuple[int, float, bool]:
    return senders[min(bisect_right(ends, at), len(senders) - 1)]


def _tree(sends: Sequence[tuple[int, float, bool]], targets: Sequence[int]) -> list[Edge]:
    """Copy j comes from the j-th sender, holders first. Forwarders receive first, in the order in
    which they begin to send: before the j-th copy at most j of them have begun, so each has it."""
    sources = [device for device, _, _ in sends]
    assert sends[0][2], "the first copy comes from a holder"
    relays = list(dict.fromkeys(device for device, _, holds in sends if not holds))
    order = relays + [d for d in targets if d not in set(relays)]
    brought = {target: j for j, target in enumerate(order)}
    return [(src, dst, brought.get(src, -1)) for src, dst in zip(sources, order, strict=True)]


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
            jobs.append(Job(piece, a, b, src, dst, after))


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
