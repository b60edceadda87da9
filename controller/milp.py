"""Exact optima over replica counts as mixed-integer linear programmes, solved by HiGHS.

For mixes s of traffic with lambda_sj requests per second of type j, replicas that sustain n_cj of
it alone, y_c replicas of configuration c with g_c devices each, D devices alive, and rho the
utilisation allowed:

    sum_c f_scj = theta_s,   sum_j (lambda_sj / n_cj) f_scj <= rho y_c,   sum_c g_c y_c <= D,
    y integer, f >= 0

A load lambda_sj / n_cj of inf says that c cannot serve type j: f_scj is 0. Where no configuration
can, theta_s is 0 whatever the counts: that mix no longer tells them apart.

Identical replicas are exchangeable, so the size does not grow with the pool. To it come, as asked:
rows that say what nodes can hold (`controller.packing`), floors of theta_s, and what the change
from the present deployment costs. Objectives: the mean of the lowest thetas (CVaR; Rockafellar and
Uryasev, Journal of Risk 2, 2000), fewest devices, most traffic served, least latency.

The bytes of a change are a transport problem: t_rh ranks of new role r come to devices that hold
role h, each for the bytes that it lacks. For integer y its optimum is the assignment that
`engine.migration.placement` solves without nodes, so the bytes are exact within one node, and no
more than the true ones where groups must also share nodes: check those with `switch_cost`.

Latency is convex in load but not linear: a replica's requests are charged at the next of
`LATENCY_LEVELS` of its utilisation, each type as if it were alone. Everything else here is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from controller.deployments import Counts, Ints, fill
from controller.library import binds, dominated
from controller.packing import Nodes, group_sizes, groups, is_chain, packs, patterns, room
from engine.cluster import ClusterSpec, Deployment, ParallelConfig
from engine.migration.roles import IDLE, role_table

Floats = NDArray[np.float64]
GAP = 1e-7  # relative optimality gap
LATENCY_LEVELS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)  # of the utilisation allowed


@dataclass(frozen=True, slots=True)
class Changes:
    """What leaving a deployment costs: bytes[R, H] that new rank R lacks on a device with role H,
    of which there are held[H]; owner[R] is the configuration, whose every rank is listed. All moves
    share a budget, and no device receives more than `device_bytes`."""

    missing: Floats
    held: Ints
    owner: Ints
    budget_bytes: float
    device_bytes: float = np.inf


@dataclass(frozen=True, slots=True)
class Pool:
    """What may be deployed. `configs` and `nodes`: groups must fit into nodes."""

    sizes: Sequence[int]
    num_devices: int
    rho: float
    configs: tuple[ParallelConfig, ...] = ()
    nodes: Nodes = ()
    changes: Changes | None = None


def change_costs(
    spec: ClusterSpec,
    current: Deployment,
    configs: Sequence[ParallelConfig],
    budget_bytes: float,
    dead_devices: Sequence[int] = (),
    device_bytes: float = np.inf,
) -> Changes:
    """For `Pool.changes`: at most `budget_bytes` of weights may move, and at most `device_bytes` to
    any one device."""
    table = role_table(spec.model, {*configs, *current.configs})
    role = {d: IDLE for d in range(spec.num_devices) if d not in set(dead_devices)}
    for replica in current.replicas:
        for rank, device in enumerate(replica.placement.devices):
            if device in role:
                role[device] = table.first_role(replica.parallel) + rank
    roles, held = np.unique(list(role.values()), return_counts=True)
    needed = [table.first_role(c) + r for c in configs for r in range(c.num_devices)]
    owner = np.repeat(np.arange(len(configs)), [c.num_devices for c in configs])
    missing = table.missing[np.ix_(np.array(needed), roles)].astype(np.float64)
    return Changes(missing, held, owner, budget_bytes, device_bytes)


class _Programme:
    """Columns and rows as they are added; columns [0, C) are the replica counts y."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._bounds: list[tuple[int, float | Floats, bool]] = []  # how many, upper bound, integer
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self._limits: list[tuple[float, float]] = []
        self.width = 0
        for size in pool.sizes:
            self.add_columns(1, pool.num_devices // size, True)
        self.add_row(range(self.width), pool.sizes, -np.inf, pool.num_devices)
        if len(pool.nodes) > 1:
            self._pack()
        if pool.changes is not None:
            self._limit_changes(pool.changes)

    def add_columns(
        self, number: int, upper: float | Floats = np.inf, integer: bool = False
    ) -> Ints:
        """`upper`: one for all, or [number]."""
        self._bounds.append((number, upper, integer))
        self.width += number
        return np.arange(self.width - number, self.width)

    def add_row(
        self, columns: Sequence[int] | Ints, values: object, low: float, high: float
    ) -> None:
        cols = np.asarray(columns, np.int64)
        filled = np.broadcast_to(np.asarray(values, np.float64), cols.shape)
        self._entries.append((np.full(len(cols), len(self._limits)), cols, filled))
        self._limits.append((low, high))

    def _pack(self) -> None:
        pool = self.pool
        sizes, wanted = group_sizes(pool.configs), groups(pool.configs)
        if is_chain(sizes):
            for g, limit in enumerate(room(sizes, pool.nodes)):
                used = wanted[:, g:] @ np.array(sizes[g:])
                self.add_row(range(len(used)), used, -np.inf, limit)
            return
        kinds = sorted(set(pool.nodes))
        found = [np.array(list(patterns(sizes, kind))) for kind in kinds]
        columns = [
            self.add_columns(len(p), pool.nodes.count(k), True)
            for p, k in zip(found, kinds, strict=True)
        ]
        for kind, those in zip(kinds, columns, strict=True):
            self.add_row(those, 1.0, -np.inf, pool.nodes.count(kind))
        for g in range(len(sizes)):
            offered = np.concatenate([p[:, g] for p in found])
            every = np.concatenate([np.arange(len(wanted)), *columns])
            self.add_row(every, np.concatenate([wanted[:, g], -offered]), -np.inf, 0.0)

    def _limit_changes(self, changes: Changes) -> None:
        ranks, roles = changes.missing.shape
        most = np.where(changes.missing.ravel() <= changes.device_bytes, np.inf, 0.0)
        moves = self.add_columns(ranks * roles, most).reshape(ranks, roles)
        for rank in range(ranks):
            columns = np.append(moves[rank], changes.owner[rank])
            self.add_row(columns, np.append(np.ones(roles), -1.0), 0.0, 0.0)
        for role in range(roles):
            self.add_row(moves[:, role], 1.0, -np.inf, float(changes.held[role]))
        unit = max(float(changes.missing.max(initial=0.0)), 1.0)
        if changes.budget_bytes < np.inf:
            limit = changes.budget_bytes / unit
            self.add_row(moves.ravel(), changes.missing.ravel() / unit, -np.inf, limit)

    def add_mix(self, loads: Floats, served: Sequence[int] | Ints) -> Ints:
        """Flows f[C, J] of a mix; the columns `served`[J] are the multiples of each type."""
        configs, types = loads.shape
        loads, most = _without_unable(loads)
        flows = self.add_columns(configs * types, most.ravel()).reshape(configs, types)
        for j in range(types):
            columns = np.append(flows[:, j], served[j])
            self.add_row(columns, np.append(np.ones(configs), -1.0), 0.0, 0.0)
        for c in range(configs):
            columns = np.append(flows[c], c)
            self.add_row(columns, np.append(loads[c], -self.pool.rho), -np.inf, 0.0)
        return flows

    def solve(self, objective: Floats) -> Counts | None:
        """Counts that minimise the objective; None where no counts are feasible."""
        rows, cols, values = (np.concatenate(x) for x in zip(*self._entries, strict=True))
        low, high = np.array(self._limits).T
        matrix = coo_array((values, (rows, cols)), shape=(len(low), self.width)).tocsc()
        upper = np.concatenate([np.full(n, u) for n, u, _ in self._bounds])
        integer = np.concatenate([np.full(n, i) for n, _, i in self._bounds]).astype(int)
        found = milp(
            np.append(objective, np.zeros(self.width - len(objective))),
            constraints=LinearConstraint(matrix, low, high),
            integrality=integer,
            bounds=Bounds(0.0, upper),
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            assert found.status == 2, found.message
            return None
        return tuple(int(n) for n in np.rint(found.x[: len(self.pool.sizes)]))


def _without_unable(loads: Floats) -> tuple[Floats, Floats]:
    """Finite loads, and the largest flows: 0 where a load was inf."""
    able = np.isfinite(loads)
    return np.where(able, loads, 0.0), np.where(able, np.inf, 0.0)


def solve_milp(loads: Floats, sizes: Sequence[int], num_devices: int, rho: float) -> Counts:
    """Replica counts that maximise headroom; loads[C, J] = lambda_j / n_cj. Solver: HiGHS."""
    found = most_headroom(loads[None], Pool(sizes, num_devices, rho))
    assert found is not None  # nothing deployed is feasible
    return found


def _reduced(loads: Floats, pool: Pool) -> tuple[Floats, Pool, Callable[[Counts], Counts]]:
    """The same programme without dominated configurations (`controller.library`), which loses no
    optimum of what traffic is served, and how to read its counts. loads[S, C, J]."""
    if pool.changes is not None:
        return loads, pool, lambda counts: counts
    binding = binds(pool.configs, pool.nodes)
    groups = [c.tp for c in pool.configs] if binding else []
    rates = 1.0 / np.concatenate(list(loads), axis=1)
    fit = np.flatnonzero(~dominated(pool.sizes, rates, groups)).tolist()
    smaller = replace(
        pool,
        sizes=[pool.sizes[c] for c in fit],
        configs=tuple(pool.configs[c] for c in fit) if binding else (),
        nodes=pool.nodes if binding else (),
    )

    def expand(counts: Counts) -> Counts:
        known = dict(zip(fit, counts, strict=True))
        return tuple(known.get(c, 0) for c in range(len(pool.sizes)))

    return loads[:, fit], smaller, expand


def most_headroom(
    loads: Floats, pool: Pool, tail: float = 0.0, floors: Sequence[float] = ()
) -> Counts | None:
    """Counts that maximise the mean of the lowest share `tail` of headrooms over equally likely
    mixes loads[S, C, J] (0: the lowest alone), each headroom at least its floor.

    None: the floors, or the changes allowed, leave no deployment.
    """
    mixes, full = len(loads), pool
    loads, pool, expand = _reduced(loads, pool)
    scale = loads[np.isfinite(loads)].mean() if np.isfinite(loads).any() else 1.0
    programme = _Programme(pool)
    thetas = programme.add_columns(mixes)
    for s in range(mixes):
        programme.add_mix(loads[s] / scale, np.full(loads.shape[2], thetas[s]))
    for s, floor in enumerate(floors):
        programme.add_row(thetas[s : s + 1], 1.0, floor * scale, np.inf)
    level = programme.add_columns(1)  # eta
    below = programme.add_columns(mixes if tail * mixes > 1.0 else 0)  # z
    for s in range(mixes):
        columns = [level[0], thetas[s], *below[s : s + 1]]
        programme.add_row(columns, [-1.0, *[1.0] * (len(columns) - 1)], 0.0, np.inf)
    objective = np.zeros(programme.width)
    objective[level] = -1.0
    objective[below] = 1.0 / max(tail * mixes, 1.0) * (1.0 + 1e-9)
    found = programme.solve(objective)
    return None if found is None else filled(expand(found), full)


def fewest_devices(loads: Floats, pool: Pool, headroom: float = 1.0) -> Counts | None:
    """Counts on the fewest devices that serve `headroom` times every mix loads[S, C, J], and of
    those the counts with the most headroom in the worst mix. None: the pool is too small."""
    part, smaller, _ = _reduced(loads, pool)
    programme = _Programme(smaller)
    for mix in part:
        served = programme.add_columns(loads.shape[2])
        programme.add_mix(mix * headroom, served)
        for column in served:
            programme.add_row([column], 1.0, 1.0, 1.0)
    found = programme.solve(np.array(smaller.sizes, np.float64))
    if found is None:
        return None
    used = sum(n * size for n, size in zip(found, smaller.sizes, strict=True))
    return most_headroom(loads, replace(pool, num_devices=used))


def most_served(loads: Floats, values: Floats, pool: Pool) -> Counts:
    """Counts for overload: they serve the most traffic, a share a_j <= 1 of type j being worth
    a_j values[j]; loads[C, J]. `controller.assignment.admit` says which shares those are."""
    programme = _Programme(pool)
    served = programme.add_columns(len(values), 1.0)
    programme.add_mix(loads, served)
    objective = np.zeros(programme.width)
    objective[served] = -values / values.sum()
    found = programme.solve(objective)
    assert found is not None  # nothing deployed is feasible
    return filled(found, pool)


def least_latency(loads: Floats, latency_s: Floats, pool: Pool) -> Counts | None:
    """Counts that serve loads[C, J] with the least latency, sum_j lambda_j times it given as
    latency_s[L, C, J] at the utilisations rho * `LATENCY_LEVELS`. None: the pool is too small."""
    programme = _Programme(pool)
    levels, configs, types = latency_s.shape
    loads, most = _without_unable(loads)
    flows = programme.add_columns(levels * configs * types, np.tile(most.ravel(), levels))
    flows = flows.reshape(latency_s.shape)
    busy = programme.add_columns(levels * configs).reshape(levels, configs)
    for j in range(types):
        programme.add_row(flows[:, :, j].ravel(), 1.0, 1.0, 1.0)
    for c in range(configs):
        columns = np.append(busy[:, c], c)
        programme.add_row(columns, np.append(np.ones(levels), -1.0), 0.0, 0.0)
        for level, share in enumerate(LATENCY_LEVELS):
            columns = np.append(flows[level, c], busy[level, c])
            row = np.append(loads[c], -pool.rho * share)
            programme.add_row(columns, row, -np.inf, 0.0)
    objective = np.zeros(programme.width)
    objective[flows] = latency_s / latency_s.mean()
    found = programme.solve(objective)
    return None if found is None else filled(found, pool)


def filled(counts: Counts, pool: Pool) -> Counts:
    """With idle devices given to further replicas, the largest that fits first; not where a change
    must be paid for."""
    if pool.changes is not None:
        return counts
    if len(pool.nodes) < 2:
        return fill(counts, pool.sizes, pool.num_devices)
    found, order = np.array(counts), sorted(range(len(counts)), key=lambda i: -pool.sizes[i])
    for index in order:
        while True:
            more = found.copy()
            more[index] += 1
            within = more @ np.array(pool.sizes) <= pool.num_devices
            if not (within and packs(more[None], pool.configs, pool.nodes)[0]):
                break
            found = more
    return tuple(int(n) for n in found)
