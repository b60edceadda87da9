"""Pure: which group of devices sends how much of which piece, for the shortest makespan.

Ports: every device receives at B bytes/s and sends at B. Placement fixes what each receives; who
sends is free. A piece of v bytes that n devices need is sent n times in all, at least once by a
device that holds it, else also by one that has received it: for every byte, any numbers of copies
sent k >= 0 with sum n and at least one from a holder are those of some forwarding tree. So

    min T   s.t.  sum_g y_pg = n_p v_p,   sum_{g holds p} y_pg >= v_p,
                  sum_p y_pg <= |g| T,    T >= what any device receives,   y >= 0

over groups g of devices that are alike (averaging a solution over like devices keeps it one). A
schedule of that length exists for copies that can be cut freely (preemptive open shop, Gonzalez
and Sahni 1976; along a chain, after one chunk per hop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from engine.migration.pieces import Group, Piece
from engine.migration.roles import RoleTable

RELAY_WEIGHT = 1e-6  # of two shortest schedules, the one in which fewer bytes are forwarded
Share = dict[int, float]  # bytes that each group sends of a piece, over all its copies


@dataclass(frozen=True, slots=True)
class Sending:
    """Who sends what: `shares` by piece; `port_bytes`, the optimum, is the largest port load."""

    shares: tuple[Share, ...]
    port_bytes: float


def num_copies(piece: Piece, groups: Sequence[Group]) -> int:
    return sum(len(groups[g].devices) for g in piece.needers)


def balance(
    table: RoleTable, groups: Sequence[Group], pieces: Sequence[Piece], relays: bool = True
) -> Sending:
    """The optimum of the programme above; without `relays`, of that in which only holders send.

    Pieces on disk only have no senders. Receiving often decides; then a greedy filling that stays
    within it is optimal, and no programme is solved.
    """
    received = _received_bytes(table, groups, pieces)
    shares = _fill(groups, pieces, received, relays)
    if shares is not None:
        return Sending(tuple(shares), received)
    return _solve(groups, pieces, received, relays)


def _senders(piece: Piece, relays: bool) -> tuple[int, ...]:
    return (*piece.holders, *piece.needers) if relays else piece.holders


def _received_bytes(table: RoleTable, groups: Sequence[Group], pieces: Sequence[Piece]) -> float:
    """The most that one device receives from others."""
    received = [int(table.missing[g.needed, g.held]) for g in groups]
    for piece in pieces:
        if not piece.holders:
            for g in piece.needers:
                received[g] -= piece.nbytes
    return float(max(received, default=0))


def _fill(
    groups: Sequence[Group], pieces: Sequence[Piece], port: float, relays: bool
) -> list[Share] | None:
    """Shares within `port` bytes per device: first one copy of each piece from its holders, then
    the others from holders, then from those that have received it. None if that fails."""
    room = [port * len(g.devices) for g in groups]
    shares: list[Share] = [{} for _ in pieces]
    order = [p for p, piece in enumerate(pieces) if piece.holders]
    order.sort(key=lambda p: len(pieces[p].holders))
    lacking = {p: float(pieces[p].nbytes) for p in order}
    for p in order:
        lacking[p] = _take(shares[p], room, pieces[p].holders, lacking[p])
    if any(lacking.values()):
        return None
    for p in order:
        rest = float((num_copies(pieces[p], groups) - 1) * pieces[p].nbytes)
        lacking[p] = _take(shares[p], room, pieces[p].holders, rest)
    for p in order if relays else ():
        lacking[p] = _take(shares[p], room, pieces[p].needers, lacking[p])
    return None if any(lacking.values()) else shares


def _take(share: Share, room: list[float], senders: Sequence[int], nbytes: float) -> float:
    """Take from those with most room, of as few as suffice; what is left to be sent."""
    for g in sorted(senders, key=lambda g: -room[g]):
        part = min(room[g], nbytes)
        if part > 0:
            share[g] = share.get(g, 0.0) + part
            room[g] -= part
            nbytes -= part
    return nbytes


def _solve(
    groups: Sequence[Group], pieces: Sequence[Piece], received: float, relays: bool
) -> Sending:
    held = [p for p, piece in enumerate(pieces) if piece.holders]
    unit = float(sum(num_copies(pieces[p], groups) * pieces[p].nbytes for p in held))
    columns = [(p, g) for p in held for g in _senders(pieces[p], relays)]
    row = {p: i for i, p in enumerate(held)}
    is_holder = [g in pieces[p].holders for p, g in columns]
    width = len(columns) + 1  # the last is T
    copies = csr_array(
        (np.ones(width - 1), ([row[p] for p, _ in columns], range(width - 1))),
        shape=(len(held), width),
    )
    entries = [(len(held) + g, j, 1.0) for j, (_, g) in enumerate(columns)]
    entries += [(row[p], j, -1.0) for j, (p, _) in enumerate(columns) if is_holder[j]]
    entries += [(len(held) + g, width - 1, -float(len(x.devices))) for g, x in enumerate(groups)]
    rows, cols, values = zip(*entries, strict=True)
    ports = csr_array((values, (rows, cols)), shape=(len(held) + len(groups), width))
    nbytes = np.array([pieces[p].nbytes for p in held]) / unit
    counts = np.array([num_copies(pieces[p], groups) for p in held])
    found = milp(  # without integers: a linear programme
        np.array([0.0 if holder else RELAY_WEIGHT for holder in is_holder] + [1.0]),
        constraints=[
            LinearConstraint(copies, nbytes * counts, nbytes * counts),
            LinearConstraint(ports, -np.inf, np.concatenate([-nbytes, np.zeros(len(groups))])),
        ],
        bounds=Bounds(np.array([0.0] * (width - 1) + [received / unit]), np.inf),
    )
    assert found.x is not None, found.message  # holders alone are a solution
    shares: list[Share] = [{} for _ in pieces]
    for (p, g), part in zip(columns, found.x, strict=False):
        if part > 0:
            shares[p][g] = part * unit
    return Sending(tuple(shares), float(found.x[-1]) * unit)
