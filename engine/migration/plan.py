"""Pure: (present deployment, wanted configurations) -> placement, transfers, bytes, seconds.

Placement is an assignment problem: putting new rank r on device d costs the bytes that r needs and
d does not hold. Every missing byte must arrive at least once, so the assignment's optimum is a
lower bound for any plan, and the plan made here attains it (SpotServe, arXiv 2311.15566, uses the
same matching for device mapping).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.optimize import linear_sum_assignment

from engine.cluster import (
    ClusterSpec,
    Deployment,
    KvCostParams,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    SwitchPlan,
    Transfer,
)
from engine.errors import InfeasibleError
from engine.migration.nodes import keep_within_nodes
from engine.shards import Shard, num_kv_blocks, rank_shards

KEEP_BONUS_BYTES = 0.25  # below one byte: breaks ties in favour of a rank that can stay
Held = dict[str, Shard]  # what a device holds, by tensor


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """What a switch would move, before anything is planned in detail."""

    weight_bytes: int
    seconds: float
    devices_changed: int


@lru_cache(maxsize=4096)
def _shards_by_tensor(model: ModelSpec, parallel: ParallelConfig, rank: int) -> Held:
    return {s.tensor: s for s in rank_shards(model, parallel, rank)}


def held_shards(model: ModelSpec, deployment: Deployment) -> dict[int, Held]:
    """Device -> what it holds while `deployment` serves. Idle devices hold nothing."""
    return {
        device: _shards_by_tensor(model, replica.parallel, rank)
        for replica in deployment.replicas
        for rank, device in enumerate(replica.placement.devices)
    }


def _overlap_bytes(need: Shard, have: Shard | None) -> int:
    if have is None:
        return 0
    rows = min(need.stop, have.stop) - max(need.start, have.start)
    return need.nbytes * max(rows, 0) // (need.stop - need.start)


@lru_cache(maxsize=65536)
def _missing_bytes(
    model: ModelSpec,
    need: tuple[ParallelConfig, int],
    have: tuple[ParallelConfig, int] | None,
) -> int:
    """Bytes a (configuration, rank) needs beyond what another (configuration, rank) holds."""
    held = _shards_by_tensor(model, *have) if have is not None else {}
    return sum(
        s.nbytes - _overlap_bytes(s, held.get(s.tensor))
        for s in _shards_by_tensor(model, *need).values()
    )


def _paired_replicas(
    current: Deployment, target: Sequence[ParallelConfig]
) -> list[tuple[ParallelConfig, Replica | None]]:
    """Each wanted configuration with a present replica of the same one, if any is left."""
    left = list(current.replicas)
    pairs: list[tuple[ParallelConfig, Replica | None]] = []
    for parallel in target:
        match = next((r for r in left if r.parallel == parallel), None)
        if match is not None:
            left.remove(match)
        pairs.append((parallel, match))
    return pairs


def _cost_matrix(
    spec: ClusterSpec,
    current: Deployment,
    pairs: list[tuple[ParallelConfig, Replica | None]],
    devices: Sequence[int],
) -> np.ndarray:
    """[new ranks, devices] bytes missing, less a tie-break where a rank would simply stay."""
    role = {
        device: (replica.parallel, rank)
        for replica in current.replicas
        for rank, device in enumerate(replica.placement.devices)
    }
    rows = []
    for parallel, kept in pairs:
        for rank in range(parallel.num_devices):
            row = [
                float(_missing_bytes(spec.model, (parallel, rank), role.get(d))) for d in devices
            ]
            if kept is not None and kept.placement.devices[rank] in devices:
                row[devices.index(kept.placement.devices[rank])] -= KEEP_BONUS_BYTES
            rows.append(row)
    return np.array(rows)


def _tp_groups(target: Sequence[ParallelConfig]) -> list[range]:
    """Rows of the cost matrix that are the tp ranks of one stage."""
    groups, first = [], 0
    for parallel in target:
        groups += [
            range(first + s * parallel.tp, first + (s + 1) * parallel.tp)
            for s in range(parallel.pp)
        ]
        first += parallel.num_devices
    return groups


def place(
    spec: ClusterSpec,
    current: Deployment,
    target: Sequence[ParallelConfig],
    dead_devices: Iterable[int] = (),
) -> Deployment:
    """The placement of `target` that moves the fewest weight bytes; on several nodes, of those
    that keep each tp group on the node where it alone would move the fewest.

    A replica that keeps its configuration and all its devices keeps its id; others get new ids.
    Raises InfeasibleError when devices, heads or memory do not suffice.
    """
    spec.check(target)
    for parallel in set(target):
        check_memory(spec, parallel)
    devices = [d for d in range(spec.num_devices) if d not in set(dead_devices)]
    needed = sum(c.num_devices for c in target)
    if needed > len(devices):
        raise InfeasibleError(
            f"the deployment needs {needed} devices, only {len(devices)} are alive; use fewer."
        )
    pairs = _paired_replicas(current, target)
    costs = _cost_matrix(spec, current, pairs, devices)
    if spec.devices_per_node < spec.num_devices:
        nodes = [d // spec.devices_per_node for d in devices]
        costs = keep_within_nodes(costs, _tp_groups(target), nodes)
    _, columns = linear_sum_assignment(costs)
    next_id = max((r.replica_id for r in current.replicas), default=-1) + 1
    replicas, first = [], 0
    for parallel, kept in pairs:
        chosen = tuple(devices[c] for c in columns[first : first + parallel.num_devices])
        first += parallel.num_devices
        if kept is not None and chosen == kept.placement.devices:
            replicas.append(kept)
        else:
            replicas.append(Replica(next_id, parallel, Placement(chosen)))
            next_id += 1
    return Deployment(tuple(replicas))


def check_memory(spec: ClusterSpec, parallel: ParallelConfig) -> None:
    """Raise InfeasibleError unless one sequence of max_model_len fits beside the weights."""
    tokens = num_kv_blocks(spec, parallel) * spec.block_size
    if tokens < spec.model.max_model_len:
        raise InfeasibleError(
            f"a {parallel.key} replica of {spec.model.name} has room for {max(tokens, 0)} KV "
            f"tokens in {spec.device_memory_bytes} bytes per device, less than max_model_len="
            f"{spec.model.max_model_len}; use more devices per replica, more memory, or a "
            "shorter max_model_len."
        )


def _pieces(
    need: Shard, have: Shard | None, holders: dict[int, Shard]
) -> Iterable[tuple[int, int, list[int]]]:
    """Missing intervals of a shard, cut at holders' borders, each with the devices that hold it."""
    cuts = {need.start, need.stop}
    for shard in [*holders.values(), *([have] if have else [])]:
        cuts |= {c for c in (shard.start, shard.stop) if need.start < c < need.stop}
    borders = sorted(cuts)
    for start, stop in pairwise(borders):
        if have is not None and have.start <= start and stop <= have.stop:
            continue
        sources = [d for d, s in holders.items() if s.start <= start and stop <= s.stop]
        yield start, stop, sources


