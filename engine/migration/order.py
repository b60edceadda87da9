"""Pure: whether memory allows a live switch, and if not, in which order tensors can move in place.

A step of a switch in place takes some tensors from the old shards to the new ones on all devices at
once: storage for the new shards is made beside the old, they are filled, and only then the old ones
go. So whatever is sent is still held, and what a step frees is there for the next. Where not even
one tensor fits like that, old shards that stand in the way wait in a staging buffer, from where
they are sent; this is what breaks cycles (A needs what B frees, and B what A frees).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.cluster import (
    ClusterSpec,
    Deployment,
    ModelSpec,
    ParallelConfig,
    Replica,
    SwitchMode,
    Transfer,
)
from engine.errors import InfeasibleError
from engine.migration.order_search import Change, Group, Parked, Search, as_bytes
from engine.shards import Shard, kv_bytes_per_block, rank_shards, rank_weight_bytes

MAX_STAGING_BYTES = 256 << 20  # per device
Pairs = tuple[tuple[int, str], ...]  # (device, tensor)
_Rank = tuple[Replica, int]


@dataclass(frozen=True, slots=True)
class InPlaceStep:
    """On each device, in this order: old shards in `parked` move to its staging buffer; those in
    `made` get storage, filled from what the device itself holds and by `transfers` (of the plan, in
    its order); when all have arrived, the old shards in `freed` go, from wherever they are.

    Shards whose interval does not change keep their storage and are in none of them.
    """

    tensors: tuple[str, ...]
    transfers: tuple[Transfer, ...]
    parked: Pairs
    made: Pairs
    freed: Pairs


def default_staging_bytes(spec: ClusterSpec) -> int:
    """What a device sets aside during a switch for parked shards and transfers in flight."""
    return min(spec.device_memory_bytes // 16, MAX_STAGING_BYTES)


def choose_mode(
    spec: ClusterSpec,
    current: Deployment,
    target: Deployment,
    transfers: Sequence[Transfer],
    kv_blocks_used: Mapping[int, int],
    staging_bytes: int,
) -> tuple[SwitchMode, str]:
    """Live when memory allows, else in place, and why. `kv_blocks_used` is by replica id.

    Raises InfeasibleError, with figures, when neither can be done.
    """
    shortage = live_shortage(spec, current, target, kv_blocks_used, staging_bytes)
    if not shortage:
        return SwitchMode.LIVE, ""
    try:
        in_place_order(spec, current, target, transfers, staging_bytes)
    except InfeasibleError as error:
        raise InfeasibleError(f"neither live nor in place: {shortage} {error}") from error
    return SwitchMode.IN_PLACE, shortage


# --------------------------------------------------------------------------------------
# Live


def live_shortage(
    spec: ClusterSpec,
    current: Deployment,
    target: Deployment,
    kv_blocks_used: Mapping[int, int],
    staging_bytes: int,
) -> str:
    """Empty when both generations fit beside each other on every device; else a sentence.

    Counted are the weights of both (an interval that both hold once), the KV blocks in use of the
    old, KV for one sequence of max_model_len of the new, and staging. Devices of replicas that
    stay do not count: nothing is made there.
    """
    leaving, coming = ranks_that_change(current, target)
    for device in sorted(leaving.keys() | coming.keys()):
        old, new = leaving.get(device), coming.get(device)
        weights = union_bytes(spec, old, new)
        kv = 0
        if old is not None:
            kv += kv_blocks_used.get(old[0].replica_id, 0) * block_bytes(spec, *old)
        if new is not None:
            kv += -(-spec.model.max_model_len // spec.block_size) * block_bytes(spec, *new)
        needed = weights + kv + staging_bytes
        if needed > spec.switch_memory_bytes:
            return (
                f"device {device} would need {needed} bytes for both generations ({weights} of "
                f"weights, {kv} of KV, {staging_bytes} of staging), it has "
                f"{spec.switch_memory_bytes}."
            )
    return ""


def ranks_that_change(
    current: Deployment, target: Deployment
) -> tuple[dict[int, _Rank], dict[int, _Rank]]:
    """By device, (replica, rank) of the replicas that go, and of those that come."""
    kept = set(current.replicas) & set(target.replicas)
    leaving, coming = (
        {
            device: (replica, rank)
            for replica in deployment.replicas
            if replica not in kept
            for rank, device in enumerate(replica.placement.devices)
        }
        for deployment in (current, target)
    )
    return leaving, coming


def union_bytes(spec: ClusterSpec, old: _Rank | None, new: _Rank | None) -> int:
    """Bytes of the weights of two ranks on one device; an interval that both hold is there once."""
    roles = ((r.parallel, rank) for r, rank in (which for which in (old, new) if which is not None))
    return _union_bytes(spec.model, *roles)


@lru_cache(maxsize=4096)
def _union_bytes(model: ModelSpec, *roles: tuple[ParallelConfig, int]) -> int:
    held = {
        (s.tensor, s.start, s.stop): s.nbytes
        for parallel, rank in roles
        for s in _shards(model, parallel, rank).values()
    }
    return sum(held.values())


def block_bytes(spec: ClusterSpec, replica: Replica, rank: int) -> int:
    """Bytes of one KV block on that rank."""
    return kv_bytes_per_block(spec.model, replica.parallel, rank, spec.block_size)


# --------------------------------------------------------------------------------------
# In place


def in_place_order(
    spec: ClusterSpec,
    current: Deployment,
    target: Deployment,
    transfers: Sequence[Transfer],
    staging_bytes: int,
    free_bytes: Mapping[int, int] | None = None,
) -> tuple[InPlaceStep, ...]:
    """Steps in which no device ever holds more than fits.

    `free_bytes` is what each device that changes has beside its old weights; by default all of its
    memory, since KV caches are dropped first. `staging_bytes` of it are kept for staging. Tried in
    turn: layer by layer; tensor by tensor; the same with old shards parked. Raises InfeasibleError,
    with figures, when no order is found (the search is exhaustive up to MAX_STATES states).
    """
    leaving, coming = ranks_that_change(current, target)
    change = _change(spec, leaving, coming)
    if free_bytes is None:
        free_bytes = {
            d: spec.device_memory_bytes - _old_weight_bytes(spec, leaving.get(d))
            for d in change.devices
        }
    room = as_bytes([free_bytes[d] - staging_bytes for d in change.devices])
    layers = _layers(spec, change)
    tensors = [(name,) for group in layers for name in group]
    last = Search([], change, room, 0)
    for names, staging in ((layers, 0), (tensors, 0), (tensors, staging_bytes)):
        last = Search([Group(n, change) for n in names], change, room, staging)
        found = last.run()
        if found is not None:
            return _steps(found, change, transfers)
    raise InfeasibleError(last.shortage())


def _old_weight_bytes(spec: ClusterSpec, old: _Rank | None) -> int:
    return 0 if old is None else rank_weight_bytes(spec.model, old[0].parallel, old[1])


@lru_cache(maxsize=4096)
def _shards(model: ModelSpec, parallel: ParallelConfig, rank: int) -> dict[str, Shard]:
    return {s.tensor: s for s in rank_shards(model, parallel, rank)}


def _change(spec: ClusterSpec, leaving: Mapping[int, _Rank], coming: Mapping[int, _Rank]) -> Change:
    def shards(rank: _Rank | None) -> dict[str, Shard]:
        return {} if rank is None else _shards(spec.model, rank[0].parallel, rank[1])

    made: dict[str, dict[int, int]] = {}
    freed: dict[str, dict[int, int]] = {}
    devices = tuple(sorted(leaving.keys() | coming.keys()))
    for device in devices:
        old, new = shards(leaving.get(device)), shards(coming.get(device))
        for which, there, other in ((made, new, old), (freed, old, new)):
            for tensor, shard in there.items():
                if shard != other.get(tensor):
                    which.setdefault(tensor, {})[device] = shard.nbytes
    return Change(devices, made, freed)


def _layers(spec: ClusterSpec, change: Change) -> list[tuple[str, ...]]:
    """Names of the tensors that move: those of one layer together, each other alone."""
    groups: dict[int | str, list[str]] = {}
    for tensor in spec.model.tensors:
        if tensor.name in change.made or tensor.name in change.freed:
            key = tensor.name if tensor.layer is None else tensor.layer
            groups.setdefault(key, []).append(tensor.name)
    return [tuple(names) for names in groups.values()]


def _steps(
    order: Iterable[tuple[Group, Parked]], change: Change, transfers: Iterable[Transfer]
) -> tuple[InPlaceStep, ...]:
    def pairs(names: Iterable[str], of: Mapping[str, Mapping[int, int]]) -> Pairs:
        return tuple(sorted((d, name) for name in names for d in of.get(name, ())))

    by_tensor: dict[str, list[tuple[int, Transfer]]] = {}
    for index, transfer in enumerate(transfers):
        by_tensor.setdefault(transfer.tensor, []).append((index, transfer))
    steps = []
    for group, parked in order:
        mine = sorted((i, t) for name in group.tensors for i, t in by_tensor.get(name, ()))
        steps.append(
            InPlaceStep(
                tensors=group.tensors,
                transfers=tuple(transfer for _, transfer in mine),
                parked=tuple(sorted(parked)),
                made=pairs(group.tensors, change.made),
                freed=pairs(group.tensors, change.freed),
            )
        )
    return tuple(steps)
