"""Which KV blocks go from which rank to which: pure intersections of layers and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.cluster import ModelSpec, Replica
from engine.messages import KvMove

Interval = tuple[int, int]


def _holding(model: ModelSpec, replica: Replica, rank: int) -> tuple[Interval, Interval]:
    """(layers, KV heads) that a rank's cache covers, in whole-model numbers."""
    parallel = replica.parallel
    layers = parallel.layer_range(parallel.stage_of(rank), model.num_layers)
    return layers, parallel.kv_head_range(parallel.tp_rank_of(rank), model.num_kv_heads)


def _source_ranks(model: ModelSpec, src: Replica, dst_rank: int, dst_device: int) -> list[int]:
    """Ranks of `src` that together hold every (layer, head) exactly once. Of ranks that hold the
    same (replicated KV heads), the one on the target's own device, else they take turns."""
    alike: dict[tuple[Interval, Interval], list[int]] = {}
    for rank in range(src.parallel.num_devices):
        alike.setdefault(_holding(model, src, rank), []).append(rank)
    devices = src.placement.devices
    return [
        next((r for r in ranks if devices[r] == dst_device), ranks[dst_rank % len(ranks)])
        for ranks in alike.values()
    ]


def _intersection(a: Interval, b: Interval) -> Interval | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def _local(interval: Interval, origin: Interval) -> Interval:
    return interval[0] - origin[0], interval[1] - origin[0]


def take_copies(
    src_table: Sequence[int], dst_table: Sequence[int], to_fill: set[int]
) -> tuple[list[int], list[int]]:
    """Source and destination blocks of the copies that one sequence needs. What it fills is taken
    out of `to_fill`, so that a block which several tables share is sent once."""
    pairs = [(s, d) for s, d in zip(src_table, dst_table, strict=False) if d in to_fill]
    to_fill.difference_update(d for _, d in pairs)
    return [s for s, _ in pairs], [d for _, d in pairs]


def kv_moves(
    model: ModelSpec,
    src: Replica,
    dst: Replica,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
) -> Iterator[KvMove]:
    """Copies that fill `dst_blocks` of every rank of `dst` from `src_blocks` of `src`, block by
    block. Every (layer, head) of every block is written exactly once."""
    assert len(src_blocks) == len(dst_blocks), (len(src_blocks), len(dst_blocks))
    if not src_blocks:
        return
    for dst_rank, dst_device in enumerate(dst.placement.devices):
        dst_layers, dst_heads = _holding(model, dst, dst_rank)
        for src_rank in _source_ranks(model, src, dst_rank, dst_device):
            src_device = src.placement.devices[src_rank]
            src_layers, src_heads = _holding(model, src, src_rank)
            layers = _intersection(src_layers, dst_layers)
            heads = _intersection(src_heads, dst_heads)
            if layers is None or heads is None:
                continue
            yield KvMove(
                src=src_device,
                dst=dst_device,
                src_replica=src.replica_id,
                dst_replica=dst.replica_id,
                src_blocks=list(src_blocks),
                dst_blocks=list(dst_blocks),
                src_layers=_local(layers, src_layers),
                dst_layers=_local(layers, dst_layers),
                src_heads=_local(heads, src_heads),
                dst_heads=_local(heads, dst_heads),
            )


def kv_move_bytes(model: ModelSpec, move: KvMove, block_size: int) -> int:
    """Bytes of one copy; zero when it stays on its device."""
    if move.src == move.dst:
        return 0
    layers = move.src_layers[1] - move.src_layers[0]
    heads = move.src_heads[1] - move.src_heads[0]
    return len(move.src_blocks) * block_size * model.kv_bytes_per_token(layers, heads)
