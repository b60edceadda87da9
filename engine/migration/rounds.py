"""Pure: an order of jobs whose every prefix keeps all ports about equally far."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from engine.cluster import DISK


class Job(NamedTuple):
    """Bytes [start, stop) of a piece's line from one device to another, after job `after` has
    brought them to the source (-1: it holds them)."""

    piece: int
    start: int
    stop: int
    src: int
    dst: int
    after: int


def order_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Rounds in which a device sends at most one job and receives at most one.

    A greedy open shop: the device with most left to receive chooses first, the ready job whose
    source has most left to send. Of one pair of devices' jobs, those at the beginning of their
    pieces come first, so that all pieces advance alike.
    """
    to_send: Counter[int] = Counter()
    to_receive: Counter[int] = Counter()
    ready: dict[int, dict[int, deque[int]]] = {}
    waiting: dict[int, list[int]] = {}
    size = {job.piece: job.stop for job in jobs}
    for i in sorted(range(len(jobs)), key=lambda i: jobs[i].start / size[jobs[i].piece]):
        job = jobs[i]
        to_receive[job.dst] += job.stop - job.start
        if job.src != DISK:
            to_send[job.src] += job.stop - job.start
        if job.after < 0:
            ready.setdefault(job.dst, {}).setdefault(job.src, deque()).append(i)
        else:
            waiting.setdefault(job.after, []).append(i)
    ordered: list[Job] = []
    while len(ordered) < len(jobs):
        chosen = _round(ready, to_send, to_receive)
        for i in chosen:
            job = jobs[i]
            ordered.append(job)
            to_send[job.src] -= job.stop - job.start
            to_receive[job.dst] -= job.stop - job.start
            for child in waiting.pop(i, ()):
                ready.setdefault(jobs[child].dst, {}).setdefault(job.dst, deque()).append(child)
    return ordered


def _round(
    ready: dict[int, dict[int, deque[int]]], to_send: Counter[int], to_receive: Counter[int]
) -> list[int]:
    busy: set[int] = set()
    chosen = []
    for dst in sorted(ready, key=to_receive.__getitem__, reverse=True):
        queues = ready[dst]
        free = [src for src in queues if src not in busy]
        if not free:
            continue
        src = max(free, key=to_send.__getitem__)
        chosen.append(queues[src].popleft())
        if src != DISK:
            busy.add(src)
        if not queues[src]:
            del queues[src]
            if not queues:
                del ready[dst]
    assert chosen, "some job is ready: a job's parent comes before it"
    return chosen
