"""The best deployment by each objective: in the library of a small pool, by the MILP in others.

In the library every answer is exact. Beyond it, counts come from the exact programmes of
`controller.milp`; of those for latency, which charge it step by step, and of the neighbourhoods of
several optima, the best by exact figures is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from controller.deployments import Counts, neighbours
from controller.library import Floats, Library, Space, has_library, list_homogeneous
from controller.milp import Pool, fewest_devices, filled, least_latency, most_headroom
from controller.packing import packs, spread
from controller.scoring import NONE, Cache, Demand, Key, Scorer
from controller.solvers import SOLVERS
from controller.switch_costs import Budget, SwitchCosts


@dataclass(frozen=True)
class Search:
    """One pool and traffic to find the best for. `live` are the present replicas."""

    space: Space
    lengths_key: Key
    live: Counts
    listed: Floats  # [N, C] deployments to choose from
    contenders: Floats  # [M, C] of those, enough where headroom decides

    @cached_property
    def present(self) -> Floats:
        """[C] as `live`."""
        return np.array(self.live, np.float64)


class Optima:
    """Owns the libraries of one cluster; everything in its caches follows from the key alone."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.configs = spread(scorer.configs, scorer.cluster.spec)
        self.sizes = [c.num_devices for c in self.configs]
        self._libraries, self._milps = Cache(16), Cache()
        self._near, self._parts = Cache(64), Cache(256)

    # -- what to choose from --------------------------------------------------------------

    def library(self, space: Space) -> Library | None:
        """None where there are too many deployments to list."""

        def build() -> Library | None:
            alike = self.scorer.config.homogeneous
            listable = alike or has_library(self.configs, space)
            return Library(self.configs, space, alike) if listable else None

        return self._libraries.get(space, build)

    def search(
        self,
        space: Space,
        lengths_key: Key,
        live: Counts,
        rates_keys: Sequence[Key] = (),
        others: Sequence[Counts] = (),
    ) -> Search:
        """In a pool with a library, that; else the neighbourhoods of the live deployment and of
        the optima at these rates, and `others`."""
        library = self.library(space)
        if library is not None:
            part = self._contenders(library, lengths_key)
            return Search(space, lengths_key, live, library.counts, part)
        optima = [self.milp_headroom(space, (key,), lengths_key) for key in rates_keys]
        if self.scorer.config.objective == "latency":
            fast = [self.milp_latency(space, key, lengths_key) for key in rates_keys]
            optima += [counts for counts in fast if counts]
        around = [n for c in dict.fromkeys([live, *optima]) for n in self._neighbours(c, space)]
        alike = map(_counts, self.homogeneous(space))
        found = dict.fromkeys([*optima, *alike, *others, *around])
        listed = np.array([c for c in found if any(c)], np.float64)
        listed = listed.reshape(-1, len(self.sizes))
        return Search(space, lengths_key, live, listed, listed)

    def _contenders(self, library: Library, lengths_key: Key) -> Floats:
        rates = self.scorer.headroom_rates(lengths_key)
        key = (library.space, lengths_key)
        return self._parts.get(key, lambda: library.contenders(rates))

    def _neighbours(self, counts: Counts, space: Space) -> tuple[Counts, ...]:
        def build() -> tuple[Counts, ...]:
            found = tuple(neighbours(counts, self.sizes, space.devices))
            return tuple(c for c, ok in zip(found, self.fits(found, space), strict=True) if ok)

        return self._near.get((counts, space), build)

    def fits(self, deployments: Sequence[Counts], space: Space) -> list[bool]:
        """Which of them the devices and nodes have room for."""
        counts = np.array(deployments, np.int64).reshape(-1, len(self.sizes))
        few = counts @ np.array(self.sizes) <= space.devices
        return list((few & packs(counts, self.configs, space.nodes)).tolist())

    def homogeneous(self, space: Space) -> Floats:
        """[N, C] as many replicas of one configuration as fit, for each that fits."""

        def build() -> Floats:
            return list_homogeneous(self.configs, space).astype(np.float64)

        return self._near.get(("homogeneous", space), build)

    # -- the best of them -----------------------------------------------------------------

    def most_headroom(self, search: Search, rates: Floats, tail: float = 0.0) -> Counts:
        """The most headroom, in the mean of the lowest share `tail` of equally likely rates[S, J]
        (0: the lowest alone). The live deployment wins ties."""
        return self._or_live(search, search.contenders, rates, tail)

    def _or_live(self, search: Search, listed: Floats, rates: Floats, tail: float = 0.0) -> Counts:
        if not len(listed) or (len(listed) == 1 and _counts(listed[0]) == search.live):
            return search.live
        index = self.scorer.most_headroom_or(
            listed, search.present, rates, search.lengths_key, tail
        )
        return search.live if index is None else _counts(listed[index])

    def best_each(
        self, search: Search, demand: Demand, tail: float, roomy: Floats
    ) -> tuple[Counts, ...]:
        """In one call: `most_headroom` in scenario 0, in 1, and over the others with that tail;
        `least_latency` in 0, and in 1; the most headroom of the homogeneous, and of roomy[K, C], in
        0. There are deployments to choose from."""
        listed, contenders, alike = search.listed, search.contenders, self.homogeneous(search.space)
        lists = listed, contenders, alike, roomy
        found = self.scorer.best_each(lists, search.present, demand, tail)
        most = [search.live if i < 0 else _counts(contenders[i]) for i in found[:3]]
        fastest = [
            _counts(listed[i]) if i >= 0 else most[k] if i == NONE else search.live
            for k, i in enumerate(found[3:5])
        ]
        return (*most, *fastest, _counts(alike[found[5]]), _counts(roomy[found[6]]))

    def least_latency(self, search: Search, rates_key: Key) -> Counts:
        """The least mean latency of those with headroom 1; the most headroom where none has it.
        The live deployment wins ties."""
        rates, index = self.scorer.rates(rates_key), NONE
        if len(search.listed):
            found = self.scorer.least_latency_or(
                search.listed, search.present, rates, search.lengths_key
            )
            if found is None:
                return search.live
            index = found
        if index == NONE:
            return self.most_headroom(search, rates[None])
        return _counts(search.listed[index])

    def fewest_devices(self, search: Search, rates_key: Key) -> Counts | None:
        """Headroom 1 on the fewest devices, of those the most headroom; the rest idle. None: the
        pool is too small for that."""
        library = self.library(search.space)
        rates = self.scorer.rates(rates_key)
        if library is None:
            loads = self.scorer.loads(rates[None], search.lengths_key)
            return fewest_devices(loads, self._pool(search.space))
        service = self.scorer.headroom_rates(search.lengths_key)
        every = library.contenders(service, maximal=False)
        used = every @ np.array(self.sizes, np.float64)
        low, high, best = 1, search.space.devices, None
        while low <= high:  # the most headroom rises with the devices
            middle = (low + high) // 2
            listed = every[: int(np.searchsorted(used, middle, side="right"))]
            value, index = 0.0, 0
            if len(listed):
                index, value = self.scorer.most_headroom(listed, rates[None], search.lengths_key)
            if value >= 1.0:
                best, high = _counts(listed[index]), middle - 1
            else:
                low = middle + 1
        return best

    def cheap_switch(
        self, search: Search, rates_key: Key, costs: SwitchCosts, budget: Budget
    ) -> Counts:
        """The most headroom within the budget; the live deployment is. Bounds leave out what must
        move more; of the rest the best is taken whose exact cost is within."""
        space, rates = search.space, self.scorer.rates(rates_key)
        has_library = self.library(space) is not None
        part = costs.possible(space if has_library else None, search.listed, budget)
        if not has_library:
            found = self._milp_cheap(space, rates_key, search.lengths_key, costs, budget)
            part = np.concatenate([np.array(found, np.float64).reshape(-1, len(self.sizes)), part])
        while True:
            best = self._or_live(search, part, rates[None])
            if best == search.live or budget.allows(costs.cost(best)):
                return best
            part = part[(part != np.array(best)).any(axis=1)]
            if has_library:
                costs.remember(space, budget, part)

    # -- by the MILP ----------------------------------------------------------------------

    def _pool(self, space: Space) -> Pool:
        rho = self.scorer.config.max_utilisation
        return Pool(self.sizes, space.devices, rho, self.configs, space.nodes)

    def milp_headroom(
        self, space: Space, rates_keys: tuple[Key, ...], lengths_key: Key, tail: float = 0.0
    ) -> Counts:
        """The exact optimum of the programme; of one rate vector only the mix matters."""
        if len(rates_keys) == 1:
            rates_keys = ((0, *rates_keys[0][1:]),)

        def build() -> Counts:
            rates = np.array([self.scorer.rates(key) for key in rates_keys])
            loads = self.scorer.loads(rates, lengths_key)
            found = most_headroom(loads, self._pool(space), tail)
            assert found is not None  # no floors, no budget
            return found

        return self._milps.get((space, rates_keys, lengths_key, tail), build)

    # -- by other planners ------------------------------------------------------------------

    def by_planner(self, space: Space, rates_key: Key, lengths_key: Key) -> Counts:
        """What the planner that the config names finds (`controller.solvers`) for the mix of the
        rates, whatever is live.

        Those planners know devices and not nodes. Where what they find does not fit into the
        nodes, it is cut to its replicas that do, the largest first, and the devices which that
        leaves go to further replicas, the largest first: a deployment near the one meant, not the
        best of those that fit.
        """
        mix = (0, *rates_key[1:])

        def build() -> Counts:
            if space.devices < min(self.sizes):
                return (0,) * len(self.sizes)
            config = self.scorer.config
            loads = self.scorer.loads(self.scorer.rates(mix), lengths_key)
            rho, solve = config.max_utilisation, SOLVERS[config.planner]
            return self._packed(solve(loads, self.sizes, space.devices, rho), space)

        return self._milps.get((self.scorer.config.planner, space, mix, lengths_key), build)

    def _packed(self, counts: Counts, space: Space) -> Counts:
        if self.fits([counts], space)[0]:
            return counts
        part = [0] * len(counts)
        for index in sorted(range(len(counts)), key=lambda i: -self.sizes[i]):
            while part[index] < counts[index]:
                part[index] += 1
                if not self.fits([tuple(part)], space)[0]:
                    part[index] -= 1
                    break
        return filled(tuple(part), self._pool(space))

    def _milp_cheap(
        self, space: Space, rates_key: Key, lengths_key: Key, costs: SwitchCosts, budget: Budget
    ) -> list[Counts]:
        """The most headroom within the bytes, and within the seconds. Neither nodes nor what
        devices send are in the programme, so exact costs may be higher; and idle devices are given
        to further replicas after it, unless they may be given back."""
        mix = (0, *rates_key[1:])

        def build() -> list[Counts]:
            loads = self.scorer.loads(self.scorer.rates(mix)[None], lengths_key)
            pool, found = self._pool(space), []
            for changes in costs.changes(budget):
                counts = most_headroom(loads, replace(pool, changes=changes))
                if counts is not None:
                    found += [filled(counts, pool)]
                    found += [counts] if self.scorer.config.give_back else []
            return found

        return self._milps.get(("cheap", costs.current, budget, space, mix, lengths_key), build)

    def milp_latency(self, space: Space, rates_key: Key, lengths_key: Key) -> Counts | None:
        """Least latency, charged step by step; None where headroom 1 is out of reach."""

        def build() -> Counts | None:
            rates = self.scorer.rates(rates_key)
            cost_s = rates * self.scorer.latency_levels(lengths_key)
            loads = self.scorer.loads(rates, lengths_key)
            return least_latency(loads, cost_s, self._pool(space))

        return self._milps.get(("latency", space, rates_key, lengths_key), build)


def _counts(row: Floats) -> Counts:
    return _read(row.tobytes())


@lru_cache(maxsize=4096)
def _read(row: bytes) -> Counts:
    """The same few are best again and again."""
    return tuple(map(int, np.frombuffer(row).tolist()))
