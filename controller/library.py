"""The library: every deployment of a pool that leaves no usable device idle, and which can be best.

Up to `LIBRARY_DEVICES` devices it lists them all, once per pool; candidates come from it, in
training and in production alike. What is best for a mix of traffic is found exactly by solving only
a few of them (`controller.headroom_kernel`).

Dominance. A deployment serves the sum over its replicas of the simplices {x >= 0: sum_j x_j / n_cj
<= rho}; more capacity is a larger set. A configuration c is dominated when replicas S of others, on
no more devices, have sum_{k in S} n_kj >= n_cj for every type j: the set of S is convex and holds
0 and the corners n_cj e_j of c's simplex, hence all of it. With S in place of every c, any
deployment keeps what it serves of every mix. So deployments with dominated configurations can be
left out where headroom decides, in any scenario, and the optimum stays. Latency is another matter:
it is sought in the whole list. (Where nodes bind, S must fit where c did: its groups into c's. Of
equal configurations the first stays. Room for c is room for S, so nothing is idle for the loss.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller import headroom_kernel as kernel
from controller.deployments import Ints, list_counts, num_maximal
from controller.packing import Nodes, group_sizes, is_chain, packs
from engine.cluster import ParallelConfig

Floats = NDArray[np.float64]
LIBRARY_DEVICES = 32
MAX_DEPLOYMENTS = 150_000  # of a library; larger pools are left to the MILP
MAX_SUBSTITUTED = 16  # devices of a configuration that dominance is looked for


class Space(NamedTuple):
    """Room for deployments: devices alive in each node, and how many of them may be used."""

    nodes: Nodes
    devices: int


def has_library(configs: Sequence[ParallelConfig], space: Space) -> bool:
    """Whether all deployments can be listed."""
    few = space.devices <= LIBRARY_DEVICES
    sizes = [c.num_devices for c in configs]
    return few and num_maximal(sizes, space.devices) <= MAX_DEPLOYMENTS


def list_deployments(configs: Sequence[ParallelConfig], space: Space, maximal: bool = True) -> Ints:
    """[N, C] all deployments that fit; `maximal`: that leave no room for another replica."""
    sizes = np.array([c.num_devices for c in configs])
    if not binds(configs, space.nodes):
        return list_counts(sizes.tolist(), space.devices, maximal)
    every = list_counts(sizes.tolist(), space.devices, maximal=False)
    every = every[packs(every, configs, space.nodes)]
    roomy = np.zeros(len(every), np.bool_)
    for c in range(len(configs) if maximal else 0):
        more = every.copy()
        more[:, c] += 1
        roomy |= packs(more, configs, space.nodes) & (more @ sizes <= space.devices)
    return np.asarray(every[~roomy])


def list_homogeneous(configs: Sequence[ParallelConfig], space: Space, maximal: bool = True) -> Ints:
    """[N, C] the deployments of equal replicas that fit; `maximal`: as many replicas as fit, for
    each configuration that fits at all."""
    found = [np.zeros((0, len(configs)), np.int64)]
    for index, parallel in enumerate(configs):
        alike = np.zeros((space.devices // parallel.num_devices, len(configs)), np.int64)
        alike[:, index] = np.arange(len(alike), 0, -1)
        fitting = alike[packs(alike, configs, space.nodes)]
        found.append(fitting[:1] if maximal else fitting)
    return np.concatenate(found)


def binds(configs: Sequence[ParallelConfig], nodes: Nodes) -> bool:
    """Whether nodes exclude deployments that have devices enough."""
    if len(nodes) < 2:
        return False
    sizes = group_sizes(configs)
    return not is_chain(sizes) or any(n % sizes[-1] for n in nodes)


class Library:
    """The deployments of one space, or the `homogeneous` alone; `counts`[N, C] are those that leave
    nothing idle, as floats: no room for another replica, of the same configuration if so."""

    def __init__(
        self, configs: Sequence[ParallelConfig], space: Space, homogeneous: bool = False
    ) -> None:
        self.configs, self.space, self.homogeneous = tuple(configs), space, homogeneous
        self._list = list_homogeneous if homogeneous else list_deployments
        self.counts = self._list(configs, space).astype(np.float64)
        self._parts: dict[tuple[bytes, bool], Floats] = {}

    def contenders(self, rates: Floats, maximal: bool = True) -> Floats:
        """[M, C] deployments without dominated configurations, at service rates[C, J]: the one
        with the most headroom for any mix, or set of mixes, is among them. Not only `maximal`: also
        on fewer devices, in ascending order of devices."""
        unfit = self._unfit(rates)
        key = (unfit.tobytes(), maximal)
        if key not in self._parts:
            self._parts[key] = self._without(unfit, maximal)
        return self._parts[key]

    def _unfit(self, rates: Floats) -> NDArray[np.bool_]:
        """[C] dominated; none among equal replicas, since what dominates may be a mixture."""
        if self.homogeneous:
            return np.zeros(len(self.configs), np.bool_)
        groups = [c.tp for c in self.configs] if binds(self.configs, self.space.nodes) else []
        return dominated([c.num_devices for c in self.configs], rates, groups)

    def _without(self, unfit: NDArray[np.bool_], maximal: bool) -> Floats:
        if maximal:
            return np.asarray(self.counts[~self.counts[:, unfit].any(axis=1)])
        fit = [c for c, bad in zip(self.configs, unfit, strict=True) if not bad]
        part = self._list(fit, self.space, maximal=False)
        every = np.zeros((len(part), len(self.configs)))
        every[:, ~unfit] = part
        used = every @ np.array([c.num_devices for c in self.configs], np.float64)
        return np.asarray(every[np.argsort(used, kind="stable")])


def dominated(sizes: Sequence[int], rates: Floats, groups: Sequence[int] = ()) -> NDArray[np.bool_]:
    """[C] whether others on as many devices serve every type at least as well; rates[C, J].

    `groups`, where nodes bind: the tensor-parallel degrees, since the others must fit into them.
    """
    options, owners = _substitutes(tuple(sizes), tuple(groups))
    found: NDArray[np.bool_] = kernel.dominated(options, owners, np.ascontiguousarray(rates))
    return found


@lru_cache(maxsize=64)
def _substitutes(sizes: tuple[int, ...], groups: tuple[int, ...]) -> tuple[Floats, Ints]:
    """[M, C] the multisets of others that can be in the place of a configuration, for each of
    them; and [M] of which."""
    found = []
    for c, size in enumerate(sizes):
        fitting = [k for k in range(len(sizes)) if k != c]
        if groups:
            fitting = [k for k in fitting if groups[k] <= groups[c]]
        options = np.zeros((0, len(sizes)))
        if fitting and size <= MAX_SUBSTITUTED:
            part = list_counts([sizes[k] for k in fitting], size)
            if groups:
                those = [ParallelConfig(groups[k], sizes[k] // groups[k]) for k in fitting]
                part = part[packs(part, those, (groups[c],) * (size // groups[c]))]
            options = np.zeros((len(part), len(sizes)))
            options[:, fitting] = part
        found.append(options)
    return np.concatenate(found), np.repeat(np.arange(len(sizes)), [len(f) for f in found])
