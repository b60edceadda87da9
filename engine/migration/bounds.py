"""Pure: what no schedule can be shorter than, for a given placement.

Computed from the shards themselves, tensor by tensor, by code that shares nothing with the
schedule: a certificate must not repeat the mistakes of what it certifies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import prod

from engine.cluster import Deployment, ModelSpec, ParallelConfig
from engine.shards import rank_shard

Role = tuple[ParallelConfig, int] | None  # None: holds or needs nothing
Pair = tuple[Role, Role]  # what a device holds and what it needs


@dataclass(frozen=True, slots=True)
class _Loads:
    """Bytes that must pass at least: into one device of a pair, out of all devices of these pairs
    together (once, from those that hold; every copy, from those that hold or need), by node."""

    received: Counter[Pair] = field(default_factory=Counter)
    once: Counter[frozenset[Pair]] = field(default_factory=Counter)
    all_copies: Counter[frozenset[Pair]] = field(default_factory=Counter)
    into_node: Counter[int] = field(default_factory=Counter)
    out_of_node: Counter[int] = field(default_factory=Counter)


def lower_bound_s(
    model: ModelSpec,
    current: Deployment,
    target: Deployment,
    link_bytes_per_s: float,
    dead_devices: Iterable[int] = (),
    node_size: int = 0,
    nic_bytes_per_s: float = 0.0,
) -> float:
    """Seconds: the largest of what a device must receive, what a set of devices must send, over
    its size, and (given both) what must enter or leave a node of `node_size` devices through its
    network port. Reading from disk counts as nothing.

    A set must send one copy of what it alone holds, and all copies of what nobody else holds or
    gets. Tried are the sets of devices that hold some tensor's rows, or hold or get them.
    """
    dead = set(dead_devices)
    held, needed = _roles(current, dead), _roles(target, dead)
    devices = held.keys() | needed.keys()
    pairs = {d: (held.get(d), needed.get(d)) for d in devices}
    nodes: dict[Pair, set[int]] = {}
    for device, pair in pairs.items() if nic_bytes_per_s else ():
        nodes.setdefault(pair, set()).add(device // node_size)
    alike = frozenset((pair, frozenset(nodes.get(pair, ()))) for pair in pairs.values())
    numbers = frozenset(Counter(pairs.values()).items())
    port_bytes, nic_bytes = _most_bytes(model, numbers, alike)
    return max(port_bytes / link_bytes_per_s, nic_bytes / (nic_bytes_per_s or 1.0))


@lru_cache(maxsize=4096)
def _most_bytes(
    model: ModelSpec,
    numbers: frozenset[tuple[Pair, int]],
    nodes: frozenset[tuple[Pair, frozenset[int]]],
) -> tuple[float, int]:
    """Through a device's port, and through a node's: the same whichever devices are how."""
    pairs = Counter(dict(numbers))
    loads = _loads(model, pairs, {pair: set(where) for pair, where in nodes})
    ports = [0.0, *loads.received.values(), *_sent(loads, pairs)]
    return max(ports), max([0, *loads.into_node.values(), *loads.out_of_node.values()])


def _roles(deployment: Deployment, dead: set[int]) -> dict[int, Role]:
    return {
        device: (replica.parallel, rank)
        for replica in deployment.replicas
        for rank, device in enumerate(replica.placement.devices)
        if device not in dead
    }


def _loads(model: ModelSpec, pairs: Counter[Pair], nodes: Mapping[Pair, set[int]]) -> _Loads:
    loads = _Loads()
    for (row_bytes, rows), number in _alike(model, {r for pair in pairs for r in pair}).items():
        for start, stop in pairwise(sorted({x for _, ab in rows for x in ab})):
            owners = {role for role, (a, b) in rows if a <= start and stop <= b}
            lacking = [p for p in pairs if p[1] in owners and p[0] not in owners]
            holding = [p for p in pairs if p[0] in owners]
            if lacking and holding:
                nbytes = (stop - start) * row_bytes * number
                _count(loads, pairs, lacking, holding, nbytes)
                _count_nodes(loads, nodes, lacking, holding, nbytes)
    return loads


def _alike(
    model: ModelSpec, roles: Iterable[Role]
) -> Counter[tuple[int, tuple[tuple[Role, tuple[int, int]], ...]]]:
    """How many tensors have this row size and these rows at every role."""
    row_bytes, known = _rows(model)
    listed = [role for role in roles if role is not None]
    for role in listed:
        if role not in known:
            shards = [rank_shard(tensor, model, *role) for tensor in model.tensors]
            known[role] = [None if s is None else (s.start, s.stop) for s in shards]
    columns = Counter(zip(row_bytes, *(known[role] for role in listed), strict=True))
    found: Counter[tuple[int, tuple[tuple[Role, tuple[int, int]], ...]]] = Counter()
    for (nbytes, *rows), number in columns.items():
        held = tuple((role, ab) for role, ab in zip(listed, rows, strict=True) if ab is not None)
        found[nbytes, held] += number
    return found


@lru_cache(maxsize=16)
def _rows(model: ModelSpec) -> tuple[list[int], dict[Role, list[tuple[int, int] | None]]]:
    """By tensor: bytes of a row, and the rows at each role asked for so far."""
    sizes = [
        prod(tensor.shape) * model.dtype_bytes // tensor.shape[tensor.tp_dim or 0]
        for tensor in model.tensors
    ]
    return sizes, {}


def _count(
    loads: _Loads, pairs: Counter[Pair], lacking: list[Pair], holding: list[Pair], nbytes: int
) -> None:
    for pair in lacking:
        loads.received[pair] += nbytes
    loads.once[frozenset(holding)] += nbytes
    copies = sum(pairs[pair] for pair in lacking)
    loads.all_copies[frozenset(holding + lacking)] += nbytes * copies
    loads.once[frozenset(holding + lacking)] -= nbytes  # in "all copies" already


def _sent(loads: _Loads, pairs: Counter[Pair]) -> Iterator[float]:
    for ports in {*loads.once, *loads.all_copies, frozenset(pairs)}:
        nbytes = sum(n for devices, n in loads.once.items() if devices <= ports)
        nbytes += sum(n for devices, n in loads.all_copies.items() if devices <= ports)
        yield nbytes / sum(pairs[pair] for pair in ports)


def _count_nodes(
    loads: _Loads,
    nodes: Mapping[Pair, set[int]],
    lacking: list[Pair],
    holding: list[Pair],
    nbytes: int,
) -> None:
    """One copy must enter every node that needs it and has none; if one node alone has it, it
    leaves there."""
    having = {node for pair in holding for node in nodes.get(pair, ())}
    without = {node for pair in lacking for node in nodes.get(pair, ())} - having
    for node in without:
        loads.into_node[node] += nbytes
    if without and len(having) == 1:
        loads.out_of_node[having.pop()] += nbytes
