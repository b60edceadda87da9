"""Sets of deployments to score: all of a small pool, or the neighbourhood of some in a large one.

A deployment is a tuple of counts, one per feasible configuration. Only maximal ones are listed: a
device that could still hold a replica is never left idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from engine.cluster import ParallelConfig

Counts = tuple[int, ...]


def counts_of(configs: Sequence[ParallelConfig], known: Sequence[ParallelConfig]) -> Counts:
    """Counts per configuration of `known`; configurations not in it are dropped."""
    return tuple(sum(c == k for c in configs) for k in known)


def configs_of(counts: Counts, known: Sequence[ParallelConfig]) -> tuple[ParallelConfig, ...]:
    """The replicas' configurations, in the order of `known`."""
    return tuple(k for k, count in zip(known, counts, strict=True) for _ in range(count))


def size_of(counts: Counts, sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def enumerate_counts(sizes: Sequence[int], num_devices: int) -> Iterator[Counts]:
    """Every maximal deployment on `num_devices` for configurations of these device counts."""

    def extend(index: int, left: int) -> Iterator[Counts]:
        if index == len(sizes):
            if left < smallest:
                yield ()
            return
        for count in range(left // sizes[index], -1, -1):
            for rest in extend(index + 1, left - count * sizes[index]):
                yield (count, *rest)

    smallest = min(sizes, default=0)
    if sizes:
        yield from (c for c in extend(0, num_devices) if any(c))


def fill(counts: Counts, sizes: Sequence[int], num_devices: int) -> Counts:
    """Give devices left idle to further replicas, the largest that fits first."""
    filled, left = list(counts), num_devices - size_of(counts, sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        while sizes[index] <= left:
            filled[index] += 1
            left -= sizes[index]
    return tuple(filled)


def _one_less(counts: Counts) -> Iterator[tuple[int, Counts]]:
    for index, count in enumerate(counts):
        if count:
            yield index, (*counts[:index], count - 1, *counts[index + 1 :])


def _with(counts: Counts, index: int) -> Counts:
    return (*counts[:index], counts[index] + 1, *counts[index + 1 :])


def neighbours(counts: Counts, sizes: Sequence[int], num_devices: int) -> Iterator[Counts]:
    """One merge, split or swap away: one or two replicas go, others take their devices."""
    removed: set[Counts] = set()
    for _, fewer in _one_less(counts):
        removed |= {fewer, *(fewest for _, fewest in _one_less(fewer))}
    for rest in sorted(removed):
        for index in range(len(sizes)):
            grown = _with(rest, index)
            if size_of(grown, sizes) <= num_devices:
                yield from (fill(grown, sizes, num_devices), *_topped(grown, sizes, num_devices))


def _topped(counts: Counts, sizes: Sequence[int], num_devices: int) -> Iterable[Counts]:
    """The devices left to replicas of one configuration each, where that uses them up."""
    left = num_devices - size_of(counts, sizes)
    for index, size in enumerate(sizes):
        if left and left % size == 0:
            yield (*counts[:index], counts[index] + left // size, *counts[index + 1 :])
