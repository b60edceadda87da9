"""Pure: how many KV blocks each replica may use while two generations share their devices."""

from __future__ import annotations

from collections.abc import Mapping

from engine.cluster import ClusterSpec, Deployment
from engine.errors import InfeasibleError
from engine.migration.order import block_bytes, ranks_that_change, union_bytes
from engine.shards import num_kv_blocks


def kv_limits(
    spec: ClusterSpec,
    current: Deployment,
    target: Deployment,
    kv_blocks_used: Mapping[int, int],
    staging_bytes: int,
) -> dict[int, int]:
    """Most blocks in use, by replica id, of those that go and those that come.

    What the weights of both and `staging_bytes` leave of a device is shared: the old keep half of
    it, or what they use (`kv_blocks_used`, by replica id) where that is more, the new have the
    rest. Raises InfeasibleError when that is too little for one sequence of max_model_len.
    """
    leaving, coming = ranks_that_change(current, target)
    room = {
        device: spec.switch_memory_bytes
        - union_bytes(spec, leaving.get(device), coming.get(device))
        - staging_bytes
        for device in leaving.keys() | coming.keys()
    }
    limits: dict[int, int] = {}
    for device, (replica, rank) in leaving.items():
        own = num_kv_blocks(spec, replica.parallel)
        if device in coming:
            own = min(own, room[device] // 2 // block_bytes(spec, replica, rank))
        limits[replica.replica_id] = min(own, limits.get(replica.replica_id, own))
    for replica_id in limits:
        limits[replica_id] = max(limits[replica_id], kv_blocks_used.get(replica_id, 0))
    for device, (replica, rank) in coming.items():
        left = room[device]
        if device in leaving:
            old, old_rank = leaving[device]
            left -= limits[old.replica_id] * block_bytes(spec, old, old_rank)
        own = min(num_kv_blocks(spec, replica.parallel), left // block_bytes(spec, replica, rank))
        if own * spec.block_size < spec.model.max_model_len:
            raise InfeasibleError(
                f"device {device} has {max(left, 0)} bytes left for the KV cache of replica "
                f"{replica.replica_id} beside the deployment that serves, too little for one "
                f"sequence of {spec.model.max_model_len} tokens; switch in place, or when fewer "
                "requests run."
            )
        limits[replica.replica_id] = min(own, limits.get(replica.replica_id, own))
    return limits
