"""From rates to deployments: the exact optimum, estimates of any deployment, and candidates.

Headroom theta is the served multiple of the given rates (`controller.assignment`, `milp`). Types
too rare to be seen keep a floor of the total rate, so that no plan leaves a type unserved. Small
pools are enumerated, which gives the MILP's optimum and scores every alternative on the way;
in larger ones the neighbourhoods of the optima and of the present deployment are scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller.deployments import (
    Counts,
    configs_of,
    counts_of,
    enumerate_counts,
    neighbours,
    size_of,
)
from controller.milp import solve_milp
from controller.predictor import Forecast
from controller.scoring import Cache, Key, PlannerConfig, Scorer, Scores
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    Deployment,
    ParallelConfig,
    Replica,
    WorkloadTyping,
)
from engine.migration.plan import switch_cost
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """What a deployment would do at given rates."""

    headroom: float
    latency_s: float
    routing: tuple[tuple[float, ...], ...]  # [type][replica]


class Planner:
    """Scores deployments of one cluster for one typing. Same arguments, same answer: the caches
    are keyed by rounded rates and everything is computed from those."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        typing: WorkloadTyping,
        config: PlannerConfig | None = None,
        default_configs: Sequence[ParallelConfig] | None = None,
    ) -> None:
        self.cluster, self.config = cluster, config or PlannerConfig()
        self.default_configs = tuple(default_configs) if default_configs else None
        self.scorer = Scorer(cluster, typing, self.config)
        self.configs = self.scorer.configs
        self._sizes = [c.num_devices for c in self.configs]
        self._kv_tokens = self.scorer.model(self.scorer.lengths_key(None)).kv_tokens
        self._estimates, self._plans = Cache(), Cache()
        self._optima, self._pools = Cache(), Cache(64)

    # -- public -------------------------------------------------------------------------

    def service_rates(self, lengths: Floats | None = None) -> Floats:
        """[C, J] requests per second of each type that one replica of each of `configs` sustains
        alone, at observed mean lengths[J, 2] (the types' centres by default)."""
        return self.scorer.model(self.scorer.lengths_key(lengths)).rates

    def estimate(
        self,
        configs: Sequence[ParallelConfig],
        rates: ArrayLike,
        lengths: Floats | None = None,
    ) -> PlanEstimate:
        """Headroom, mean latency and optimal routing of replicas `configs` at rates[J] per s."""
        rates_key, lengths_key = self.scorer.rates_key(rates), self.scorer.lengths_key(lengths)
        counts = counts_of(configs, self.configs)

        def build() -> PlanEstimate:
            (scores,) = self.scorer.score((counts,), [rates_key], lengths_key)
            routing = self._routing(tuple(configs), counts, scores.rows[0], scores.shares[0])
            return PlanEstimate(float(scores.headroom[0]), float(scores.latency_s[0]), routing)

        return self._estimates.get((tuple(configs), rates_key, lengths_key), build)

    def optimum(
        self, rates: ArrayLike, num_devices: int | None = None, lengths: Floats | None = None
    ) -> tuple[ParallelConfig, ...]:
        """Configurations of the MILP's optimum; depends on the mix of the rates only."""
        devices = self.cluster.spec.num_devices if num_devices is None else num_devices
        counts = self._milp(devices, self.scorer.rates_key(rates), self.scorer.lengths_key(lengths))
        return configs_of(counts, self.configs)

    def _milp(self, devices: int, rates_key: Key, lengths_key: Key) -> Counts:
        mix = (0, *rates_key[1:])

        def build() -> Counts:
            loads = self.scorer.rates(mix) / self.scorer.model(lengths_key).rates
            return solve_milp(loads, self._sizes, devices, self.config.max_utilisation)

        return self._optima.get((devices, mix, lengths_key), build)

    def propose(
        self,
        snapshot: ClusterSnapshot,
        forecast: Forecast,
        last_configs: Sequence[ParallelConfig] | None = None,
        lengths: Floats | None = None,
    ) -> tuple[Candidate, ...]:
        """Candidates for this tick: keep first, then what each rule proposes, without doubles.

        Where several rules name the same deployment, `origin` joins their names with '+'.
        """
        key = (
            _normal(snapshot.deployment),
            dead_replicas(snapshot),
            len(set(snapshot.dead_devices)),
            self.scorer.rates_key(forecast.q50),
            self.scorer.rates_key(forecast.q90),
            self.scorer.lengths_key(lengths),
            tuple(last_configs) if last_configs else None,
        )
        return self._plans.get(key, lambda: self._propose(*key))

    # -- candidates ---------------------------------------------------------------------

    def _propose(
        self,
        current: Deployment,
        dead: frozenset[int],
        num_dead_devices: int,
        q50: Key,
        q90: Key,
        lengths_key: Key,
        last: tuple[ParallelConfig, ...] | None,
    ) -> tuple[Candidate, ...]:
        devices = self.cluster.spec.num_devices - num_dead_devices
        live = counts_of([r.parallel for r in _live(current, dead)], self.configs)
        pool = self._pool(devices, live, (q50, q90), lengths_key, last)
        at50, at90 = self.scorer.score(pool, (q50, q90), lengths_key)
        chosen = self._choose(pool, at50, at90, devices, last)
        rows = [self._candidate(current, None, dead, pool, 0, at50, at90, chosen.get(0, ()))]
        present = counts_of(current.configs, self.configs)
        for index, origins in chosen.items():
            is_keep = index == 0 or pool[index] == present
            if not is_keep and len(rows) < self.config.max_candidates:
                target = configs_of(pool[index], self.configs)
                rows.append(
                    self._candidate(current, target, dead, pool, index, at50, at90, origins)
                )
        return tuple(rows)

    def _pool(
        self,
        devices: int,
        live: Counts,
        rates_keys: Iterable[Key],
        lengths_key: Key,
        last: tuple[ParallelConfig, ...] | None,
    ) -> tuple[Counts, ...]:
        """Deployments to score: the live replicas first, then the others without doubles."""
        named = [counts_of(c, self.configs) for c in (last, self.default_configs) if c]
        fitting = [c for c in named if any(c) and size_of(c, self._sizes) <= devices]
        if devices <= self.config.exhaustive_devices:
            return self._pools.get(
                (devices, live, tuple(fitting)),
                lambda: tuple(dict.fromkeys([live, *self._all(devices), *fitting])),
            )
        optima = [self._milp(devices, key, lengths_key) for key in rates_keys]
        around = [n for c in dict.fromkeys([live, *optima]) for n in self._near(c, devices)]
        return tuple(dict.fromkeys([live, *optima, *self._homogeneous(devices), *fitting, *around]))

    def _near(self, counts: Counts, devices: int) -> tuple[Counts, ...]:
        return self._pools.get(
            ("near", counts, devices), lambda: tuple(neighbours(counts, self._sizes, devices))
        )

    def _all(self, devices: int) -> tuple[Counts, ...]:
        return (*enumerate_counts(self._sizes, devices), *self._homogeneous(devices))

    def _homogeneous(self, devices: int) -> list[Counts]:
        fitting = [i for i, size in enumerate(self._sizes) if size <= devices]
        return [
            tuple(devices // self._sizes[i] if j == i else 0 for j in range(len(self._sizes)))
            for i in fitting
        ]

    def _choose(
        self,
        pool: tuple[Counts, ...],
        at50: Scores,
        at90: Scores,
        devices: int,
        last: tuple[ParallelConfig, ...] | None,
    ) -> dict[int, list[str]]:
        """Index in the pool -> rules that name it, in order of importance."""
        kv_tokens = np.array(pool) @ self._kv_tokens
        where = {counts: i for i, counts in enumerate(pool)}
        alike = [where[c] for c in self._homogeneous(devices)]
        picks = [
            ("optimum", _best(at50.headroom)),
            ("lowest_latency", _fastest(at50)),
            ("optimum_q90", _best(at90.headroom)),
            ("lowest_latency_q90", _fastest(at90)),
            ("homogeneous", alike[_best(at50.headroom[alike])] if alike else 0),
            ("largest_kv", _best(np.where(kv_tokens >= kv_tokens.max(), at50.headroom, -1.0))),
        ]
        for name, configs in (("undo", last), ("default", self.default_configs)):
            index = where.get(counts_of(configs, self.configs)) if configs else None
            if index is not None:
                picks.append((name, index))
        chosen: dict[int, list[str]] = {}
        for name, index in picks:
            chosen.setdefault(index, []).append(name)
        return chosen

    def _candidate(
        self,
        current: Deployment,
        target: tuple[ParallelConfig, ...] | None,
        dead: frozenset[int],
        pool: tuple[Counts, ...],
        index: int,
        at50: Scores,
        at90: Scores,
        origins: Sequence[str],
    ) -> Candidate:
        """A row; target None is keep, whose dead replicas get no traffic."""
        spec, counts = self.cluster.spec, pool[index]
        configs = current.configs if target is None else target
        routing = self._routing(
            configs, counts, at50.rows[index], at50.shares[index], dead if target is None else ()
        )
        cost = None if target is None else switch_cost(spec, current, target)
        overhead_s = self.cluster.profile.switch_overhead_s
        kv_tokens = self._kv_tokens
        return Candidate(
            configs=configs,
            origin="+".join((["keep"] if target is None else []) + list(origins)),
            routing=routing,
            headroom=float(at50.headroom[index]),
            headroom_q90=float(at90.headroom[index]),
            latency_s=float(at50.latency_s[index]),
            kv_capacity_tokens=int(np.array(counts) @ kv_tokens),
            weight_bytes=cost.weight_bytes if cost else 0,
            switch_s=cost.seconds + overhead_s if cost else 0.0,
            num_devices_changed=cost.devices_changed if cost else 0,
        )

    def _routing(
        self,
        configs: tuple[ParallelConfig, ...],
        counts: Counts,
        rows: NDArray[np.int64],
        shares: Floats,
        dead: Iterable[int] = (),
    ) -> tuple[tuple[float, ...], ...]:
        """[type][replica]: the share of a configuration, split evenly over its live replicas."""
        lost = set(dead)
        of_config = {}
        for row, share in zip(rows.tolist(), shares, strict=True):
            if counts[row] and row not in of_config:
                of_config[row] = share / counts[row]
        columns = np.zeros((len(configs), shares.shape[1]))
        for i, parallel in enumerate(configs):
            if i not in lost and parallel in self.configs:
                columns[i] = of_config.get(self.configs.index(parallel), 0.0)
        return tuple(map(tuple, columns.T.tolist()))


def _best(values: Floats) -> int:
    """Index of the largest value; among equals (to 1e-9) the first, so that keep wins ties."""
    return int(np.argmax(values >= values.max() * (1.0 - 1e-9)))


def _fastest(scores: Scores) -> int:
    """Least latency among those with headroom >= 1; the most headroom when there are none."""
    if not (scores.headroom >= 1.0).any():
        return _best(scores.headroom)
    latency_s = np.where(scores.headroom >= 1.0, scores.latency_s, np.inf)
    return int(np.argmax(latency_s <= latency_s.min() * (1.0 + 1e-9)))


def _normal(deployment: Deployment) -> Deployment:
    """The deployment with replica ids 0, 1, ...: costs depend on configurations and devices only,
    so normal ids let caches outlive a switch."""
    return Deployment(
        tuple(Replica(i, r.parallel, r.placement) for i, r in enumerate(deployment.replicas))
    )


def dead_replicas(snapshot: ClusterSnapshot) -> frozenset[int]:
    """Positions in the deployment of replicas on dead devices or reported dead."""
    lost, silent = (
        set(snapshot.dead_devices),
        {s.replica_id for s in snapshot.replicas if not s.alive},
    )
    return frozenset(
        i
        for i, r in enumerate(snapshot.deployment.replicas)
        if r.replica_id in silent or not lost.isdisjoint(r.placement.devices)
    )


def _live(deployment: Deployment, dead: frozenset[int]) -> list[Replica]:
    return [r for i, r in enumerate(deployment.replicas) if i not in dead]
