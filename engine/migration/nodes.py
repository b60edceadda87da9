"""Pure: which node takes which tp group, for the fewest bytes.

Inside a node any rank may take any device, so what a node's groups cost is a small assignment.
`fill_greedily` is a first answer; `fill_exactly` chooses a pattern of groups for every node by an
integer programme whose columns are those patterns, each with its exact cost (nodes that hold the
same are one class). Its relaxation knows that a group cannot be split, hence is tight. Of two nodes
the patterns are tried in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import csr_array

from engine.cluster import ParallelConfig
from engine.migration.roles import RoleTable

MAX_PATTERNS = 12_000  # beyond, patterns are left out and the bound is that without nodes
Pattern = tuple[int, ...]  # how many of each unit


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """Ranks [first_rank, first_rank + size) of a configuration, which share a node: a tp group, or
    one rank of a group that no node can hold."""

    parallel: ParallelConfig
    first_rank: int
    size: int

    def roles(self, table: RoleTable) -> range:
        first = table.first_role(self.parallel) + self.first_rank
        return range(first, first + self.size)


class Kind(NamedTuple):
    """What nodes are alike in; see `Node`."""

    roles: tuple[int, ...]
    whole: tuple[tuple[ParallelConfig, int], ...]
    parts: tuple[tuple[Unit, int], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """Devices of a node that are to be filled, their held roles, and what of it could stay."""

    devices: tuple[int, ...]
    roles: tuple[int, ...]
    whole: tuple[tuple[ParallelConfig, int], ...] = ()  # replicas within the node, counted
    parts: tuple[tuple[Unit, int], ...] = ()  # units of replicas that span nodes, counted

    @property
    def kind(self) -> Kind:
        return Kind(tuple(sorted(self.roles)), self.whole, self.parts)


Filling = list[Counter[Unit]]  # by node


def units_of(parallel: ParallelConfig, node_size: int) -> list[Unit]:
    """The units that one replica is made of."""
    size = parallel.tp if parallel.tp <= node_size else 1
    return [Unit(parallel, first, size) for first in range(0, parallel.num_devices, size)]


def assign(table: RoleTable, rows: Sequence[int], columns: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes missing, and the column of each row, when needed roles take devices with held ones."""
    costs = table.missing[np.ix_(rows, columns)]
    chosen = linear_sum_assignment(costs)
    return int(costs[chosen].sum()), chosen[1].tolist()


