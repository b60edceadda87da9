"""Pure: which device takes which new rank, for the fewest bytes received.

Putting new rank r on device d costs c(d, r) = |what r needs and d does not hold|. Every missing
byte must arrive at least once, so the least sum of c over placements is the exact minimum for any
plan (SpotServe, arXiv 2311.15566, uses the same matching for device mapping).

Without nodes this is an assignment problem, and as many replicas as possible stay untouched at no
cost: |r' \\ h| <= |r' \\ r| + |r \\ h|, so exchanging two ranks until a replica is back on its own
devices never adds bytes. With nodes, tp groups that fit a node must share one. Then the kept
replicas are put first and the rest is filled greedily; if that meets the bound of the assignment
without nodes, it is the minimum with the most replicas untouched. If not, the exact programme of
`engine.migration.nodes` decides over all replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from engine.cluster import ClusterSpec, Deployment, ParallelConfig, Placement, Replica
from engine.errors import InfeasibleError
from engine.migration.nodes import (
    Filling,
    Node,
    Unit,
    assign,
    fill_exactly,
    fill_greedily,
    units_of,
)
from engine.migration.roles import IDLE, RoleTable, role_table
from engine.shards import check_memory

TIME_LIMIT_S = 1.0  # for the exact programme
Chosen = dict[Unit, list[tuple[int, ...]]]  # devices of every copy of a unit


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement, the bytes its ranks lack, and what no placement can do with less than.

    The two are equal unless the exact programme was cut short (time or number of patterns), or
    some tp group had to be spread over nodes because none had room for it.
    """

    deployment: Deployment
    missing_bytes: int
    lower_bound_bytes: int


@dataclass(frozen=True, slots=True)
class _Problem:
    table: RoleTable
    node_size: int
    devices: tuple[int, ...]  # alive
    role: dict[int, int]  # device -> role held
    current: tuple[Replica, ...]  # with all devices alive
    target: tuple[ParallelConfig, ...]
    num_nodes: int

    def node_of(self, node: Node) -> int:
        return node.devices[0] // self.node_size

    def units(self, configs: Iterable[ParallelConfig]) -> Counter[Unit]:
        return Counter(u for c in configs for u in units_of(c, self.node_size))

    def unit_devices(self, replica: Replica) -> dict[Unit, tuple[int, ...]]:
        devices = replica.placement.devices
        units = units_of(replica.parallel, self.node_size)
        return {u: devices[u.first_rank : u.first_rank + u.size] for u in units}


def place_optimally(
    spec: ClusterSpec,
    current: Deployment,
    target: Sequence[ParallelConfig],
    dead_devices: Iterable[int] = (),
    time_limit_s: float = TIME_LIMIT_S,
) -> Placed:
    """The placement of `target` that moves the fewest weight bytes with tp groups within nodes.

    A replica that keeps its configuration and all its devices keeps its id; others get new ids.
    Of placements with the fewest bytes this one leaves the most replicas untouched, save that of
    pipelines across nodes only the stages that stay are counted. A group larger than a node, or
    that no node has room for, is spread. Raises InfeasibleError when devices, heads or memory do
    not suffice.
    """
    problem = _problem(spec, current, target, frozenset(dead_devices))
    kept, coming = _split(problem)
    taken = {d for r in kept for d in r.placement.devices}
    free = [d for d in problem.devices if d not in taken]
    bound, chosen = _assign_freely(problem, coming, free)
    nbytes = bound
    if problem.num_nodes > 1 and coming:
        nbytes, chosen, fits = _assign_greedily(problem, coming, free)
        if nbytes > bound or not fits:
            found = _assign_exactly(problem, kept, chosen if fits else None, time_limit_s)
            if found is not None:
                exact_bytes, exact_chosen, exact_kept, exact_bound = found
                if not fits or exact_bytes < nbytes:
                    nbytes, chosen, kept = exact_bytes, exact_chosen, exact_kept
                bound = max(bound, exact_bound)
    deployment = _assemble(problem, current, kept, chosen)
    return Placed(deployment, nbytes, min(bound, nbytes))


