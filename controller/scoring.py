"""Headroom and latency of many deployments at once, from rounded rates and lengths.

Everything is computed from the rounded figures, so that equal arguments give equal answers
whatever was asked before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller.assignment import solve_batch
from controller.deployments import Counts
from controller.service_model import (
    ServiceModel,
    build_service_model,
    feasible_configs,
    mean_latency_s,
)
from controller.workload import centres, prior
from engine.cluster import WorkloadTyping
from engine.errors import InfeasibleError
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]
Key = tuple[int, ...]  # of rounded logarithms
Value = TypeVar("Value")
MAX_LATENCY_S = 1e4  # what is reported where nothing is served
MAX_HEADROOM = 1e6
CACHE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """How the planner weighs load."""

    max_utilisation: float = 0.9  # rho: headroom 1 means the busiest replica is this busy
    floor_share: float = 0.02  # of the total rate, below which no type's rate is taken
    min_rate_per_s: float = 0.01  # total rate assumed when nothing is known
    rate_step: float = 0.02  # rates are rounded to multiples of it in ln, to be cached
    length_step: float = 0.1  # the same for observed mean lengths
    exhaustive_devices: int = 8  # pools up to this size are enumerated
    max_candidates: int = 12  # rows, keep included


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of B deployments at one rate vector; `shares[B, K, J]` go to rows[B, K]."""

    headroom: Floats
    latency_s: Floats
    shares: Floats
    rows: NDArray[np.int64]


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


def quantise(values: Floats, step: float) -> tuple[int, ...]:
    return tuple(np.rint(np.log(values) / step).astype(int).tolist())


def _layout(counts: Sequence[Counts]) -> tuple[NDArray[np.int64], Floats]:
    """rows[B, K], replicas[B, K]: the configurations each deployment uses, padded with zeros."""
    width = max(1, max(sum(n > 0 for n in c) for c in counts))
    rows = np.zeros((len(counts), width), np.int64)
    replicas = np.zeros((len(counts), width))
    for b, count in enumerate(counts):
        used = [i for i, n in enumerate(count) if n]
        rows[b, : len(used)] = used
        replicas[b, : len(used)] = [count[i] for i in used]
    return rows, replicas


class Scorer:
    """Scores deployments of one cluster for one typing. `configs` are the feasible ones."""

    def __init__(
        self, cluster: ProfiledCluster, typing: WorkloadTyping, config: PlannerConfig
    ) -> None:
        self.cluster, self.config = cluster, config
        self.configs = feasible_configs(cluster)
        if not self.configs:
            raise InfeasibleError(
                f"no profiled configuration of {cluster.spec.model.name} fits: each needs room "
                f"for the weights and {cluster.spec.model.max_model_len} KV tokens in "
                f"{cluster.spec.device_memory_bytes} bytes per device; profile larger ones."
            )
        self._centres, self._prior = centres(typing), prior(typing)
        self._models, self._layouts = Cache(64), Cache()

    def lengths_key(self, lengths: Floats | None) -> Key:
        given = self._centres if lengths is None else lengths
        return quantise(np.maximum(given, 1.0).ravel(), self.config.length_step)

    def model(self, lengths_key: Key) -> ServiceModel:
        def build() -> ServiceModel:
            lengths = np.exp(np.array(lengths_key) * self.config.length_step).reshape(-1, 2)
            return build_service_model(self.cluster, self.configs, lengths)

        return self._models.get(lengths_key, build)

    def rates_key(self, rates: ArrayLike) -> Key:
        """Total and shares of the rates, with the coverage floor, rounded in ln."""
        given = np.nan_to_num(np.maximum(np.asarray(rates, np.float64), 0.0))
        total = float(given.sum())
        if total < self.config.min_rate_per_s:
            total, given = self.config.min_rate_per_s, self._prior
        share = np.maximum(given / given.sum(), self.config.floor_share)
        return quantise(np.array([total, *share]), self.config.rate_step)

    def rates(self, rates_key: Key) -> Floats:
        total, *share = np.exp(np.array(rates_key) * self.config.rate_step)
        return np.asarray(total * np.array(share) / sum(share))

    def score(
        self,
        counts: tuple[Counts, ...],
        rates_keys: Sequence[Key],
        lengths_key: Key,
    ) -> list[Scores]:
        """Headroom, latency and shares of many deployments at each rate vector, in one batch."""
        model = self.model(lengths_key)
        rows, replicas = self._layouts.get(counts, lambda: _layout(counts))
        rates = np.repeat([self.rates(k) for k in rates_keys], len(rows), axis=0)[:, None, :]
        rows, replicas = (
            np.tile(rows, (len(rates_keys), 1)),
            np.tile(replicas, (len(rates_keys), 1)),
        )
        capacity = replicas * self.config.max_utilisation
        theta, shares = solve_batch(rates / model.rates[rows], capacity)
        latency_s = mean_latency_s(model, rows, replicas, shares * rates)
        served = theta > 0.0
        figures = (
            np.minimum(theta, MAX_HEADROOM),
            np.where(served, np.minimum(latency_s, MAX_LATENCY_S), MAX_LATENCY_S),
            shares,
            rows,
        )
        parts = (np.split(a, len(rates_keys)) for a in figures)
        return [Scores(*part) for part in zip(*parts, strict=True)]
