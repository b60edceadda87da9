"""KV blocks while two generations share their devices: by hand, and never more than fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import ClusterSpec, ModelSpec, TensorSpec, dense_deployment
from engine.cluster import parse_deployment_key as parse
from engine.errors import InfeasibleError
from engine.migration.plan import place
from engine.migration.room import kv_limits
from engine.shards import kv_bytes_per_block, num_kv_blocks

TENSORS = tuple(TensorSpec(f"layers.{i}", (8, 32), "layer", i, 0) for i in range(4))  # 1024 bytes
MODEL = ModelSpec("toy", 4, 4, 4, 2, 8, 16, 16, 4, TENSORS)  # 256 bytes of KV per token
SPEC = ClusterSpec(4, 4, 40_000, 1e9, 4, MODEL, 8, 64, switch_headroom_bytes=0)
KEYS = ("4xtp1pp1", "2xtp2pp1", "1xtp4pp1", "1xtp2pp2", "1xtp1pp4", "1xtp2pp1+2xtp1pp1")


def test_by_hand() -> None:
    """tp1 to tp2: 4096 + 2048 bytes of weights, 1000 of staging, 32856 left; a block of the old
    is 1024 bytes, of the new 512; the old keep half, 16 blocks, the new have 16472 // 512."""
    current = dense_deployment(parse("4xtp1pp1"))
    target = place(SPEC, current, parse("2xtp2pp1"))
    limits = kv_limits(SPEC, current, target, {0: 3}, 1000)
    assert limits == {0: 16, 1: 16, 2: 16, 3: 16, 4: 32, 5: 32}
    used = kv_limits(SPEC, current, target, {0: 20}, 1000)  # beside what is in use: 24 blocks
    assert used == limits | {0: 20, 4: 24}
    with pytest.raises(InfeasibleError, match=r"device 0 has 1112 bytes left .* in place"):
        kv_limits(SPEC, current, target, {0: 31}, 1000)


def test_as_much_memory_again_limits_nobody() -> None:
    spec = replace(SPEC, switch_headroom_bytes=None)
    current = dense_deployment(parse("4xtp1pp1"))
    target = place(spec, current, parse("2xtp2pp1"))
    limits = kv_limits(spec, current, target, {}, 0)
    assert limits == {
        r.replica_id: num_kv_blocks(spec, r.parallel) for r in (*current.replicas, *target.replicas)
    }


@settings(max_examples=80, deadline=None)
@given(
    old=st.sampled_from(KEYS),
    new=st.sampled_from(KEYS),
    memory=st.integers(10_000, 60_000),
    headroom=st.integers(0, 20_000),
    used=st.integers(0, 7),
)
def test_both_generations_fit_at_their_limits(
    old: str, new: str, memory: int, headroom: int, used: int
) -> None:
    spec = replace(SPEC, device_memory_bytes=memory, switch_headroom_bytes=headroom)
    current = dense_deployment(parse(old))
    target = place(spec, current, parse(new))
    in_use = {r.replica_id: used for r in current.replicas}
    try:
        limits = kv_limits(spec, current, target, in_use, 500)
    except InfeasibleError:
        return
    for device in range(4):
        needed, held = 500, set[tuple[str, int, int]]()
        for deployment in (current, target):
            for r in set(deployment.replicas) - (set(current.replicas) & set(target.replicas)):
                for rank, own in enumerate(r.placement.devices):
                    if own == device:
                        block = kv_bytes_per_block(MODEL, r.parallel, rank, 4)
                        needed += limits[r.replica_id] * block
                        first, last = r.parallel.layer_range(r.parallel.stage_of(rank), 4)
                        part = r.parallel.shard_range(r.parallel.tp_rank_of(rank), 8)
                        held |= {(f"{layer}", *part) for layer in range(first, last)}
        needed += sum((stop - start) * 32 * 4 for _, start, stop in held)
        assert needed <= spec.switch_memory_bytes
    for r in target.replicas:
        if r not in current.replicas:
            assert limits[r.replica_id] * 4 >= MODEL.max_model_len