def _problem(
    spec: ClusterSpec,
    current: Deployment,
    target: Sequence[ParallelConfig],
    dead: frozenset[int],
) -> _Problem:
    spec.check(target)
    for parallel in set(target):
        check_memory(spec, parallel)
    devices = tuple(d for d in range(spec.num_devices) if d not in dead)
    needed = sum(c.num_devices for c in target)
    if needed > len(devices):
        raise InfeasibleError(
            f"the deployment needs {needed} devices, only {len(devices)} are alive; use fewer."
        )
    table = role_table(spec.model, {*target, *current.configs})
    role = dict.fromkeys(devices, IDLE)
    for replica in current.replicas:
        first = table.first_role(replica.parallel)
        for rank, device in enumerate(replica.placement.devices):
            if device in role:
                role[device] = first + rank
    alive = tuple(r for r in current.replicas if role.keys() >= set(r.placement.devices))
    num_nodes = -(-spec.num_devices // spec.devices_per_node)
    node_size = min(spec.devices_per_node, spec.num_devices)
    return _Problem(table, node_size, devices, role, alive, tuple(target), num_nodes)


def _split(problem: _Problem) -> tuple[list[Replica], list[ParallelConfig]]:
    """Replicas that stay, as many as the target wants of each configuration; what is to come."""
    wanted = Counter(problem.target)
    kept = []
    for replica in problem.current:
        if wanted[replica.parallel] and _within_nodes(problem, replica):
            wanted[replica.parallel] -= 1
            kept.append(replica)
    return kept, list(wanted.elements())


def _within_nodes(problem: _Problem, replica: Replica) -> bool:
    units = problem.unit_devices(replica).values()
    return all(len({d // problem.node_size for d in devices}) == 1 for devices in units)


def _assign_freely(
    problem: _Problem,
    coming: Sequence[ParallelConfig],
    devices: Sequence[int],
    node_of: Sequence[int | None] = (),
) -> tuple[int, Chosen]:
    """Any rank to any device; or, by `node_of` of each unit, to devices of that node only."""
    units = [u for c in coming for u in units_of(c, problem.node_size)]
    rows = [role for u in units for role in u.roles(problem.table)]
    if not rows:
        return 0, {}
    missing = problem.table.missing[np.ix_(rows, [problem.role[d] for d in devices])]
    costs = missing
    if node_of:
        nodes = np.array([d // problem.node_size for d in devices])
        home = np.repeat([-1 if n is None else n for n in node_of], [u.size for u in units])
        away = (home[:, None] >= 0) & (home[:, None] != nodes)
        costs = missing + away * (int(missing.sum()) + 1)
    chosen = linear_sum_assignment(costs)
    taken = iter([devices[c] for c in chosen[1].tolist()])
    result: Chosen = {}
    for unit in units:
        result.setdefault(unit, []).append(tuple(next(taken) for _ in range(unit.size)))
    return int(missing[chosen].sum()), result


def _nodes(problem: _Problem, devices: Iterable[int]) -> list[Node]:
    by_node: dict[int, list[int]] = {}
    for device in devices:
        by_node.setdefault(device // problem.node_size, []).append(device)
    whole: dict[int, Counter[ParallelConfig]] = {n: Counter() for n in by_node}
    parts: dict[int, Counter[Unit]] = {n: Counter() for n in by_node}
    wanted = set(problem.target)
    for replica in problem.current:
        if replica.parallel in wanted and _within_nodes(problem, replica):
            homes = {d // problem.node_size for d in replica.placement.devices}
            for unit, taken in problem.unit_devices(replica).items():
                if len(homes) > 1 and taken[0] // problem.node_size in parts:
                    parts[taken[0] // problem.node_size][unit] += 1
            if len(homes) == 1 and homes <= whole.keys():
                whole[homes.pop()][replica.parallel] += 1
    return [
        Node(
            tuple(members),
            tuple(problem.role[d] for d in members),
            tuple(sorted(whole[node].items())),
            tuple(sorted(parts[node].items())),
        )
        for node, members in by_node.items()
    ]


def _assign_greedily(
    problem: _Problem, coming: Sequence[ParallelConfig], free: Sequence[int]
) -> tuple[int, Chosen, bool]:
    """Bytes, devices, and whether every unit found a node."""
    nodes = _nodes(problem, free)
    filling, homeless = fill_greedily(problem.table, nodes, problem.units(coming))
    if not homeless:
        nbytes, chosen = _assign_filling(problem, nodes, filling)
        return nbytes, chosen, True
    homes: dict[Unit, list[int | None]] = {u: [None] * n for u, n in homeless.items()}
    for node, units in zip(nodes, filling, strict=True):
        for unit in units.elements():
            homes.setdefault(unit, []).append(problem.node_of(node))
    order = [u for c in coming for u in units_of(c, problem.node_size)]
    nbytes, chosen = _assign_freely(problem, coming, free, [homes[u].pop() for u in order])
    return nbytes, chosen, False


def _assign_filling(
    problem: _Problem, nodes: Sequence[Node], filling: Filling
) -> tuple[int, Chosen]:
    total, result = 0, Chosen()
    for node, units in zip(nodes, filling, strict=True):
        order = list(units.elements())
        rows = [role for unit in order for role in unit.roles(problem.table)]
        if rows:
            nbytes, columns = assign(problem.table, rows, node.roles)
            total += nbytes
            taken = iter([node.devices[c] for c in columns])
            for unit in order:
                result.setdefault(unit, []).append(tuple(next(taken) for _ in range(unit.size)))
    return total, result


def _assign_exactly(
    problem: _Problem, kept: Sequence[Replica], greedy: Chosen | None, time_limit_s: float
) -> tuple[int, Chosen, list[Replica], int] | None:
    """Bytes, devices of what comes, replicas that stay, bytes no placement can do with less."""
    nodes = _nodes(problem, problem.devices)
    seed = None if greedy is None else _filling_of(problem, nodes, kept, greedy)
    wanted = problem.units(problem.target)
    found = fill_exactly(problem.table, nodes, wanted, seed, time_limit_s)
    if found is None:
        return None
    filling, bound = found
    stay = _stayers(problem, nodes, filling)
    taken = {d for r in stay for d in r.placement.devices}
    rest = _nodes(problem, [d for d in problem.devices if d not in taken])
    index = dict(zip(map(problem.node_of, nodes), filling, strict=True))
    for replica in stay:
        for unit, devices in problem.unit_devices(replica).items():
            index[devices[0] // problem.node_size][unit] -= 1
    left = [+index[problem.node_of(n)] for n in rest]
    nbytes, chosen = _assign_filling(problem, rest, left)
    return nbytes, chosen, stay, bound


def _filling_of(
    problem: _Problem, nodes: Sequence[Node], kept: Sequence[Replica], chosen: Chosen
) -> Filling:
    counts: dict[int, Counter[Unit]] = {problem.node_of(n): Counter() for n in nodes}
    pairs = [pair for r in kept for pair in problem.unit_devices(r).items()]
    pairs += [(unit, devices) for unit, copies in chosen.items() for devices in copies]
    for unit, devices in pairs:
        counts[devices[0] // problem.node_size][unit] += 1
    return list(counts.values())


def _stayers(problem: _Problem, nodes: Sequence[Node], filling: Filling) -> list[Replica]:
    """Replicas whose units all stay where they are under this filling; those within a node first.
    By the exchange of the module's docstring, now inside a node, that adds no bytes."""
    left = dict(zip(map(problem.node_of, nodes), map(Counter, filling), strict=True))
    stay = []
    for replica in sorted(problem.current, key=lambda r: _num_nodes(problem, r)):
        if not _within_nodes(problem, replica):
            continue
        units = problem.unit_devices(replica)
        needs = Counter((d[0] // problem.node_size, u) for u, d in units.items())
        if all(left[node][unit] >= n for (node, unit), n in needs.items()):
            for (node, unit), n in needs.items():
                left[node][unit] -= n
            stay.append(replica)
    return stay


def _num_nodes(problem: _Problem, replica: Replica) -> int:
    return len({d // problem.node_size for d in replica.placement.devices})


def _assemble(
    problem: _Problem, current: Deployment, kept: Sequence[Replica], chosen: Chosen
) -> Deployment:
    """Replicas in the target's order: those that stay, then new ones from units near each other."""
    staying = {c: [r for r in kept if r.parallel == c] for c in problem.target}
    copies = {unit: sorted(devices, reverse=True) for unit, devices in chosen.items()}
    next_id = max((r.replica_id for r in current.replicas), default=-1) + 1
    replicas = []
    for parallel in problem.target:
        if staying[parallel]:
            replicas.append(staying[parallel].pop(0))
            continue
        units = units_of(parallel, problem.node_size)
        devices = tuple(d for unit in units for d in copies[unit].pop())
        replicas.append(Replica(next_id, parallel, Placement(devices)))
        next_id += 1
    return Deployment(tuple(replicas))
