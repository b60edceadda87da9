"""From rates to deployments: the exact optimum, estimates of any deployment, and candidates.

Headroom theta is the served multiple of the given rates (`controller.assignment`). Types too rare
to be seen keep a floor of the total rate, so that no plan leaves a type unserved. What is best by
each objective is found by `controller.optima`: in the library of all deployments up to 32 devices,
by the MILP beyond.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller.assignment import admit
from controller.deployments import Counts, configs_of, counts_of
from controller.library import LIBRARY_DEVICES, MAX_DEPLOYMENTS, Space, has_library
from controller.optima import Optima, Search
from controller.packing import nodes_of
from controller.predictor import Forecast
from controller.scoring import Cache, Demand, Key, PlannerConfig, Scorer
from controller.slo_rates import SloRates
from controller.switch_costs import Budget, SwitchCosts
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    Deployment,
    ParallelConfig,
    Replica,
    WorkloadTyping,
)
from engine.errors import InvalidRequestError
from engine.migration.plan import normal
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]
Routes = tuple[tuple[float, ...], ...]  # [type][replica]


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """What a deployment would do at given rates."""

    headroom: float
    latency_s: float
    routing: Routes


class _Tick(NamedTuple):
    """What the candidates of one tick follow from."""

    switches: SwitchCosts  # from the present deployment
    dead: frozenset[int]  # positions of dead replicas
    space: Space
    q50: Key
    q90: Key
    lengths_key: Key
    last: tuple[ParallelConfig, ...] | None
    recent: tuple[Key, ...]


class Planner:
    """Scores deployments of one cluster for one typing. Same arguments, same answer: the caches
    are keyed by rounded rates and everything is computed from those."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        typing: WorkloadTyping,
        config: PlannerConfig | None = None,
        default_configs: Sequence[ParallelConfig] | None = None,
        slo_rates: SloRates | None = None,
    ) -> None:
        self.cluster, self.config = cluster, config or PlannerConfig()
        self.standing: tuple[tuple[ParallelConfig, ...], ...] = ()  # always candidates
        if default_configs:
            self.standing = (tuple(default_configs),)
        self.scorer = Scorer(cluster, typing, self.config, slo_rates)
        self.configs, self.optima = self.scorer.configs, Optima(self.scorer)
        self._kv_tokens = self.scorer.model(self.scorer.lengths_key(None)).kv_tokens
        self._kv_each: list[int] = self._kv_tokens.astype(int).tolist()
        self._estimates, self._plans = Cache(), Cache(256)  # a plan is asked for again soon
        self._switches, self._costs, self._parts = Cache(256), Cache(256), Cache()
        self._mixes = Cache(256)
        listed = has_library(self.configs, self._space(()))
        self.is_quick = listed and self.config.planner == "exact"  # solves no MILP
        if self.config.planner == "exhaustive" and not listed:
            raise InvalidRequestError(
                f"planner 'exhaustive' is for at most {LIBRARY_DEVICES} devices and "
                f"{MAX_DEPLOYMENTS} deployments, and the pool of {cluster.spec.num_devices} "
                "devices has more; set planner to 'exact' or max_devices to fewer."
            )

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
        mixing: Floats | None = None,
    ) -> PlanEstimate:
        """Headroom, mean latency and optimal routing of replicas `configs` at rates[J] per s.

        mixing[J, J]: what requests taken for each type at arrival turn out to be
        (`controller.workload.PromptPosterior.mixing`); None: types are known at arrival.
        """
        rates_key = self.scorer.rates_key(rates)
        lengths_key = self.scorer.lengths_key(lengths, mixing)
        counts = counts_of(configs, self.configs)

        def build() -> PlanEstimate:
            listed = np.array([counts], np.float64)
            (scores,) = self.scorer.score(listed, [rates_key], lengths_key)
            routing = self._routing(configs, counts, scores.shares[0])
            return PlanEstimate(float(scores.headroom[0]), float(scores.latency_s[0]), routing)

        return self._estimates.get((tuple(configs), rates_key, lengths_key), build)

    def admission(
        self,
        configs: Sequence[ParallelConfig],
        rates: ArrayLike,
        values: ArrayLike | None = None,
        lengths: Floats | None = None,
    ) -> tuple[float, ...]:
        """[J] the share of each type that replicas `configs` should admit: the most traffic, a
        request of type j being worth values[j] (1 by default), within the utilisation allowed."""
        counts = np.array(counts_of(configs, self.configs), np.float64)
        rates_key, lengths_key = self.scorer.rates_key(rates), self.scorer.lengths_key(lengths)
        lam, service = self.scorer.rates(rates_key), self.scorer.headroom_rates(lengths_key)
        worth = np.ones_like(lam) if values is None else np.asarray(values, np.float64)
        capacity = self.config.max_utilisation * counts
        return tuple(admit(lam, service, capacity, worth * lam).tolist())

    def optimum(
        self,
        rates: ArrayLike,
        num_devices: int | None = None,
        lengths: Floats | None = None,
        mixing: Floats | None = None,
    ) -> tuple[ParallelConfig, ...]:
        """Configurations of the exact optimum by the objective that the config names, or of what
        its planner finds. That of goodput depends on the mix of the rates only."""
        rates_key = self.scorer.rates_key(rates)
        lengths_key = self.scorer.lengths_key(lengths, mixing)
        space = self._space((), num_devices)
        if self.config.planner != "exact":
            counts = self.optima.by_planner(space, rates_key, lengths_key)
        elif self.optima.library(space) is None and self.config.objective == "goodput":
            counts = self.optima.milp_headroom(space, (rates_key,), lengths_key)
        else:
            nothing = (0,) * len(self.configs)
            search = self.optima.search(space, lengths_key, nothing, (rates_key,))
            counts = self._best(search, rates_key, rates_key)
        return configs_of(counts, self.configs)

    def propose(
        self,
        snapshot: ClusterSnapshot,
        forecast: Forecast,
        last_configs: Sequence[ParallelConfig] | None = None,
        lengths: Floats | None = None,
        recent: Sequence[tuple[float, ...]] = (),
        mixing: Floats | None = None,
    ) -> tuple[Candidate, ...]:
        """Candidates for this tick: keep first, then what each rule proposes, without doubles.

        Where several rules name the same deployment, `origin` joins their names with '+'. `recent`
        are rates[J] seen lately, whose mixes may come again; `mixing` as for `estimate`.
        """
        now = snapshot.deployment
        tick = _Tick(
            self._switches.get(id(now), lambda: (now, self._costs_from(normal(now))))[1],
            dead_replicas(snapshot),
            self._space(snapshot.dead_devices),
            self.scorer.rates_key(forecast.q50),
            self.scorer.rates_key(forecast.q90),
            self.scorer.lengths_key(lengths, mixing),
            tuple(last_configs) if last_configs else None,
            tuple([self._mixes.get(seen, partial(self.scorer.rates_key, seen)) for seen in recent]),
        )
        return self._plans.get(tick, lambda: self._propose(tick))

    def _space(self, dead_devices: Sequence[int], num_devices: int | None = None) -> Space:
        def build() -> Space:
            nodes = nodes_of(self.cluster.spec, dead_devices)
            budget = num_devices or self.config.max_devices or sum(nodes)
            return Space(nodes, min(budget, sum(nodes)))

        return self._parts.get((tuple(dead_devices), num_devices), build)

    # -- candidates ---------------------------------------------------------------------

    def _propose(self, tick: _Tick) -> tuple[Candidate, ...]:
        present, live = tick.switches.counts, tick.switches.counts
        if tick.dead:
            living = _live(tick.switches.current, tick.dead)
            live = counts_of([r.parallel for r in living], self.configs)
        named: list[tuple[str, Counts]] = []
        standing = [("default", configs) for configs in self.standing]
        for name, configs in (("undo", tick.last), *standing):
            counts = self._fitting(configs, tick.space) if configs else None
            named += [(name, counts)] if counts else []
        search = self.optima.search(
            tick.space, tick.lengths_key, live, (tick.q50, tick.q90), [c for _, c in named]
        )
        demand = self.scorer.scenarios(tick.q50, tick.q90, tick.recent, tick.lengths_key)
        chosen: dict[Counts, list[str]] = {live: []}
        for name, counts in [*self._picks(tick, search, demand), *named]:
            is_keep = counts == present
            chosen.setdefault(live if is_keep else counts, []).append(name)
        rows = list(chosen.items())[: self.config.max_candidates]
        return self._candidates(tick, rows, demand.first(2))

    def _fitting(self, configs: Sequence[ParallelConfig], space: Space) -> Counts | None:
        """Counts of those configurations; None where there is no room for them, or where they
        should be alike and are not."""

        def build() -> Counts | None:
            counts = counts_of(configs, self.configs)
            mixed = self.config.homogeneous and len(set(configs)) > 1
            wanted = any(counts) and not mixed and self.optima.fits([counts], space)[0]
            return counts if wanted else None

        return self._parts.get((configs, space), build)

    def _best(self, search: Search, q50: Key, q90: Key) -> Counts:
        """By the objective and the planner that the config names."""
        if self.config.planner != "exact":
            return self.optima.by_planner(search.space, q50, search.lengths_key)
        if self.config.objective == "latency":
            return self.optima.least_latency(search, q50)
        if self.config.objective == "cost":
            fewest = self.optima.fewest_devices(search, q90)
            return fewest or self.optima.most_headroom(search, self.scorer.rates(q90)[None])
        return self.optima.most_headroom(search, self.scorer.rates(q50)[None])

    def _picks(self, tick: _Tick, search: Search, demand: Demand) -> list[tuple[str, Counts]]:
        """(rule, deployment), in order of importance."""
        if not len(search.listed):  # too few devices are alive for any replica
            return []
        optima, q50, q90 = self.optima, tick.q50, tick.q90
        most, most_q90, robust, fastest, fastest_q90, alike, roomy = optima.best_each(
            search, demand, self.config.worst_share, self._largest_kv(search)
        )
        budget = Budget(self.config.switch_budget_bytes, self.config.switch_budget_s)
        if self.config.planner == "exact" and self.config.objective == "goodput":
            picks = [("optimum", most)]
        else:
            picks = [("optimum", self._best(search, q50, q90))]
        if self.config.objective != "goodput":
            picks.append(("most_headroom", most))
        picks += [
            ("lowest_latency", fastest),
            ("optimum_q90", most_q90),
            ("lowest_latency_q90", fastest_q90),
            ("homogeneous", alike),
            ("largest_kv", roomy),
            ("robust", robust),
            ("cheap_switch", optima.cheap_switch(search, q50, tick.switches, budget)),
        ]
        if self.config.give_back and self.config.objective != "cost":
            fewest = optima.fewest_devices(search, q90)
            picks += [] if fewest is None else [("fewest_devices", fewest)]
        return picks

    def _largest_kv(self, search: Search) -> Floats:
        def build() -> Floats:
            tokens = search.listed @ self._kv_tokens
            return np.asarray(search.listed[tokens >= tokens.max(initial=0.0)])

        if self.optima.library(search.space) is None:
            return build()
        return self._parts.get(("kv", search.space), build)

    def _costs_from(self, current: Deployment) -> SwitchCosts:
        return self._costs.get(
            current, lambda: SwitchCosts(self.cluster.spec, current, self.configs)
        )

    def _candidates(
        self, tick: _Tick, rows: Sequence[tuple[Counts, list[str]]], demand: Demand
    ) -> tuple[Candidate, ...]:
        """At the median demand and the high one. The first row is keep, whose dead replicas get no
        traffic."""
        listed = np.array([counts for counts, _ in rows], np.float64)
        scores = self.scorer.score_at(listed, demand)
        headroom, headroom_q90 = scores.headroom.tolist()
        latency_s, shares = scores.latency_s[0].tolist(), scores.shares[0]
        costs, overhead_s = tick.switches, self.cluster.profile.switch_overhead_s
        found = []
        for i, (counts, origins) in enumerate(rows):
            configs = configs_of(counts, self.configs) if i else costs.current.configs
            cost = costs.cost(counts) if i else None
            found.append(
                Candidate(
                    configs=configs,
                    origin="+".join(origins if i else ["keep", *origins]),
                    routing=self._routing(configs, counts, shares[i], () if i else tick.dead),
                    headroom=headroom[i],
                    headroom_q90=headroom_q90[i],
                    latency_s=latency_s[i],
                    kv_capacity_tokens=sum(map(mul, counts, self._kv_each)),
                    weight_bytes=cost.weight_bytes if cost else 0,
                    switch_s=cost.seconds + overhead_s if cost else 0.0,
                    num_devices_changed=cost.devices_changed if cost else 0,
                )
            )
        return tuple(found)

    def _routing(
        self,
        configs: Sequence[ParallelConfig],
        counts: Counts,
        shares: Floats,
        dead: Collection[int] = (),
    ) -> Routes:
        """[type][replica] from shares[C][J], split evenly over the live replicas of each, of which
        there are counts[C]; the dead get nothing."""
        nothing = [0.0] * shares.shape[1]
        each = {
            self.configs[c]: [share / number for share in shares[c].tolist()]
            for c, number in enumerate(counts)
            if number
        }
        columns = [
            nothing if i in dead else each.get(parallel, nothing)
            for i, parallel in enumerate(configs)
        ]
        return tuple(zip(*columns, strict=True)) if columns else ((),) * len(nothing)


def dead_replicas(snapshot: ClusterSnapshot) -> frozenset[int]:
    """Positions in the deployment of replicas on dead devices or reported dead."""
    lost, silent = (
        set(snapshot.dead_devices),
        {s.replica_id for s in snapshot.replicas if not s.alive},
    )
    if not (lost or silent):
        return frozenset()
    return frozenset(
        i
        for i, r in enumerate(snapshot.deployment.replicas)
        if r.replica_id in silent or not lost.isdisjoint(r.placement.devices)
    )


def _live(deployment: Deployment, dead: frozenset[int]) -> list[Replica]:
    return [r for i, r in enumerate(deployment.replicas) if i not in dead]