def fill_greedily(
    table: RoleTable, nodes: Sequence[Node], wanted: Counter[Unit]
) -> tuple[Filling, Counter[Unit]]:
    """The largest unit first, where it alone costs least, then where least room is left over.

    Returns the filling and the units that no node had room for.
    """
    left: list[tuple[int, ...]] = [tuple(sorted(n.roles)) for n in nodes]
    filling, homeless = [Counter[Unit]() for _ in nodes], Counter[Unit]()
    known: dict[tuple[Unit, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    for unit in sorted(wanted.elements(), key=lambda u: (-u.size, u)):
        best: tuple[int, int, int] | None = None
        for i, roles in enumerate(left):
            if len(roles) < unit.size:
                continue
            if (unit, roles) not in known:
                nbytes, columns = assign(table, unit.roles(table), roles)
                rest = tuple(np.delete(roles, columns).tolist())
                known[unit, roles] = nbytes, rest
            option = known[unit, roles][0], len(roles), i
            best = option if best is None else min(best, option)
        if best is None:
            homeless[unit] += 1
        else:
            node = best[2]
            left[node] = known[unit, left[node]][1]
            filling[node][unit] += 1
    return filling, homeless


class _Demand(NamedTuple):
    """Nodes of one kind that are to be filled; patterns that are not to be left out."""

    kind: Kind
    num_nodes: int
    seeds: frozenset[Pattern]


@dataclass(frozen=True, slots=True)
class Column:
    kind: int  # of the nodes
    pattern: Pattern
    nbytes: int
    stays: float  # replicas that stay, units of those that span nodes counted by their share


def fill_exactly(
    table: RoleTable,
    nodes: Sequence[Node],
    wanted: Counter[Unit],
    seed: Filling | None,
    time_limit_s: float,
) -> tuple[Filling, int] | None:
    """The filling with the fewest bytes, of those the one with the most replicas that stay.

    Replicas within a node are counted exactly; of those that span nodes, their units are. Comes
    with the bytes that no filling can do with less than: its own, unless time was short; nothing
    when patterns were left out (`MAX_PATTERNS`). None: no filling exists, or none was found in
    time. The patterns of `seed`, a filling, are never left out.
    """
    units = tuple(sorted(wanted, key=lambda u: (-u.size, u)))
    kinds: dict[Kind, list[int]] = {}
    for i, node in enumerate(nodes):
        kinds.setdefault(node.kind, []).append(i)
    demands = tuple(
        _Demand(kind, len(members), frozenset(tuple(seed[i][u] for u in units) for i in members))
        if seed
        else _Demand(kind, len(members), frozenset())
        for kind, members in kinds.items()
    )
    numbers = tuple(wanted[u] for u in units)
    columns, counts, bound = _solve(table, demands, units, numbers, time_limit_s)
    if counts is None:
        return None
    filling = [Counter[Unit]() for _ in nodes]
    free = [list(members) for members in kinds.values()]
    for column, count in zip(columns, counts, strict=True):
        for _ in range(count):
            filling[free[column.kind].pop()].update(
                {u: n for u, n in zip(units, column.pattern, strict=True) if n}
            )
    return filling, bound


@lru_cache(maxsize=4096)
def _solve(
    table: RoleTable,
    demands: tuple[_Demand, ...],
    units: tuple[Unit, ...],
    numbers: tuple[int, ...],
    time_limit_s: float,
) -> tuple[tuple[Column, ...], tuple[int, ...] | None, int]:
    """Patterns, how many nodes take each, and the bound of `fill_exactly`. Nothing here depends on
    which device of a node holds what, so that what is asked again is known."""
    wanted = Counter(dict(zip(units, numbers, strict=True)))
    columns: list[Column] = []
    complete = True
    for k, demand in enumerate(demands):
        found, whole = _patterns(units, wanted, len(demand.kind.roles), len(demands))
        complete &= whole
        patterns = {*found, *demand.seeds}
        columns += [_column(table, k, demand.kind, units, p) for p in patterns]
    sizes = [demand.num_nodes for demand in demands]
    if sum(sizes) == 2:
        counts, bound = choose_for_two(columns, numbers)
    else:
        counts, bound = choose(columns, sizes, units, wanted, time_limit_s)
    return tuple(columns), None if counts is None else tuple(counts), bound if complete else 0


def _patterns(
    units: Sequence[Unit], wanted: Counter[Unit], room: int, num_kinds: int
) -> tuple[list[Pattern], bool]:
    """Every multiset of units that fits, up to this kind's share of `MAX_PATTERNS`."""
    limit = MAX_PATTERNS // num_kinds
    found: list[Pattern] = []
    for pattern in _multisets([(u.size, wanted[u]) for u in units], room):
        if len(found) == limit:
            return found, False
        found.append(pattern)
    return found, True


def _multisets(sizes: list[tuple[int, int]], room: int) -> Iterator[Pattern]:
    if not sizes:
        yield ()
        return
    size, count = sizes[0]
    for n in range(min(count, room // size), -1, -1):
        for rest in _multisets(sizes[1:], room - n * size):
            yield (n, *rest)


def _column(
    table: RoleTable, index: int, node: Kind, units: Sequence[Unit], pattern: Pattern
) -> Column:
    counts = Counter(dict(zip(units, pattern, strict=True)))
    rows = [role for unit in counts.elements() for role in unit.roles(table)]
    nbytes = assign(table, rows, node.roles)[0] if rows else 0
    stays = 0.0
    for parallel, number in node.whole:
        mine = [u for u in units if u.parallel == parallel]
        kept = min([number, *(counts[u] for u in mine)]) if mine else 0
        counts.subtract(dict.fromkeys(mine, kept))
        stays += kept
    for unit, number in node.parts:
        stays += min(number, counts[unit]) * unit.size / unit.parallel.num_devices
    return Column(index, pattern, nbytes, stays)


def choose_for_two(
    columns: Sequence[Column], numbers: Sequence[int]
) -> tuple[list[int] | None, int]:
    """As `choose` for two nodes, where one's pattern is what the other's leaves of `numbers`."""
    last = max((c.kind for c in columns), default=0)
    others = {c.pattern: i for i, c in enumerate(columns) if c.kind == last}
    best: tuple[int, float, int, int] | None = None
    for i, column in enumerate(columns):
        left = tuple(n - m for n, m in zip(numbers, column.pattern, strict=True))
        if column.kind == 0 and left in others:
            other = columns[others[left]]
            stays = column.stays + other.stays
            option = column.nbytes + other.nbytes, -stays, i, others[left]
            best = option if best is None else min(best, option)
    if best is None:
        return None, 0
    counts = [0] * len(columns)
    for i in best[2:]:
        counts[i] += 1
    return counts, best[0]


def choose(
    columns: Sequence[Column],
    kind_sizes: Sequence[int],
    units: Sequence[Unit],
    wanted: Counter[Unit],
    time_limit_s: float,
) -> tuple[list[int] | None, int]:
    """How many nodes take each column, and the bytes no choice can do with less. Solver: HiGHS."""
    entries = [(c.kind, i, 1) for i, c in enumerate(columns)]
    entries += [
        (len(kind_sizes) + u, i, n)
        for i, column in enumerate(columns)
        for u, n in enumerate(column.pattern)
        if n
    ]
    rows, cols, values = (np.array(x) for x in zip(*entries, strict=True))
    demand = np.array([*kind_sizes, *(wanted[u] for u in units)], dtype=float)
    matrix = csr_array((values.astype(float), (rows, cols)), shape=(len(demand), len(columns)))
    nbytes = np.array([c.nbytes for c in columns])
    unit_bytes = max(1, int(np.gcd.reduce(nbytes)))  # one step of bytes outweighs every stay
    stays = np.array([c.stays for c in columns])
    weight = 1 + float(sum(kind_sizes) * stays.max(initial=0))
    found = milp(
        nbytes / unit_bytes * weight - stays,
        constraints=LinearConstraint(matrix, demand, demand),
        integrality=np.ones(len(columns), dtype=np.int64),
        bounds=Bounds(0, np.inf),
        options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
    )
    if found.x is None:
        return None, 0
    counts = np.rint(found.x).astype(np.int64)
    if found.status == 0:
        return counts.tolist(), int(counts @ nbytes)
    return counts.tolist(), max(0, int(found.mip_dual_bound / weight * unit_bytes))
