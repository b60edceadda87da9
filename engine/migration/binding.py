"""Pure: what becomes of a running request whose replica goes; engine and surrogate both ask."""

from __future__ import annotations

from engine.cluster import Binding, BoundSequence, KvCostParams


def bind_sequence(
    kv: KvCostParams,
    request_id: str,
    num_computed_tokens: int,
    kv_bytes: int,
    fits_target: bool,
    max_remaining_tokens: int,
) -> BoundSequence:
    """The cheapest of waiting for its end, moving its KV, and computing that again.

    `max_remaining_tokens` is what it may still generate at most, since nobody knows how much it
    will. With nothing computed yet there is nothing to move: that is a recompute at no cost.
    """
    drain_s = max_remaining_tokens * kv.decode_step_s
    migrate_s = kv_bytes / kv.link_bytes_per_s if fits_target and num_computed_tokens else None
    recompute_s = num_computed_tokens / kv.prefill_tokens_per_s
    costs = [(recompute_s, Binding.RECOMPUTE), (drain_s, Binding.DRAIN)]
    if migrate_s is not None:
        costs.insert(0, (migrate_s, Binding.MIGRATE))
    _, binding = min(costs, key=lambda cost: cost[0])  # the first of equals
    return BoundSequence(request_id, binding, drain_s, migrate_s, recompute_s)
