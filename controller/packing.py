"""Which deployments fit into nodes: a tensor-parallel group shares one node, stages may be apart.

Dead devices make nodes smaller, so a pool is the numbers of devices alive per node. Where every
group size divides the next larger one, counts pack exactly when, for each size s, the groups of
size s or more need no more than the nodes have in whole multiples of s: the largest are put first,
and what that leaves holds whole multiples of every smaller size, wherever they went. Other sizes
(3 and 5 in a node of 8) need patterns, what one node can hold; in the programme of
`controller.milp` they are Gilmore and Gomory's columns (Operations Research 9, 1961).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ClusterSpec, ParallelConfig

Ints = NDArray[np.int64]
Nodes = tuple[int, ...]  # devices alive in each node, largest first
Pattern = tuple[int, ...]  # groups of each size in one node


def nodes_of(spec: ClusterSpec, dead_devices: Sequence[int] = ()) -> Nodes:
    """Devices alive in each node that has any, largest first."""
    dead, size = set(dead_devices), spec.devices_per_node
    alive = Counter(d // size for d in range(spec.num_devices) if d not in dead)
    return tuple(sorted(alive.values(), reverse=True))


def spread(configs: Sequence[ParallelConfig], spec: ClusterSpec) -> tuple[ParallelConfig, ...]:
    """The configurations as nodes see them: groups that no whole node could hold are spread, as by
    `engine.migration.placement`, so their ranks count one by one."""
    most = spec.devices_per_node
    return tuple(c if c.tp <= most else ParallelConfig(1, c.num_devices) for c in configs)


def group_sizes(configs: Sequence[ParallelConfig]) -> tuple[int, ...]:
    """Different sizes of groups, ascending."""
    return tuple(sorted({c.tp for c in configs}))


def groups(configs: Sequence[ParallelConfig]) -> Ints:
    """[C, G] groups of each of `group_sizes` in one replica of each configuration."""
    sizes = group_sizes(configs)
    found = np.zeros((len(configs), len(sizes)), np.int64)
    for c, parallel in enumerate(configs):
        found[c, sizes.index(parallel.tp)] = parallel.pp
    return found


def is_chain(sizes: Sequence[int]) -> bool:
    """Whether each size divides the next."""
    return all(b % a == 0 for a, b in pairwise(sizes))


def room(sizes: Sequence[int], nodes: Nodes) -> tuple[int, ...]:
    """Devices that groups of a chain, of each size or more, may use in all."""
    return tuple(sum(size * (n // size) for n in nodes) for size in sizes)


def packs(counts: Ints, configs: Sequence[ParallelConfig], nodes: Nodes) -> NDArray[np.bool_]:
    """[N] whether each deployment of counts[N, C] fits into the nodes."""
    sizes = group_sizes(configs)
    wanted = counts @ groups(configs)  # [N, G]
    used = wanted * np.array(sizes, np.int64)
    if is_chain(sizes):
        larger = np.cumsum(used[:, ::-1], axis=1)[:, ::-1]
        return np.asarray(np.all(larger <= np.array(room(sizes, nodes)), axis=1))
    within = np.all(used <= np.array(room(sizes, nodes)), axis=1) & (used.sum(axis=1) <= sum(nodes))
    different, which = np.unique(wanted[within], axis=0, return_inverse=True)
    fits = np.array([_fits(tuple(row), sizes, nodes) for row in different.tolist()], np.bool_)
    within[within] = fits[which.ravel()]
    return np.asarray(within)


@lru_cache(maxsize=65536)
def _fits(wanted: Pattern, sizes: tuple[int, ...], nodes: Nodes) -> bool:
    """By trying what the first node takes: patterns without room for more of what is wanted."""
    if not any(wanted):
        return True
    if not nodes or sum(n * s for n, s in zip(wanted, sizes, strict=True)) > sum(nodes):
        return False
    for taken in patterns(sizes, nodes[0], wanted):
        left = tuple(n - t for n, t in zip(wanted, taken, strict=True))
        if _fits(left, sizes, nodes[1:]):
            return True
    return False


def patterns(
    sizes: Sequence[int], devices: int, wanted: Sequence[int] | None = None
) -> Iterator[Pattern]:
    """What a node of so many devices can hold, of no more than is wanted: maximal ones only."""
    most = [devices // s for s in sizes]
    if wanted is not None:
        most = [min(a, b) for a, b in zip(most, wanted, strict=True)]

    def extend(index: int, left: int) -> Iterator[Pattern]:
        if index < 0:
            yield ()
            return
        for count in range(min(most[index], left // sizes[index]), -1, -1):
            for rest in extend(index - 1, left - count * sizes[index]):
                yield (*rest, count)

    for pattern in extend(len(sizes) - 1, devices):
        left = devices - sum(n * s for n, s in zip(pattern, sizes, strict=True))
        if not any(s <= left and n < m for s, n, m in zip(sizes, pattern, most, strict=True)):
            yield pattern
