"""Replica choice from routing weights and present load. Pure, and blind to output lengths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engine.cluster import ClusterSpec, Replica, Routing
from engine.errors import InvalidRequestError
from engine.shards import num_kv_blocks

SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What the router sees of a replica."""

    replica_id: int
    num_devices: int
    num_outstanding: int  # requests sent there and not ended
    capacity_tokens: int  # longest sequence its KV cache can hold


def load_of(spec: ClusterSpec, replica: Replica, num_outstanding: int) -> ReplicaLoad:
    """A replica as the router sees it."""
    return ReplicaLoad(
        replica_id=replica.replica_id,
        num_devices=replica.parallel.num_devices,
        num_outstanding=num_outstanding,
        capacity_tokens=num_kv_blocks(spec, replica.parallel) * spec.block_size,
    )


def check_routing(routing: Routing) -> None:
    """Raise InvalidRequestError unless `shares` can be taken for any prompt length."""
    if len(set(routing.replica_ids)) != len(routing.replica_ids):
        raise InvalidRequestError(f"routing names a replica twice: {routing.replica_ids}.")
    if list(routing.prompt_edges) != sorted(set(routing.prompt_edges)):
        raise InvalidRequestError(f"prompt edges must rise, got {routing.prompt_edges}.")
    if routing.weights and any(len(row) != len(routing.weights) for row in routing.posterior):
        raise InvalidRequestError(
            f"each posterior row needs {len(routing.weights)} entries, one per workload type."
        )
    for name, rows in (("weights", routing.weights), ("posterior", routing.posterior)):
        for i, row in enumerate(rows):
            if not all(share >= 0 for share in row) or abs(sum(row) - 1) > SUM_TOLERANCE:
                raise InvalidRequestError(
                    f"routing {name} row {i} is {row}; expected shares of 0 or more that sum to 1."
                )


def shares(routing: Routing, replicas: Sequence[ReplicaLoad], prompt_tokens: int) -> list[float]:
    """Wanted share of each replica for a prompt of this length, in the order of `replicas`.

    Without routing rows, or for a deployment the routing does not know: the device counts.
    """
    known = {replica_id: i for i, replica_id in enumerate(routing.replica_ids)}
    if not routing.weights or any(r.replica_id not in known for r in replicas):
        return [float(r.num_devices) for r in replicas]
    bucket = bisect_left(routing.prompt_edges, prompt_tokens)
    posterior = routing.posterior[bucket]
    return [
        sum(p * row[known[r.replica_id]] for p, row in zip(posterior, routing.weights, strict=True))
        for r in replicas
    ]


def pick(
    routing: Routing, replicas: Sequence[ReplicaLoad], prompt_tokens: int, needed_tokens: int
) -> int | None:
    """Replica id for a request, or None when none can hold `needed_tokens`.

    The replica with the least (outstanding + 1) / share wins, the first on a tie: in balance the
    outstanding requests stand in proportion to the shares. Replicas of no share are used only
    when every one that fits has none.
    """
    fitting = [r for r in replicas if r.capacity_tokens >= needed_tokens]
    if not fitting:
        return None
    wanted = shares(routing, fitting, prompt_tokens)
    if not any(wanted):
        wanted = [float(r.num_devices) for r in fitting]
    scores = [
        (load.num_outstanding + 1) / share if share > 0 else float("inf")
        for load, share in zip(fitting, wanted, strict=True)
    ]
    return fitting[scores.index(min(scores))].replica_id
