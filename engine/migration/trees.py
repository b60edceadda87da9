"""Pure: shares of groups -> for every byte of a piece, the tree that brings it to all who need it.

A group's work over all pieces is laid end to end and cut into equal portions, one per device; and
so are the copies of a piece, holders first, then devices that have received it (McNaughton's
wrap-around: few cuts, exact portions). Forwarders send `FAN_OUT` copies at once, so that trees are
flat: a piece reaches n devices in about log n hops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil

from engine.cluster import DISK
from engine.migration.pieces import Group, Piece
from engine.migration.sources import Sending

FAN_OUT = 2
Edge = tuple[int, int, int]  # source, destination, edge that brings the bytes to the source or -1


@dataclass(frozen=True, slots=True)
class Sender:
    device: int
    nbytes: float  # over all copies of the piece
    holds: bool  # else it forwards


def device_shares(
    groups: Sequence[Group], pieces: Sequence[Piece], sending: Sending
) -> list[list[Sender]]:
    """The senders of each piece, holders first."""
    result: list[list[Sender]] = [[] for _ in pieces]
    for g, group in enumerate(groups):
        work = [(p, share[g]) for p, share in enumerate(sending.shares) if g in share]
        portion = sum(nbytes for _, nbytes in work) / len(group.devices)
        i, left = 0, portion
        for p, nbytes in work:
            while nbytes > 0:
                last = i == len(group.devices) - 1
                part = nbytes if last else min(nbytes, left)
                if part > 0:
                    result[p].append(Sender(group.devices[i], part, g in pieces[p].holders))
                nbytes, left = nbytes - part, left - part
                if left <= 0 and not last:
                    i, left = i + 1, portion
    for senders in result:
        senders.sort(key=lambda sender: not sender.holds)
    return result


def cut_copies(
    size: int,
    targets: Sequence[int],
    senders: Sequence[Sender],
    snap: Callable[[float], int],
) -> Iterator[tuple[int, int, list[Edge]]]:
    """Intervals of a piece of `size` bytes, each with edges that bring it to targets, parents
    first. Cuts are moved by `snap`. Without senders, all read from disk."""
    if not senders:
        yield 0, size, [(DISK, d, -1) for d in targets]
        return
    layout = _Layout(size, len(targets), senders)
    if layout.only_holders:  # targets need not agree on where to cut
        for copy, target in enumerate(targets):
            for start, stop in _intervals(size, layout.cuts(copy), snap):
                sender = layout.sender(copy, (start + stop) / 2)
                yield start, stop, [(sender.device, target, -1)]
        return
    cuts = [cut for copy in range(len(targets)) for cut in layout.cuts(copy)]
    for start, stop in _intervals(size, cuts, snap):
        sends = [layout.sender(copy, (start + stop) / 2) for copy in range(len(targets))]
        yield start, stop, _tree(sends, targets)


def _intervals(
    size: int, cuts: Sequence[float], snap: Callable[[float], int]
) -> Iterator[tuple[int, int]]:
    return pairwise(sorted({0, size, *map(snap, cuts)}))


class _Layout:
    """Copies 0, 1, ... of a piece end to end on one line, cut into the senders' portions.

    Copies that are forwarded only are gathered in blocks of `FAN_OUT`; a block is traversed once,
    all its copies side by side.
    """

    def __init__(self, size: int, num_copies: int, senders: Sequence[Sender]) -> None:
        self._size, self._senders = size, senders
        self._ends = list(accumulate(s.nbytes for s in senders))
        self._holders = [s for s in senders if s.holds]
        held = sum(s.nbytes for s in self._holders)
        self.only_holders = held >= num_copies * size - 0.5
        self._num_holder_copies = max(1, ceil((held - 0.5) / size))  # the last one perhaps in part
        self._num_copies = num_copies

    def _block(self, copy: int) -> tuple[int, int]:
        """First copy of the block, number of copies."""
        past = copy - self._num_holder_copies
        if past < 0:
            return copy, 1
        first = copy - past % FAN_OUT
        return first, min(FAN_OUT, self._num_copies - first)

    def cuts(self, copy: int) -> list[float]:
        """Where the sender of this copy changes."""
        first, width = self._block(copy)
        begin, end = first * self._size, (first + width) * self._size
        low, high = bisect_right(self._ends, begin + 0.5), bisect_right(self._ends, end - 0.5)
        return [(e - begin) / width for e in self._ends[low:high]]

    def sender(self, copy: int, at: float) -> Sender:
        first, width = self._block(copy)
        i = bisect_right(self._ends, first * self._size + at * width)
        found = self._senders[min(i, len(self._senders) - 1)]
        # the solver's tolerance may leave holders a few bytes short of one copy
        return found if copy or found.holds else self._holders[-1]


def _tree(sends: Sequence[Sender], targets: Sequence[int]) -> list[Edge]:
    """Copy j comes from the j-th sender, holders first. Forwarders receive first, in the order in
    which they begin to send: before the j-th copy at most j of them have begun, so each has it."""
    relays = dict.fromkeys(s.device for s in sends if not s.holds)
    order = [*relays, *(d for d in targets if d not in relays)]
    brought = {target: j for j, target in enumerate(order)}
    pairs = zip(sends, order, strict=True)
    return [(s.device, dst, -1 if s.holds else brought[s.device]) for s, dst in pairs]
