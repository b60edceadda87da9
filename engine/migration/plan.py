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
    Replica,
    SwitchPlan,
    Transfer,
)
from engine.migration.bounds import lower_bound_s
from engine.migration.order import choose_mode, default_staging_bytes
from engine.migration.pieces import Group, Piece, device_groups, divide
from engine.migration.placement import Placed, place_optimally
from engine.migration.roles import Held, RoleTable, held_shards, role_table
from engine.migration.schedule import CHUNK_BYTES, Links, Schedule, link_bytes, port_bytes
from engine.migration.sources import Sending, balance
from engine.shards import check_memory

__all__ = [
    "Held",
    "SwitchCost",
    "check_memory",
    "held_shards",
    "link_seconds",
    "normal",
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


@dataclass(frozen=True, slots=True)
class _Movement:
    """What a switch between these placements moves, and who sends it."""

    placed: Placed
    table: RoleTable
    groups: tuple[Group, ...]
    pieces: tuple[Piece, ...]
    sending: Sending


def normal(deployment: Deployment) -> Deployment:
    """With replica ids 0, 1, ...: what moves depends on configurations and devices only, so that
    what is known of a normal deployment outlives a switch."""
    return Deployment(
        tuple(Replica(i, r.parallel, r.placement) for i, r in enumerate(deployment.replicas))
    )


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
    node_size: int = 0,
) -> tuple[Transfer, ...]:
    """Every missing interval once, in the order to carry them out, with the shortest makespan.

    Sources hold the interval or receive it earlier in the list; `DISK` is the source of what no
    device holds that is alive. Without `relays` only holders send. No transfer exceeds
    `chunk_bytes` unless its tensor is not sliced. Given `node_size`, holders send within their node
    where their shares of the sending allow it.
    """
    table, groups, pieces = _moves(model, current, target, dead_devices)
    sending = balance(table, groups, pieces, relays)
    return tuple(Schedule(table, groups, pieces, sending, chunk_bytes, node_size))


def link_seconds(transfers: Iterable[Transfer] | Links, link_bytes_per_s: float) -> float:
    """Largest load of any port, in seconds: no schedule over these transfers can be shorter.

    The disk sends through no port; what is read from it counts at the device that reads.
    """
    sent, received = port_bytes(transfers)
    return max([0, *sent.values(), *received.values()]) / link_bytes_per_s


def node_seconds(transfers: Iterable[Transfer], node_size: int, nic_bytes_per_s: float) -> float:
    """Largest load of any node's network port, in or out, in seconds."""
    leaving: Counter[int] = Counter()
    entering: Counter[int] = Counter()
    for (src, dst), nbytes in link_bytes(transfers).items():
        if src != DISK and src // node_size != dst // node_size:
            leaving[src // node_size] += nbytes
            entering[dst // node_size] += nbytes
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
    weights whether memory allows a live switch. Transfers are made when they are looked at. Raises
    InfeasibleError.
    """
    dead = frozenset(dead_devices)
    moving = _movement(spec, normal(current), tuple(target), dead, relays)
    placed, deployment = moving.placed, _renamed(moving.placed.deployment, current)
    node_size = spec.devices_per_node if spec.devices_per_node < spec.num_devices else 0
    transfers = Schedule(
        moving.table, moving.groups, moving.pieces, moving.sending, chunk_bytes, node_size
    )
    read_bytes = sum(  # of any placement, as much
        nbytes for (src, _), nbytes in transfers.link_bytes.items() if src == DISK
    )
    moving_s = link_seconds(transfers, spec.link_bytes_per_s)
    if nic_bytes_per_s:
        nodes_s = node_seconds(transfers, spec.devices_per_node, nic_bytes_per_s)
        moving_s = max(moving_s, nodes_s)
    staging_bytes = default_staging_bytes(spec)
    mode, why = choose_mode(
        spec, current, deployment, transfers, kv_blocks_used or {}, staging_bytes
    )
    return SwitchPlan(
        target=deployment,
        expected_epoch=epoch,
        transfers=transfers,
        kv=kv,
        weight_bytes=placed.missing_bytes - read_bytes,
        lower_bound_bytes=placed.lower_bound_bytes - read_bytes,
        predicted_s=overhead_s + moving_s,
        lower_bound_s=lower_bound_s(
            spec.model, current, deployment, spec.link_bytes_per_s, dead,
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
    return _switch_cost(spec, normal(current), tuple(target))


@lru_cache(maxsize=65536)
def _switch_cost(
    spec: ClusterSpec, current: Deployment, target: tuple[ParallelConfig, ...]
) -> SwitchCost:
    moving = _movement(spec, current, target, frozenset(), True)
    deployment = moving.placed.deployment
    kept = set(deployment.replicas) & set(current.replicas)
    changed = deployment.devices - {d for r in kept for d in r.placement.devices}
    return SwitchCost(
        weight_bytes=moving.placed.missing_bytes,
        seconds=moving.sending.port_bytes / spec.link_bytes_per_s,
        devices_changed=len(changed),
    )


@lru_cache(maxsize=1024)
def _movement(
    spec: ClusterSpec,
    current: Deployment,
    target: tuple[ParallelConfig, ...],
    dead: frozenset[int],
    relays: bool,
) -> _Movement:
    """`current` is normal, so that a plan finds what a candidate's cost was found from."""
    placed = place_optimally(spec, current, target, dead)
    table, groups, pieces = _moves(spec.model, current, placed.deployment, dead)
    return _Movement(placed, table, groups, pieces, balance(table, groups, pieces, relays))


def _renamed(target: Deployment, current: Deployment) -> Deployment:
    """A placement found from the normal deployment, with the ids of the present one: replicas that
    stay keep theirs, others get the next in turn."""
    ids = [r.replica_id for r in current.replicas]
    first_new = max(ids, default=-1) + 1
    return Deployment(
        tuple(
            Replica(
                ids[r.replica_id]
                if r.replica_id < len(ids)
                else first_new + r.replica_id - len(ids),
                r.parallel,
                r.placement,
            )
            for r in target.replicas
        )
    )


def _moves(
    model: ModelSpec, current: Deployment, target: Deployment, dead_devices: Iterable[int]
) -> tuple[RoleTable, tuple[Group, ...], tuple[Piece, ...]]:
    table = role_table(model, {*current.configs, *target.configs})
    groups = device_groups(table, current, target, dead_devices)
    return table, groups, divide(table, groups)
