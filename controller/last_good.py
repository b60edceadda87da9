"""The last good measurement of every replica, in place of one that is missing or no number. Pure.

What a replica last reported stands until it reports again: unknown is never read as zero. The time
of a measurement is kept with it, so that what is held too long shows as stale.
"""

from __future__ import annotations

import math
from dataclasses import replace

from engine.cluster import ClusterSnapshot, ReplicaStats
from engine.errors import InvalidRequestError


def is_good(stats: ReplicaStats) -> bool:
    """Whether every figure is a finite number of 0 or more."""
    least = min(
        stats.num_running,
        stats.num_waiting,
        stats.waiting_prompt_tokens,
        stats.running_context_tokens,
        stats.kv_blocks_total,
        stats.kv_blocks_used,
    )
    total = (
        stats.measured_at_s
        + stats.num_running
        + stats.num_waiting
        + stats.waiting_prompt_tokens
        + stats.running_context_tokens
        + stats.kv_blocks_total
        + stats.kv_blocks_used
    )
    return math.isfinite(total) and least >= 0


class LastGood:
    """Of one cluster. Replicas that a switch removed are forgotten."""

    def __init__(self) -> None:
        self._known: dict[int, ReplicaStats] = {}

    def reset(self) -> None:
        self._known = {}

    def fill(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """The snapshot with good measurements only; replicas that never had one are left out.

        Raises InvalidRequestError when the snapshot's own time is no number.
        """
        if not math.isfinite(snapshot.now_s):
            raise InvalidRequestError(
                f"the snapshot is of {snapshot.now_s} s; expected a finite time, so it is not used."
            )
        good = {s.replica_id: s for s in snapshot.replicas if is_good(s)}
        wanted = [r.replica_id for r in snapshot.deployment.replicas]
        if len(good) == len(snapshot.replicas) and all(i in good for i in wanted):
            self._known = good
            return snapshot
        dead = {s.replica_id for s in snapshot.replicas if not s.alive}
        held = {i: self._known[i] for i in wanted if i not in good and i in self._known}
        held = {i: replace(s, alive=False) if i in dead else s for i, s in held.items()}
        self._known = good | held
        return replace(snapshot, replicas=tuple(self._known.values()))
