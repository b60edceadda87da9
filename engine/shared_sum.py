"""SharedSum: an all-reduce between processes of one machine, through memory that they share.

A tensor-parallel step sums a few kilobytes twice per layer, and what that costs is the waking of
the others: through sockets every sum waits for the scheduler of the operating system, here it is a
look at a counter. The memory has no name: rank 0 makes it, the others map it by rank 0's file
descriptor, and it is gone with the last of them.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import sys
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes; each rank writes one: its counter, and whether it has left
PIECE_BYTES = 256 * 1024  # of a tensor, summed at a time; larger ones go in pieces
YIELDING_S = 0.02  # a rank that waits longer looks once in a millisecond
LOOK_MS = 1


def is_supported() -> bool:
    """Linux, for processes as file descriptors, on x86-64, where what another processor stores is
    seen in the order it was stored: the counters rely on that."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def open_shared_sum(
    share: Callable[[str, str], list[str]], rank: int, size: int, timeout_s: float
) -> SharedSum:
    """Join; all `size` ranks must. `share(label, value)` returns the values of all, in rank order.
    A sum waits `timeout_s` at most.

    Raises RuntimeError when a rank ended meanwhile.
    """
    length = size * (CACHE_LINE + 2 * PIECE_BYTES)
    descriptor = os.memfd_create("tidewright-sum") if rank == 0 else -1
    if rank == 0:
        os.ftruncate(descriptor, length)
    places: list[str] = share("place", f"{os.getpid()}/fd/{descriptor}")
    try:
        if rank > 0:
            descriptor = os.open(f"/proc/{places[0]}", os.O_RDWR)
        memory = mmap.mmap(descriptor, length)
        watch = [os.pidfd_open(int(place.partition("/")[0])) for place in places]
    except OSError as error:
        raise RuntimeError(f"a rank of the group is gone: {error}") from error
    share("mapped", "")
    os.close(descriptor)
    return SharedSum(memory, rank, size, watch, timeout_s)


class SharedSum:
    """One rank's end. Every rank has two slots that it fills in turn, and a counter of the pieces
    it has put there. To fill a slot again is safe: before the piece between, all had counted on,
    so they had read what was in it."""

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, watch: list[int], timeout_s: float
    ) -> None:
        self._counters = memoryview(memory).cast("q")
        width = CACHE_LINE // self._counters.itemsize
        self._own = rank * width
        self._others = [other * width for other in range(size) if other != rank]
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=size * CACHE_LINE).view(
            2, size, PIECE_BYTES
        )
        self._rank, self._turn, self._timeout_s = rank, 0, timeout_s
        self._poller = select.poll()
        for other, process in enumerate(watch):
            if other != rank:
                self._poller.register(process, select.POLLIN)
        weakref.finalize(self, _leave, self._counters, self._own, watch)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place; all get the same bits. `tensor` is contiguous.

        Raises RuntimeError when another rank is gone, or does not come within the time-out.
        """
        for piece in tensor.view(-1).split(PIECE_BYTES // tensor.element_size()):
            self._sum(piece)

    def _sum(self, piece: Tensor) -> None:
        slots = self._slots[self._turn % 2].view(piece.dtype)[:, : piece.numel()]
        slots[self._rank] = piece
        self._turn += 1
        self._counters[self._own] = self._turn
        for other in self._others:
            if self._counters[other] < self._turn:
                self._wait_for(other)
        torch.sum(slots, dim=0, out=piece)

    def _wait_for(self, other: int) -> None:
        counters, turn, started_s = self._counters, self._turn, time.monotonic()
        while counters[other] < turn:
            if counters[other + 1] and counters[other] < turn:
                raise RuntimeError("a rank of the group has left it")
            waited_s = time.monotonic() - started_s
            if waited_s < YIELDING_S:
                os.sched_yield()
            elif self._poller.poll(LOOK_MS) and counters[other] < turn:
                raise RuntimeError("the process of a rank of the group has ended")
            elif waited_s > self._timeout_s:
                raise RuntimeError(f"a rank did not come to the sum within {self._timeout_s:.0f} s")


def _leave(counters: memoryview, own: int, watch: list[int]) -> None:
    counters[own + 1] = True
    counters.release()
    for process in watch:
        os.close(process)
