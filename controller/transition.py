"""Which switches memory would not allow to be live: they pause the replicas that change. Pure.

Live needs both generations beside each other on every device that changes
(`engine.migration.order`). Of one target that is a most number of KV blocks in use of each replica
that goes, found once per present deployment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.cluster import ClusterSpec, Deployment, ParallelConfig
from engine.errors import InfeasibleError
from engine.migration.order import (
    block_bytes,
    default_staging_bytes,
    ranks_that_change,
    union_bytes,
)
from engine.migration.plan import place

NEVER = -1  # blocks in use: more than that already is too much
Limits = Mapping[int, int]  # replica id -> most KV blocks in use for a live switch


class TransitionRoom:
    """Of one pool. `always_live` tells that no switch between feasible deployments is in place."""

    def __init__(self, spec: ClusterSpec, configs: Sequence[ParallelConfig]) -> None:
        self._spec, self._configs = spec, configs
        self._current: Deployment | None = None
        self._limits: dict[tuple[ParallelConfig, ...], Limits] = {}
        self.always_live = self._is_always_live()

    def _is_always_live(self) -> bool:
        """Whether even a full device has room for any rank that may come."""
        spec = self._spec
        blocks = -(-spec.model.max_model_len // spec.block_size)
        coming = 0
        for parallel in self._configs:
            placed = place(spec, Deployment(()), (parallel,))
            for rank in ranks_that_change(Deployment(()), placed)[1].values():
                need = union_bytes(spec, None, rank) + blocks * block_bytes(spec, *rank)
                coming = max(coming, need)
        needed = spec.device_memory_bytes + coming + default_staging_bytes(spec)
        return needed <= spec.switch_memory_bytes

    def is_in_place(
        self,
        current: Deployment,
        kv_blocks_used: Mapping[int, int],
        target: tuple[ParallelConfig, ...],
    ) -> bool:
        """Whether the switch to `target` would be in place; False where none is possible."""
        if self.always_live:
            return False
        if current is not self._current:
            self._current, self._limits = current, {}
        if target not in self._limits:
            self._limits[target] = live_limits(self._spec, current, target)
        limits = self._limits[target]
        return any(kv_blocks_used.get(replica, 0) > most for replica, most in limits.items())


def live_limits(
    spec: ClusterSpec, current: Deployment, target: Sequence[ParallelConfig]
) -> dict[int, int]:
    """By id of each replica that goes, the most KV blocks in use with which a switch is live;
    `NEVER` where weights alone are too much."""
    try:
        placed = place(spec, current, target)
    except InfeasibleError:
        return {}
    leaving, coming = ranks_that_change(current, placed)
    blocks = -(-spec.model.max_model_len // spec.block_size)
    limits: dict[int, int] = {}
    for device in leaving.keys() | coming.keys():
        old, new = leaving.get(device), coming.get(device)
        room = spec.switch_memory_bytes - default_staging_bytes(spec) - union_bytes(spec, old, new)
        if new is not None:
            room -= blocks * block_bytes(spec, *new)
        if old is not None:
            most = room // block_bytes(spec, *old) if room >= 0 else NEVER
            limits[old[0].replica_id] = min(limits.get(old[0].replica_id, most), most)
        elif room < 0:  # an idle device: no replica's KV is to blame
            limits[NEVER] = NEVER
    return limits
