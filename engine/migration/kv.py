"""Which KV blocks go from which rank to which: pure intersections of layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from engine.cluster import ModelSpec, ParallelConfig, Replica
from engine.messages import KvMove

Interval = tuple[int, int]


@lru_cache(maxsize=4096)
def _holding(model: ModelSpec, parallel: ParallelConfig, rank: int) -> tuple[Interval, Interval]:
    """(layers, KV heads) that a rank's cache covers, in whole-model numbers."""
    layers = parallel.layer_range(parallel.stage_of(rank), model.num_layers)
    return layers, parallel.kv_head_range(parallel.tp_rank_of(rank), model.num_kv_heads)


@lru_cache(maxsize=1024)
def _alike(model: ModelSpec, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Ranks that hold the same, in groups."""
    found: dict[tuple[Interval, Interval], list[int]] = {}
    for rank in range(parallel.num_devices):
        found.setdefault(_holding(model, parallel, rank), []).append(rank)
    return tuple(map(tuple, found.values()))


def _source_ranks(model: ModelSpec, src: Replica, dst_rank: int, dst_device: int) -> list[int]:
    """Ranks of `src` that together hold every (layer, head) exactly once. Of ranks that hold the
    same (replicated KV heads), the one on the target's own device, else they take turns."""
    devices = src.placement.devices
    return [
        next((r for r in ranks if devices[r] == dst_device), ranks[dst_rank % len(ranks)])
        for ranks in _alike(model, src.parallel)
    ]


def _intersection(a: Interval, b: Interval) -> Interval | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def _local(interval: Interval, origin: Interval) -> Interval:
    return interval[0] - origin[0], interval[1] - origin[0]


class FilledBlocks:
    """How many tokens of its source each block of a new replica holds already. KV only grows, so
    a copy made while the sequence decodes lacks the tokens since, and nothing else."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_tokens: dict[int, int] = {}  # of blocks that were taken to be filled

    def expect(self, blocks: Iterable[int]) -> None:
        """These were taken just now and hold nothing yet."""
        self._num_tokens |= dict.fromkeys(blocks, 0)

    def take_copies(
        self, src_table: Sequence[int], dst_table: Sequence[int], num_tokens: int
    ) -> tuple[list[int], list[int]]:
        """Source and destination blocks that must be copied for a sequence of `num_tokens` in the
        cache. They count as copied: a block that several tables share is sent once."""
        src_blocks, dst_blocks = [], []
        for index, (src, dst) in enumerate(zip(src_table, dst_table, strict=False)):
            wanted = min(self._block_size, num_tokens - index * self._block_size)
            if self._num_tokens.get(dst, wanted) < wanted:
                self._num_tokens[dst] = wanted
                src_blocks.append(src)
                dst_blocks.append(dst)
        return src_blocks, dst_blocks


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
        dst_layers, dst_heads = _holding(model, dst.parallel, dst_rank)
        for src_rank in _source_ranks(model, src, dst_rank, dst_device):
            src_device = src.placement.devices[src_rank]
            src_layers, src_heads = _holding(model, src.parallel, src_rank)
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


def link_loads(model: ModelSpec, src: Replica, dst: Replica) -> tuple[tuple[int, int, int], ...]:
    """(sending device, receiving device, bytes of a token's KV) for each link that is crossed when
    a sequence moves from replica to replica."""
    return _link_loads(model, replace(src, replica_id=0), replace(dst, replica_id=0))


@lru_cache(maxsize=4096)
def _link_loads(model: ModelSpec, src: Replica, dst: Replica) -> tuple[tuple[int, int, int], ...]:
    moves = list(kv_moves(model, src, dst, [0], [0]))
    return tuple((m.src, m.dst, kv_move_bytes(model, m, 1)) for m in moves if m.src != m.dst)


def link_bytes_per_token(model: ModelSpec, src: Replica, dst: Replica) -> int:
    """Bytes of a token's KV that cross a link when it moves from replica to replica."""
    return sum(nbytes for _, _, nbytes in link_loads(model, src, dst))


def kv_move_bytes(model: ModelSpec, move: KvMove, block_size: int) -> int:
    """Bytes of one copy; zero when it stays on its device."""
    if move.src == move.dst:
        return 0
    layers = move.src_layers[1] - move.src_layers[0]
    heads = move.src_heads[1] - move.src_heads[0]
    return len(move.src_blocks) * block_size * model.kv_bytes_per_token(layers, heads)
