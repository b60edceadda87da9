"""Headroom and latency of many deployments at once, from rounded rates and lengths.

Everything is computed from the rounded figures, so that equal arguments give equal answers
whatever was asked before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller import headroom_kernel as kernel
from controller.milp import LATENCY_LEVELS
from controller.service_model import (
    ServiceModel,
    build_service_model,
    feasible_configs,
    mean_latency_s,
    mixed_rates,
)
from controller.slo_rates import MAKE, SloRates
from controller.solvers import SolverName, solver
from controller.workload import centres, prior
from engine.cluster import WorkloadTyping
from engine.errors import InfeasibleError, InvalidRequestError
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]
Key = tuple[int, ...]  # of rounded logarithms
Value = TypeVar("Value")
# the most headroom; the least latency with headroom 1; the fewest devices with headroom 1 at q90
Objective = Literal["goodput", "latency", "cost"]
# of a replica, for headroom: all that it sustains, or what it takes within the targets of a class
Capacity = Literal["throughput", "slo"]
MAX_LATENCY_S = 1e4  # what is reported where nothing is served
MAX_HEADROOM = 1e6
MAX_RATE = 1e12  # per second
CACHE_SIZE = 4096
NONE = -1  # in place of an index
MIXING_STEP = 0.05  # shares of types are rounded to multiples of it


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """How the planner weighs load."""

    max_utilisation: float = 0.9  # rho: headroom 1 means the busiest replica is this busy
    floor_share: float = 0.02  # of the total rate, below which no type's rate is taken
    min_rate_per_s: float = 0.01  # total rate assumed when nothing is known
    rate_step: float = 0.02  # rates are rounded to multiples of it in ln, to be cached
    length_step: float = 0.1  # the same for observed mean lengths
    max_candidates: int = 12  # rows, keep included
    objective: Objective = "goodput"  # what `optimum` is: see `Objective`
    planner: SolverName = "exact"  # what finds `optimum`; rivals are for goodput alone
    homogeneous: bool = False  # whether all replicas of a new deployment are alike
    capacity: Capacity = "throughput"  # what headroom counts: see `Capacity`
    slo_class: str = "interactive"  # whose targets, for the capacity "slo"
    max_devices: int = 0  # that a new deployment may use; 0: all that are alive
    give_back: bool = False  # whether candidates may leave devices idle (with "cost": always)
    worst_share: float = 0.0  # of the scenarios that a robust plan looks at; 0: the worst alone
    switch_budget_bytes: int = 0  # of weights, for the best plan that is cheap to reach; or else
    switch_budget_s: float = 0.0  # on the links, without the fixed overhead

    def __post_init__(self) -> None:
        objectives, capacities = get_args(Objective), get_args(Capacity)
        known = self.objective in objectives and self.capacity in capacities
        if not known or not 0 <= self.worst_share <= 1 or self.max_devices < 0:
            raise InvalidRequestError(
                f"planning needs an objective of {', '.join(objectives)}, a capacity of "
                f"{', '.join(capacities)}, a worst_share in [0, 1] and max_devices >= 0, got "
                f"{self.objective!r}, {self.capacity!r}, {self.worst_share} and "
                f"{self.max_devices}."
            )
        solver(self.planner)  # raises
        if self.planner != "exact" and (self.objective != "goodput" or self.homogeneous):
            raise InvalidRequestError(
                f"planner {self.planner!r} looks for the most headroom of unlike replicas: it "
                f"needs objective 'goodput' and homogeneous false, got {self.objective!r} and "
                f"{self.homogeneous}; set planner to 'exact' for those."
            )


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of N deployments at one rate vector; shares[N, C, J] of the types' traffic.
    Or in each of S scenarios: [S, N] and [S, N, C, J]."""

    headroom: Floats
    latency_s: Floats
    shares: Floats


class Demand(NamedTuple):
    """Traffic in S scenarios, and how many replicas of a configuration it would keep busy."""

    rates: Floats  # [S, J] requests per second
    loads: Floats  # [S, C, J]; see `Scorer.loads`
    lengths_key: Key

    def first(self, number: int) -> Demand:
        return Demand(self.rates[:number], self.loads[:number], self.lengths_key)


class Cache:
    """Bounded memo; the oldest entry goes first. Threads may share it: at worst two of them make
    the same entry."""

    def __init__(self, size: int = CACHE_SIZE) -> None:
        self._entries: dict[Hashable, object] = {}
        self._order: deque[Hashable] = deque()
        self._size = size

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        known = self._entries.get(key, self)
        if known is not self:
            return known  # type: ignore[return-value]
        made = self._entries[key] = make()
        self._order.append(key)
        if len(self._order) > self._size:
            self._entries.pop(self._order.popleft(), None)
        return made


def quantise(values: Iterable[float], step: float) -> Key:
    return tuple([round(math.log(value) / step) for value in values])


def _floats(values: ArrayLike) -> list[float]:
    if isinstance(values, tuple):
        return list(map(float, values))
    return list(np.asarray(values, np.float64).ravel().tolist())