def plan_transfers(
    model: ModelSpec, current: Deployment, target: Deployment
) -> tuple[Transfer, ...]:
    """Every missing interval once, from the holder with the least bytes to send so far."""
    held = held_shards(model, current)
    sending = dict.fromkeys(held, 0)
    transfers = []
    for dst, needs in held_shards(model, target).items():
        for tensor, need in needs.items():
            have = held.get(dst, {}).get(tensor)
            holders = {d: s[tensor] for d, s in held.items() if d != dst and tensor in s}
            for start, stop, sources in _pieces(need, have, holders):
                if not sources:
                    raise InfeasibleError(f"no device holds {tensor}[{start}:{stop}].")
                src = min(sources, key=lambda d: (sending[d], d))
                nbytes = need.nbytes * (stop - start) // (need.stop - need.start)
                sending[src] += nbytes
                transfers.append(Transfer(tensor, need.dim, start, stop, src, dst, nbytes))
    return tuple(transfers)


def _port_bytes(transfers: Iterable[Transfer]) -> tuple[Counter[int], Counter[int]]:
    """Bytes (sent, received) by device."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for t in transfers:
        sent[t.src] += t.nbytes
        received[t.dst] += t.nbytes
    return sent, received


def link_seconds(transfers: Iterable[Transfer], link_bytes_per_s: float) -> float:
    """Largest load of any port, in seconds: no schedule over these transfers can be shorter."""
    sent, received = _port_bytes(transfers)
    return max([0, *sent.values(), *received.values()]) / link_bytes_per_s


def plan_switch(
    spec: ClusterSpec,
    current: Deployment,
    epoch: int,
    target: Sequence[ParallelConfig],
    kv: KvCostParams,
    overhead_s: float = 0.0,
    decision_id: str = "",
    dead_devices: Iterable[int] = (),
) -> SwitchPlan:
    """Plan the switch from `current` (of generation `epoch`) to configurations `target`.

    `overhead_s` is the measured time of a switch that moves no byte. Raises InfeasibleError.
    """
    placed = place(spec, current, target, dead_devices)
    transfers = plan_transfers(spec.model, current, placed)
    nbytes = sum(t.nbytes for t in transfers)
    _, received = _port_bytes(transfers)
    return SwitchPlan(
        target=placed,
        expected_epoch=epoch,
        transfers=transfers,
        kv=kv,
        weight_bytes=nbytes,
        lower_bound_bytes=nbytes,
        predicted_s=overhead_s + link_seconds(transfers, spec.link_bytes_per_s),
        lower_bound_s=max([0, *received.values()]) / spec.link_bytes_per_s,
        decision_id=decision_id,
    )


@lru_cache(maxsize=65536)
def _switch_cost(
    spec: ClusterSpec, current: Deployment, target: tuple[ParallelConfig, ...]
) -> SwitchCost:
    placed = place(spec, current, target)
    transfers = plan_transfers(spec.model, current, placed)
    kept = {r for r in placed.replicas if r in current.replicas}
    changed = placed.devices - {d for r in kept for d in r.placement.devices}
    return SwitchCost(
        weight_bytes=sum(t.nbytes for t in transfers),
        seconds=link_seconds(transfers, spec.link_bytes_per_s),
        devices_changed=len(changed),
    )


def switch_cost(
    spec: ClusterSpec, current: Deployment, target: Sequence[ParallelConfig]
) -> SwitchCost:
    """Bytes, seconds on the links (without the fixed overhead) and devices touched; cached."""
    return _switch_cost(spec, current, tuple(target))
