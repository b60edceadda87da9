"""Pure: what becomes of a running request whose replica goes, and how many copies of KV are made
while it runs. The surrogate binds by a compiled copy of this (`envs.surrogate.kv_rounds`), which a
test holds equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.cluster import Binding, BoundSequence, KvCostParams

MAX_ROUNDS = 5  # of KV copies while sequences run
DRAIN_SLACK = 1.5  # a sequence may take so much longer than predicted to end
NEVER = 1 << 40  # tokens that a sequence may still generate when it cannot be waited for


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
    binding = Binding.RECOMPUTE if recompute_s <= drain_s else Binding.DRAIN
    if migrate_s is not None and migrate_s <= min(recompute_s, drain_s):
        binding = Binding.MIGRATE
    return BoundSequence(request_id, binding, drain_s, migrate_s, recompute_s)


def is_settled(bound: BoundSequence | None, may_drain: bool) -> bool:
    """Bound for good: not one that only waited then, nor, unless it `may_drain`, one that was to
    have ended by now."""
    if bound is None:
        return False
    if bound.binding is Binding.DRAIN:
        return may_drain
    return bound.binding is Binding.MIGRATE or bound.recompute_s > 0


def is_round_due(rounds_s: Sequence[float], decode_step_s: float) -> bool:
    """Whether to copy once more while sequences run, after rounds that took `rounds_s`: until one
    is as short as a step, or they grow about as fast as they are copied."""
    if not rounds_s:
        return True
    is_short = rounds_s[-1] < decode_step_s
    is_stuck = len(rounds_s) > 1 and rounds_s[-1] > rounds_s[-2] / 2
    return len(rounds_s) < MAX_ROUNDS and not is_short and not is_stuck


def drain_timeout_s(drain_s: Iterable[float]) -> float:
    """How long the ends of sequences are waited for that were to come within `drain_s` each."""
    return max(drain_s) * DRAIN_SLACK
