"""From rates to deployments: the exact optimum, estimates of any deployment, and candidates.

Headroom theta is the served multiple of the given rates (algorithm and derivation:
`controller.assignment`); maximising it over replica counts y_c too is a small MILP,

    max theta   s.t.  sum_c f_cj = theta,   sum_j (lambda_j / n_cj) f_cj <= rho y_c,
                      sum_c g_c y_c <= D,   y integer, f >= 0

with g_c devices per replica, D devices alive and rho the utilisation allowed. Types too rare to
be seen keep a floor of the total rate, so that no plan leaves a type unserved. Small pools are
enumerated instead, which gives the same optimum and scores every alternative on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from controller.assignment import solve_batch
from controller.deployments import (
    Counts,
    configs_of,
    counts_of,
    enumerate_counts,
    fill,
    neighbours,
    size_of,
)
from controller.predictor import Forecast
from controller.service_model import (
    ServiceModel,
    build_service_model,
    feasible_configs,
    mean_latency_s,
)
from controller.workload import centres, prior
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    Deployment,
    ParallelConfig,
    Replica,
    WorkloadTyping,
    deployment_key,
)
from engine.errors import InfeasibleError
from engine.migration.plan import switch_cost
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]
Value = TypeVar("Value")
MAX_LATENCY_S = 1e4  # what is reported where nothing is served
MAX_HEADROOM = 1e6
CACHE_SIZE = 4096
GAP = 1e-6  # relative optimality gap of the MILP


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
class PlanEstimate:
    """What a deployment would do at given rates."""

    headroom: float
    latency_s: float
    routing: tuple[tuple[float, ...], ...]  # [type][replica]


@dataclass(frozen=True, slots=True)
class _Scores:
    """Figures of B deployments at one rate vector; `shares[B, K, J]` go to rows[B, K]."""

    headroom: Floats
    latency_s: Floats
    shares: Floats
    rows: NDArray[np.int64]


class _Cache:
    """Bounded memo; the oldest entry goes first."""

    def __init__(self, size: int = CACHE_SIZE) -> None:
        self._entries: dict[Hashable, object] = {}
        self._size = size

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._entries:
            if len(self._entries) >= self._size:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = make()
        return self._entries[key]  # type: ignore[return-value]


def _quantise(values: Floats, step: float) -> tuple[int, ...]:
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


def solve_milp(loads: Floats, sizes: Sequence[int], num_devices: int, rho: float) -> Counts:
    """Replica counts that maximise headroom; loads[C, J] = lambda_j / n_cj. Solver: HiGHS."""
    num_configs, num_types = loads.shape
    scaled = loads / loads.mean()
    width = 1 + num_configs + num_configs * num_types  # theta, y, f
    demand = np.zeros((num_types, width))
    demand[:, 0] = -1.0
    capacity = np.zeros((num_configs + 1, width))
    for c in range(num_configs):
        first = 1 + num_configs + c * num_types
        demand[:, first : first + num_types] = np.eye(num_types)
        capacity[c, first : first + num_types] = scaled[c]
        capacity[c, 1 + c] = -rho
    capacity[-1, 1 : 1 + num_configs] = sizes
    limit = np.zeros(num_configs + 1)
    limit[-1] = num_devices
    integrality = np.zeros(width)
    integrality[1 : 1 + num_configs] = 1
    objective = np.zeros(width)
    objective[0] = -1.0
    found = milp(
        objective,
        constraints=[LinearConstraint(demand, 0, 0), LinearConstraint(capacity, -np.inf, limit)],
        integrality=integrality,
        bounds=Bounds(0, np.inf),
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message  # y = 0 is feasible and theta is bounded
    counts = tuple(int(n) for n in np.rint(found.x[1 : 1 + num_configs]))
    return fill(counts, sizes, num_devices)


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
        self.configs = feasible_configs(cluster)
        if not self.configs:
            raise InfeasibleError(
                f"no profiled configuration of {cluster.spec.model.name} fits: each needs room "
                f"for the weights and {cluster.spec.model.max_model_len} KV tokens in "
                f"{cluster.spec.device_memory_bytes} bytes per device; profile larger ones."
            )
        self._sizes = [c.num_devices for c in self.configs]
        self._centres, self._prior = centres(typing), prior(typing)
        self._models, self._scores, self._plans = _Cache(64), _Cache(), _Cache()
        self._optima, self._layouts, self._pools = _Cache(), _Cache(), _Cache(64)

    # -- quantities ---------------------------------------------------------------------

    def _lengths_key(self, lengths: Floats | None) -> tuple[int, ...]:
        given = self._centres if lengths is None else lengths
        return _quantise(np.maximum(given, 1.0).ravel(), self.config.length_step)

    def _model(self, lengths_key: tuple[int, ...]) -> ServiceModel:
        def build() -> ServiceModel:
            lengths = np.exp(np.array(lengths_key) * self.config.length_step).reshape(-1, 2)
            return build_service_model(self.cluster, self.configs, lengths)

        return self._models.get(lengths_key, build)

    def _rates_key(self, rates: ArrayLike) -> tuple[int, ...]:
        """Rates with the coverage floor, rounded."""
        given = np.nan_to_num(np.maximum(np.asarray(rates, np.float64), 0.0))
        total = max(float(given.sum()), self.config.min_rate_per_s)
        if given.sum() < self.config.min_rate_per_s:
            given = self._prior * total
        return _quantise(
            np.maximum(given, self.config.floor_share * total), self.config.rate_step
        )

    def _score(
        self, counts: tuple[Counts, ...], rates_key: tuple[int, ...], lengths_key: tuple[int, ...]
    ) -> _Scores:
        """Headroom, latency and shares of many deployments at once."""
        model = self._model(lengths_key)
        rates = np.exp(np.array(rates_key) * self.config.rate_step)
        rows, replicas = self._layouts.get(counts, lambda: _layout(counts))
        capacity = replicas * self.config.max_utilisation
        theta, shares = solve_batch(rates / model.rates[rows], capacity)
        latency_s = mean_latency_s(model, rows, replicas, shares * rates)
        served = theta > 0.0
        return _Scores(
            np.minimum(theta, MAX_HEADROOM),
            np.where(served, np.minimum(latency_s, MAX_LATENCY_S), MAX_LATENCY_S),
            shares,
            rows,
        )

    # -- public -------------------------------------------------------------------------

    def service_rates(self, lengths: Floats | None = None) -> Floats:
        """[C, J] requests per second of each type that one replica of each of `configs` sustains
        alone, at observed mean lengths[J, 2] (the types' centres by default)."""
        return self._model(self._lengths_key(lengths)).rates

    def estimate(
        self,
        configs: Sequence[ParallelConfig],
        rates: ArrayLike,
        lengths: Floats | None = None,
    ) -> PlanEstimate:
        """Headroom, mean latency and optimal routing of replicas `configs` at rates[J] per s."""
        rates_key, lengths_key = self._rates_key(rates), self._lengths_key(lengths)
        counts = counts_of(configs, self.configs)

        def build() -> PlanEstimate:
            scores = self._score((counts,), rates_key, lengths_key)
            routing = self._routing(tuple(configs), counts, scores.rows[0], scores.shares[0])
            return PlanEstimate(float(scores.headroom[0]), float(scores.latency_s[0]), routing)

        return self._scores.get((tuple(configs), rates_key, lengths_key), build)

    def optimum(
        self, rates: ArrayLike, num_devices: int | None = None, lengths: Floats | None = None
    ) -> tuple[ParallelConfig, ...]:
        """Configurations of the MILP's optimum; depends on the mix of the rates only."""
        devices = self.cluster.spec.num_devices if num_devices is None else num_devices
        counts = self._milp(devices, self._rates_key(rates), self._lengths_key(lengths))
        return configs_of(counts, self.configs)

    def _milp(
        self, devices: int, rates_key: tuple[int, ...], lengths_key: tuple[int, ...]
    ) -> Counts:
        mix = tuple(r - max(rates_key) for r in rates_key)

        def build() -> Counts:
            rates = np.exp(np.array(mix) * self.config.rate_step)
            loads = rates / self._model(lengths_key).rates
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
            _dead_replicas(snapshot),
            len(set(snapshot.dead_devices)),
            self._rates_key(forecast.q50),
            self._rates_key(forecast.q90),
            self._lengths_key(lengths),
            tuple(last_configs) if last_configs else None,
        )
        return self._plans.get(key, lambda: self._propose(*key))

    # -- candidates ---------------------------------------------------------------------

    def _propose(
        self,
        current: Deployment,
        dead: frozenset[int],
        num_dead_devices: int,
        q50: tuple[int, ...],
        q90: tuple[int, ...],
        lengths_key: tuple[int, ...],
        last: tuple[ParallelConfig, ...] | None,
    ) -> tuple[Candidate, ...]:
        devices = self.cluster.spec.num_devices - num_dead_devices
        live = counts_of([r.parallel for r in _live(current, dead)], self.configs)
        pool = self._pool(devices, live, (q50, q90), lengths_key, last)
        at50, at90 = (self._score(pool, q, lengths_key) for q in (q50, q90))
        chosen = self._choose(pool, at50, at90, devices, last, lengths_key)
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
        rates_keys: Iterable[tuple[int, ...]],
        lengths_key: tuple[int, ...],
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
        return tuple(
            dict.fromkeys([live, *optima, *self._homogeneous(devices), *fitting, *around])
        )

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
        at50: _Scores,
        at90: _Scores,
        devices: int,
        last: tuple[ParallelConfig, ...] | None,
        lengths_key: tuple[int, ...],
    ) -> dict[int, list[str]]:
        """Index in the pool -> rules that name it, in order of importance."""
        kv_tokens = np.array(pool) @ self._model(lengths_key).kv_tokens
        where = {counts: i for i, counts in enumerate(pool)}
        alike = [where[c] for c in self._homogeneous(devices)]
        picks = [
            ("optimum", _best(at50.headroom)),
            ("lowest_latency", _fastest(at50)),
            ("optimum_q90", _best(at90.headroom)),
            ("lowest_latency_q90", _fastest(at90)),
            ("homogeneous", alike[_best(at50.headroom[alike])] if alike else 0),
            ("largest_kv", _best(kv_tokens * (1.0 + 1e-9 * at50.headroom / MAX_HEADROOM))),
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
        at50: _Scores,
        at90: _Scores,
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
        kv_tokens = self._model(self._lengths_key(None)).kv_tokens
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


def _fastest(scores: _Scores) -> int:
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


def _dead_replicas(snapshot: ClusterSnapshot) -> frozenset[int]:
    """Positions in the deployment of replicas on dead devices or reported dead."""
    lost, silent = set(snapshot.dead_devices), {s.replica_id for s in snapshot.replicas if not s.alive}
    return frozenset(
        i
        for i, r in enumerate(snapshot.deployment.replicas)
        if r.replica_id in silent or not lost.isdisjoint(r.placement.devices)
    )


def _live(deployment: Deployment, dead: frozenset[int]) -> list[Replica]:
    return [r for i, r in enumerate(deployment.replicas) if i not in dead]


def same_deployment(one: Sequence[ParallelConfig], other: Sequence[ParallelConfig]) -> bool:
    return deployment_key(one) == deployment_key(other)
