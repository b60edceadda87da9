"""Pure: an order of jobs whose every prefix keeps all ports about equally far."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from engine.cluster import DISK


class Job(NamedTuple):
    """Bytes [start, stop) of a piece's line from one device to another, after job `after` has
    brought them to the source (-1: it holds them). `progress` in [0, 1) is that of its tree."""

    piece: int
    start: int
    stop: int
    src: int
    dst: int
    after: int
    progress: float


def order_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The order in which jobs begin when every device sends one at a time and receives one at a
    time, and no port waits that could work (a dense open shop: at most twice the optimum).

    A free device with most left to receive chooses first, the ready job whose source has most left
    to send. Of one pair of devices' jobs, those at the beginning of their trees come first: trees
    have different forwarders, all of which are to be busy.
    """
    ports = _Ports(jobs)
    ordered: list[Job] = []
    running: list[tuple[int, int]] = []  # when it ends, in bytes; which
    now, seen = 0, set(ports.by_target)
    while True:
        for i in ports.begin(seen):
            heappush(running, (now + jobs[i].stop - jobs[i].start, i))
            ordered.append(jobs[i])
        if not running:
            assert len(ordered) == len(jobs), "a job's parent comes before it"
            return ordered
        now, seen = running[0][0], set()
        while running and running[0][0] == now:
            seen |= ports.end(heappop(running)[1])


class _Ports:
    """Jobs that are ready, and which devices are busy."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._to_send: dict[int, int] = defaultdict(int)
        self._to_receive: dict[int, int] = defaultdict(int)
        self._waiting: dict[int, list[int]] = defaultdict(list)
        self._sending: set[int] = set()
        self._receiving: set[int] = set()
        self.by_target: dict[int, dict[int, deque[int]]] = defaultdict(dict)
        self._by_source: dict[int, set[int]] = defaultdict(set)
        for i in sorted(range(len(jobs)), key=lambda i: jobs[i].progress):
            _, start, stop, src, dst, after, _ = jobs[i]
            self._to_receive[dst] += stop - start
            self._to_send[src] += stop - start
            if after < 0:
                self._make_ready(i)
            else:
                self._waiting[after].append(i)

    def begin(self, targets: Iterable[int]) -> list[int]:
        """Jobs that these devices, if free, begin to receive now."""
        begun = []
        free = [t for t in targets if t not in self._receiving and t in self.by_target]
        for dst in sorted(free, key=lambda d: (-self._to_receive[d], d)):
            queues = self.by_target[dst]
            sources = queues.keys() - self._sending
            if sources:
                src = max(sources, key=lambda s: (self._to_send[s], -s))
                begun.append(queues[src].popleft())
                self._take(begun[-1], src, dst)
        return begun

    def _take(self, i: int, src: int, dst: int) -> None:
        nbytes = self._jobs[i].stop - self._jobs[i].start
        self._to_send[src] -= nbytes
        self._to_receive[dst] -= nbytes
        self._receiving.add(dst)
        if src != DISK:
            self._sending.add(src)
        if not self.by_target[dst][src]:
            del self.by_target[dst][src]
            self._by_source[src].discard(dst)
            if not self.by_target[dst]:
                del self.by_target[dst]

    def end(self, i: int) -> set[int]:
        """Frees both ports, makes ready what waited for this job; devices that may now begin."""
        src, dst = self._jobs[i].src, self._jobs[i].dst
        self._sending.discard(src)
        self._receiving.discard(dst)
        for child in self._waiting.pop(i, ()):
            self._make_ready(child)
        return {dst} | self._by_source[src] | self._by_source[dst]

    def _make_ready(self, i: int) -> None:
        job = self._jobs[i]
        self.by_target[job.dst].setdefault(job.src, deque()).append(i)
        self._by_source[job.src].add(job.dst)
