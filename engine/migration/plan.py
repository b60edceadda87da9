"""Pure: (present deployment, wanted configurations) -> placement, transfers, bytes, seconds.

Placement fixes the bytes (`engine.migration.placement`), then sources fix the makespan
(`engine.migration.sources`), then cuts and an order make transfers of both
(`engine.migration.schedule`). The bounds in the plan are what no placement can do with less than,
and what no schedule for this placement can be shorter than.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.cluster import (
    DISK,
    ClusterSpec,
    Deployment,
    KvCostParams,
    ModelSpec,
    ParallelConfig,
    SwitchPlan,
    Transfer,
)
from engine.migration.bounds import lower_bound_s
from engine.migration.order import choose_mode, default_staging_bytes
from engine.migration.pieces import Group, Piece, device_groups, divide
from engine.migration.placement import place_optimally
from engine.migration.roles import Held, RoleTable, held_shards, role_table
from engine.migration.schedule import CHUNK_BYTES, port_bytes, schedule
from engine.migration.sources import balance
from engine.shards import check_memory

__all__ = [
    "Held",
    "SwitchCost",
    "check_memory",
    "held_shards",
    "link_seconds",
    "place",
    "plan_switch",
    "plan_transfers",
    "switch_cost",
]


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """What a switch would move, before anything is planned in detail."""

    weight_bytes: int
    seconds: float
    devices_changed: int


def place(
    spec: ClusterSpec,
    current: Deployment,
    target: Sequence[ParallelConfig],
    dead_devices: Iterable[int] = (),
) -> Deployment:
    """The placement of `target` that moves the fewest weight bytes; see `place_optimally`.

    Raises InfeasibleError when devices, heads or memory do not suffice.
    """
    return place_optimally(spec, current, target, dead_devices).deployment


def plan_transfers(
    model: ModelSpec,
    current: Deployment,
    target: Deployment,
    dead_devices: Iterable[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
    relays: bool = True,
) -> tuple[Transfer, ...]:
    """Every missing interval once, in the order to carry them out, with the shortest makespan.

    Sources hold the interval or receive it earlier in the list; `DISK` is the source of what no
    device holds that is alive. Without `relays` only holders send. No transfer exceeds
    `chunk_bytes` unless its tensor is not sliced.
    """
    table, groups, pieces = _moves(model, current, target, dead_devices)
    return schedule(table, groups, pieces, balance(table, groups, pieces, relays), chunk_bytes)


def link_seconds(transfers: Iterable[Transfer], link_bytes_per_s: float) -> float:
    """Largest load of any port, in seconds: no schedule over these transfers can be shorter.

    The disk sends through no port; what is read from it counts at the device that reads.
    """
    sent, received = port_bytes(transfers)
    return max([0, *sent.values(), *received.values()]) / link_bytes_per_s


def node_seconds(transfers: Iterable[Transfer], node_size: int, nic_bytes_per_s: float) -> float:
    """Largest load of any node's network port, in or out, in seconds."""
    leaving: Counter[int] = Counter()
    entering: Counter[int] = Counter()
    for t in transfers:
        if t.src != DISK and t.src // node_size != t.dst // node_size:
            leaving[t.src // node_size] += t.nbytes
            entering[t.dst // node_size] += t.nbytes
    return max([0, *leaving.values(), *entering.values()]) / nic_bytes_per_s


def plan_switch(
    spec: ClusterSpec,
    current: Deployment,
    epoch: int,
    target: Sequence[ParallelConfig],
    kv: KvCostParams,
    overhead_s: float = 0.0,
    decision_id: str = "",
    dead_devices: Iterable[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
    nic_bytes_per_s: float = 0.0,
    relays: bool = True,
    kv_blocks_used: Mapping[int, int] | None = None,
) -> SwitchPlan:
    """Plan the switch from `current` (of generation `epoch`) to configurations `target`.

    `overhead_s` is the measured time of a switch that moves no byte. `nic_bytes_per_s`, if given,
    is what a node's network port carries in each direction. Without `relays` only devices that
    hold bytes from the start send them. What only `dead_devices` held is read from disk and counts
    neither in `weight_bytes` nor in its bound. `kv_blocks_used`, by replica id, decides with the
    weights whether memory allows a live switch. Raises InfeasibleError.
    """
    dead = frozenset(dead_devices)
    placed = place_optimally(spec, current, target, dead)
    transfers = plan_transfers(spec.model, current, placed.deployment, dead, chunk_bytes, relays)
    read_bytes = sum(t.nbytes for t in transfers if t.src == DISK)  # of any placement, as much
    moving_s = link_seconds(transfers, spec.link_bytes_per_s)
    if nic_bytes_per_s:
        nodes_s = node_seconds(transfers, spec.devices_per_node, nic_bytes_per_s)
        moving_s = max(moving_s, nodes_s)
    staging_bytes = default_staging_bytes(spec)
    mode, why = choose_mode(
        spec, current, placed.deployment, transfers, kv_blocks_used or {}, staging_bytes
    )
    return SwitchPlan(
        target=placed.deployment,
        expected_epoch=epoch,
        transfers=transfers,
        kv=kv,
        weight_bytes=placed.missing_bytes - read_bytes,
        lower_bound_bytes=placed.lower_bound_bytes - read_bytes,
        predicted_s=overhead_s + moving_s,
        lower_bound_s=lower_bound_s(
            spec.model, current, placed.deployment, spec.link_bytes_per_s, dead,
            spec.devices_per_node, nic_bytes_per_s,
        ),
        mode=mode,
        decision_id=decision_id,
        mode_reason=why,
    )  # fmt: skip


def switch_cost(
    spec: ClusterSpec, current: Deployment, target: Sequence[ParallelConfig]
) -> SwitchCost:
    """Bytes, seconds on the links (without the fixed overhead) and devices touched; cached.

    The seconds are the optimum before copies are cut at whole rows: a plan's are longer by a row,
    or a tensor that cannot be cut, per cut.
    """
    return _switch_cost(spec, current, tuple(target))


@lru_cache(maxsize=65536)
def _switch_cost(
    spec: ClusterSpec, current: Deployment, target: tuple[ParallelConfig, ...]
) -> SwitchCost:
    placed = place_optimally(spec, current, target)
    table, groups, pieces = _moves(spec.model, current, placed.deployment, ())
    kept = set(placed.deployment.replicas) & set(current.replicas)
    changed = placed.deployment.devices - {d for r in kept for d in r.placement.devices}
    return SwitchCost(
        weight_bytes=placed.missing_bytes,
        seconds=balance(table, groups, pieces).port_bytes / spec.link_bytes_per_s,
        devices_changed=len(changed),
    )


def _moves(
    model: ModelSpec, current: Deployment, target: Deployment, dead_devices: Iterable[int]
) -> tuple[RoleTable, tuple[Group, ...], tuple[Piece, ...]]:
    table = role_table(model, {*current.configs, *target.configs})
    groups = device_groups(table, current, target, dead_devices)
    return table, groups, divide(table, groups)