class Scorer:
    """Scores deployments of one cluster for one typing. `configs` are the feasible ones."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        typing: WorkloadTyping,
        config: PlannerConfig,
        slo_rates: SloRates | None = None,
    ) -> None:
        self.cluster, self.config = cluster, config
        self.configs = feasible_configs(cluster)
        if not self.configs:
            raise InfeasibleError(
                f"no profiled configuration of {cluster.spec.model.name} fits: each needs room "
                f"for the weights and {cluster.spec.model.max_model_len} KV tokens in "
                f"{cluster.spec.device_memory_bytes} bytes per device; profile larger ones."
            )
        self._centres, self._prior = centres(typing), _floats(prior(typing))
        self._models, self._rates, self._served = Cache(64), Cache(256), Cache(64)
        self._floors = Cache(64)
        self._power = lru_cache(CACHE_SIZE)(lambda k: float(np.exp(k * config.rate_step)))
        self._last_lengths: tuple[Floats | None, Floats | None, Key] = (None, None, ())
        self._slo_rates = slo_rates if config.capacity == "slo" else None
        if self._slo_rates is not None:
            self._slo_shares = self._slo_rates.shares(cluster, self.configs, config.slo_class)
        elif config.capacity == "slo":
            raise InvalidRequestError(
                "the planner's capacity 'slo' needs SLO rates and got none; hand it those that "
                f"{MAKE} makes, or set capacity to 'throughput'."
            )
        kernel.warm_up()

    def lengths_key(self, lengths: Floats | None, mixing: Floats | None = None) -> Key:
        """Of mean lengths[J, 2], the centres' by default, and mixing[J, J], if types are not known
        at arrival. Neither is written to later: a tick asks for the same more than once."""
        known = self._last_lengths
        if known[0] is lengths and known[1] is mixing and lengths is not None:
            return known[2]
        given = _floats(self._centres if lengths is None else lengths)
        key = quantise([max(tokens, 1.0) for tokens in given], self.config.length_step)
        if mixing is not None:
            key += tuple([round(share / MIXING_STEP) for share in _floats(mixing)])
        self._last_lengths = lengths, mixing, key
        return key

    def model(self, lengths_key: Key) -> ServiceModel:
        """Of requests as they are taken at arrival."""

        def build() -> ServiceModel:
            mixing = self._mixing(lengths_key)
            return (
                self._typed(lengths_key)
                if mixing is None
                else self._typed(lengths_key).mixed(mixing)
            )

        return self._models.get(lengths_key, build)

    def _typed(self, lengths_key: Key) -> ServiceModel:
        """Of the types themselves."""
        return build_service_model(self.cluster, self.configs, self._lengths(lengths_key))

    def _lengths(self, lengths_key: Key) -> Floats:
        tokens = np.exp(np.array(lengths_key[: self._centres.size]) * self.config.length_step)
        return np.asarray(tokens.reshape(-1, 2))

    def _mixing(self, lengths_key: Key) -> Floats | None:
        """Rows sum to 1."""
        types, given = len(self._centres), lengths_key[self._centres.size :]
        if not given:
            return None
        shares = np.array(given, np.float64).reshape(types, types)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def headroom_rates(self, lengths_key: Key) -> Floats:
        """[C, J] requests per second that headroom counts of a replica; 0 where none is served
        within the targets. See `controller.slo_rates`."""
        return self._headroom_rates(lengths_key)[0]

    def _headroom_rates(self, lengths_key: Key) -> tuple[Floats, bool]:
        """And whether all are above 0."""

        def build() -> tuple[Floats, bool]:
            rates, mixing = self._slo_rates, self._mixing(lengths_key)
            found = self.model(lengths_key).rates
            if rates is not None:
                nearest = rates.nearest(self._lengths(lengths_key))
                within = self._typed(lengths_key).rates * self._slo_shares[:, nearest]
                found = within if mixing is None else mixed_rates(within, mixing)
            return found, bool((found > 0.0).all())

        return self._served.get(lengths_key, build)

    def loads(self, rates: Floats, lengths_key: Key) -> Floats:
        """[..., C, J] of rates[..., J]: replicas busy with each type; inf where not served."""
        served, all_served = self._headroom_rates(lengths_key)
        if all_served:
            return np.asarray(rates[..., None, :] / served)
        with np.errstate(divide="ignore"):
            return np.asarray(rates[..., None, :] / served)

    def demand(self, rates: Floats, lengths_key: Key) -> Demand:
        """Of rates[S, J]."""
        return Demand(rates, self.loads(rates, lengths_key), lengths_key)

    def scenarios(self, q50: Key, q90: Key, recent: Sequence[Key], lengths_key: Key) -> Demand:
        """At the median forecast and the high one, then in what the next interval may be like: one
        type at a time is as high as its forecast allows, or the mix is one of the `recent`."""
        powers = np.array([[*map(self._power, key)] for key in (q50, q90, *recent)])
        return self.demand(kernel.scenarios(powers), lengths_key)

    def rates_key(self, rates: ArrayLike) -> Key:
        """Total and shares of the rates, with the coverage floor, rounded in ln."""
        given = [min(r, MAX_RATE) if r > 0.0 else 0.0 for r in _floats(rates)]  # nan is not
        total = sum(given)
        if total < self.config.min_rate_per_s:
            total, given = self.config.min_rate_per_s, self._prior
        whole, floor = sum(given), self.config.floor_share
        share = [max(r / whole, floor) for r in given]
        return quantise([total, *share], self.config.rate_step)

    def rates(self, rates_key: Key) -> Floats:
        """[J] requests per second; not to be written to."""

        def build() -> Floats:
            total, *shares = map(self._power, rates_key)
            whole = sum(shares)
            return np.array([total * share / whole for share in shares])

        return self._rates.get(rates_key, build)

    # -- many deployments: counts[N, C], as floats --------------------------------------

    def score(self, counts: ArrayLike, rates_keys: Sequence[Key], lengths_key: Key) -> list[Scores]:
        """Headroom, latency and shares of every deployment at each rate vector."""
        rates = np.array([self.rates(key) for key in rates_keys])
        found = self.score_at(counts, self.demand(rates, lengths_key))
        return list(map(Scores, found.headroom, found.latency_s, found.shares))

    def score_at(self, counts: ArrayLike, demand: Demand) -> Scores:
        """The same in each scenario."""
        rates, loads, lengths_key = demand
        model, rho, plain = self.model(lengths_key), self.config.max_utilisation, loads
        if self._slo_rates is not None:  # what misses the targets anyhow is routed for throughput
            plain = rates[:, None, :] / model.rates
        listed, limits = np.asarray(counts, np.float64), (MAX_HEADROOM, MAX_LATENCY_S)
        found = kernel.score_all(listed, loads, plain, rates, rho, model.arrays, *limits)
        return Scores(*found)

    def most_headroom(
        self, counts: Floats, rates: Floats, lengths_key: Key, tail: float = 0.0
    ) -> tuple[int, float]:
        """Which has the most headroom, in the mean of the lowest share `tail` of equally likely
        rates[S, J] (0: the lowest alone); among equals the first. And its value."""
        loads = self.loads(rates, lengths_key)
        index, value, _ = kernel.most_headroom(counts, loads, self.config.max_utilisation, tail)
        return int(index), float(value)

    def most_headroom_or(
        self, counts: Floats, present: Floats, rates: Floats, lengths_key: Key, tail: float = 0.0
    ) -> int | None:
        """The same index; None where present[C] has as much."""
        loads, rho = self.loads(rates, lengths_key), self.config.max_utilisation
        index = kernel.most_headroom_or(counts, present, loads, rho, tail)
        return None if index < 0 else index

    def least_latency_or(
        self, counts: Floats, present: Floats, rates: Floats, lengths_key: Key
    ) -> int | None:
        """Which has the least mean latency of those with headroom 1 or more at rates[J], among
        equals the first; NONE: there is none. None where present[C] is as good."""
        loads, rho = self.loads(rates, lengths_key), self.config.max_utilisation
        latencies = self._latencies(counts, lengths_key)
        index = kernel.least_latency_or(counts, present, loads, rates, rho, *latencies)
        return None if index < NONE else index

    def _latencies(self, counts: Floats, lengths_key: Key) -> tuple[Any, ...]:
        """What the kernel's search for the least latency among counts[N, C] takes last."""
        arrays, rho = self.model(lengths_key).arrays, self.config.max_utilisation
        apart = self._slo_rates is not None
        parts = kernel.num_parts(len(counts), apart)
        key = (lengths_key, parts)
        floors = self._floors.get(key, lambda: kernel.load_floors(arrays, rho, parts))
        return arrays, floors, apart, MAX_LATENCY_S

    def best_each(
        self,
        lists: tuple[Floats, Floats, Floats, Floats],
        present: Floats,
        demand: Demand,
        tail: float,
    ) -> tuple[int, ...]:
        """`controller.headroom_kernel.best_each` of its four lists."""
        rates, loads, lengths_key = demand
        rho, latencies = self.config.max_utilisation, self._latencies(lists[0], lengths_key)
        found: tuple[int, ...] = kernel.best_each(
            *lists, present, loads, rates, rho, tail, *latencies
        )
        return found

    def latency_levels(self, lengths_key: Key) -> Floats:
        """[L, C, J] mean latency of each type alone on a replica that is rho * LATENCY_LEVELS
        busy, as headroom counts it, in seconds."""
        model, most = self.model(lengths_key), self.headroom_rates(lengths_key)
        configs, types = most.shape
        rows = np.repeat(np.arange(configs), types)
        alone = np.tile(np.eye(types), (configs, 1)) * most.ravel()[:, None]
        one = np.ones((len(rows), 1))
        found = [
            mean_latency_s(model, rows[:, None], one, busy * alone[:, None])
            for busy in self.config.max_utilisation * np.array(LATENCY_LEVELS)
        ]
        return np.array(found).reshape(-1, configs, types)
