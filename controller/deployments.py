"""Sets of deployments to score: all of a small pool, or the neighbourhood of some in a large one.

A deployment is a tuple of counts, one per feasible configuration. It is maximal when it leaves no
device idle that could still hold a replica; others are listed only where that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ParallelConfig

Counts = tuple[int, ...]
Ints = NDArray[np.int64]


def counts_of(configs: Sequence[ParallelConfig], known: Sequence[ParallelConfig]) -> Counts:
    """Counts per configuration of `known`; configurations not in it are dropped."""
    numbers = Counter(configs)
    return tuple(numbers[k] for k in known)


def configs_of(counts: Counts, known: Sequence[ParallelConfig]) -> tuple[ParallelConfig, ...]:
    """The replicas' configurations, in the order of `known`."""
    return tuple(chain.from_iterable(map(repeat, known, counts)))


def size_of(counts: Counts, sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def list_counts(sizes: Sequence[int], num_devices: int, maximal: bool = True) -> Ints:
    """[N, C] every deployment on at most `num_devices`, but for the empty one; `maximal`: that
    leaves no room for another replica."""
    found = np.zeros((1, 0), np.int64)
    left = np.array([num_devices])
    for size in sizes:
        options = left // size + 1
        rows = np.repeat(np.arange(len(found)), options)
        fewer = np.arange(len(rows)) - np.repeat(np.cumsum(options) - options, options)
        count = (options - 1)[rows] - fewer
        found = np.column_stack([found[rows], count])
        left = left[rows] - size * count
    keep = found.any(axis=1)
    if maximal:
        keep &= left < min(sizes, default=0)
    return np.asarray(found[keep])


def num_maximal(sizes: Sequence[int], num_devices: int) -> int:
    """How many maximal deployments there are, without listing them."""
    ways = [1] + [0] * num_devices  # by devices used
    for size in sizes:
        for used in range(size, num_devices + 1):
            ways[used] += ways[used - size]
    smallest = min(sizes, default=0)
    return sum(ways[max(num_devices - smallest + 1, 1) :]) if smallest <= num_devices else 0


def enumerate_counts(sizes: Sequence[int], num_devices: int) -> Iterator[Counts]:
    """Every maximal deployment on `num_devices` for configurations of these device counts."""
    yield from map(tuple, list_counts(sizes, num_devices).tolist())


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
