"""Pure: what moves, by symmetry: groups of devices, pieces that the same groups hold and need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from engine.cluster import Deployment
from engine.migration.roles import IDLE, RoleTable

Interval = tuple[int, int, int]  # tensor class, start row, stop row


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that hold the same role and need the same one (`IDLE`: nothing)."""

    held: int
    needed: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes with the same holders and needers (indices of groups); each needer lacks them all.

    A piece without holders is on disk only.
    """

    intervals: tuple[Interval, ...]
    nbytes: int
    holders: tuple[int, ...]
    needers: tuple[int, ...]


def device_groups(
    table: RoleTable, current: Deployment, target: Deployment, dead_devices: Iterable[int] = ()
) -> tuple[Group, ...]:
    """Every device that is alive and holds or needs something, by its two roles."""
    held, needed = _roles(table, current), _roles(table, target)
    members: dict[tuple[int, int], list[int]] = {}
    for device in sorted((held.keys() | needed.keys()) - set(dead_devices)):
        pair = held.get(device, IDLE), needed.get(device, IDLE)
        members.setdefault(pair, []).append(device)
    return tuple(Group(h, n, tuple(devices)) for (h, n), devices in members.items())


def divide(table: RoleTable, groups: Sequence[Group]) -> tuple[Piece, ...]:
    """Cut every tensor class at the borders of all roles in use, and gather cells that the same
    groups hold and need; cached, since it is the same whichever devices are in a group."""
    return _divide(table, tuple((g.held, g.needed) for g in groups))


@lru_cache(maxsize=1024)
def _divide(table: RoleTable, groups: tuple[tuple[int, int], ...]) -> tuple[Piece, ...]:
    starts, stops = table.starts.tolist(), table.stops.tolist()
    gathered: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Interval]] = {}
    movers = [i for i, (held, needed) in enumerate(groups) if table.missing[needed, held]]
    for c in range(len(table.classes)):
        have = [(starts[held][c], stops[held][c]) for held, _ in groups]
        need = [(i, starts[groups[i][1]][c], stops[groups[i][1]][c]) for i in movers]
        need = [(i, a, b) for i, a, b in need if a < have[i][0] or b > have[i][1] if a < b]
        borders = sorted({x for _, a, b in need for x in (a, b)} | {x for ab in have for x in ab})
        for start, stop in pairwise(borders):
            needers = tuple(
                i
                for i, a, b in need
                if a <= start and stop <= b and not (have[i][0] <= start and stop <= have[i][1])
            )
            if needers:
                holders = tuple(i for i, (a, b) in enumerate(have) if a <= start and stop <= b)
                gathered.setdefault((holders, needers), []).append((c, start, stop))
    return tuple(
        Piece(tuple(cells), _nbytes(table, cells), holders, needers)
        for (holders, needers), cells in gathered.items()
    )


def _nbytes(table: RoleTable, cells: Iterable[Interval]) -> int:
    kinds = table.classes
    return sum((b - a) * kinds[c].row_bytes * len(kinds[c].tensors) for c, a, b in cells)


def _roles(table: RoleTable, deployment: Deployment) -> dict[int, int]:
    return {
        device: table.first_role(replica.parallel) + rank
        for replica in deployment.replicas
        for rank, device in enumerate(replica.placement.devices)
    }
