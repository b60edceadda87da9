"""What each rank of a replica holds: intervals of checkpoint tensors. Decided here, purely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from engine.cluster import ClusterSpec, ModelSpec, ParallelConfig, TensorSpec
from engine.errors import InfeasibleError


@dataclass(frozen=True, slots=True)
class Shard:
    """Interval [start, stop) of `tensor` along `dim`; dim None is the whole tensor."""

    tensor: str
    dim: int | None
    start: int
    stop: int
    nbytes: int


def _shard(tensor: TensorSpec, model: ModelSpec, parallel: ParallelConfig, tp_rank: int) -> Shard:
    total = prod(tensor.shape) * model.dtype_bytes
    if tensor.tp_dim is None:
        return Shard(tensor.name, None, 0, tensor.shape[0], total)
    size = tensor.shape[tensor.tp_dim]
    if tensor.role == "kv":  # whole KV heads, shared by ranks when tp exceeds their number
        first, last = parallel.kv_head_range(tp_rank, model.num_kv_heads)
        width = size // model.num_kv_heads
        start, stop = first * width, last * width
    else:
        start, stop = parallel.shard_range(tp_rank, size)
    return Shard(tensor.name, tensor.tp_dim, start, stop, total // size * (stop - start))


def rank_needs(tensor: TensorSpec, model: ModelSpec, parallel: ParallelConfig, rank: int) -> bool:
    """Whether a rank holds (its interval of) a tensor, from the tensor's role and its stage."""
    stage, tp_rank = parallel.stage_of(rank), parallel.tp_rank_of(rank)
    match tensor.role:
        case "embed":
            return stage == 0
        case "norm":
            return stage == parallel.pp - 1
        case "head":  # one rank samples: the last stage's tp rank 0
            return stage == parallel.pp - 1 and tp_rank == 0
        case "embed+head":  # tied embeddings
            return stage == 0 or (stage == parallel.pp - 1 and tp_rank == 0)
    assert tensor.layer is not None, tensor
    first, last = parallel.layer_range(stage, model.num_layers)
    return first <= tensor.layer < last


def rank_shard(
    tensor: TensorSpec, model: ModelSpec, parallel: ParallelConfig, rank: int
) -> Shard | None:
    """What that rank holds of one tensor, None if nothing."""
    if not rank_needs(tensor, model, parallel, rank):
        return None
    return _shard(tensor, model, parallel, parallel.tp_rank_of(rank))


def rank_shards(model: ModelSpec, parallel: ParallelConfig, rank: int) -> tuple[Shard, ...]:
    """All shards that rank `rank` of a replica with this configuration holds."""
    shards = (rank_shard(t, model, parallel, rank) for t in model.tensors)
    return tuple(s for s in shards if s is not None)


def rank_weight_bytes(model: ModelSpec, parallel: ParallelConfig, rank: int) -> int:
    return sum(s.nbytes for s in rank_shards(model, parallel, rank))


def kv_bytes_per_block(
    model: ModelSpec, parallel: ParallelConfig, rank: int, block_size: int
) -> int:
    """Bytes of one KV block on that rank: its stage's layers, its KV heads."""
    first, last = parallel.layer_range(parallel.stage_of(rank), model.num_layers)
    return block_size * model.kv_bytes_per_token(last - first, model.kv_heads_per_rank(parallel))


@lru_cache(maxsize=4096)
def num_kv_blocks(spec: ClusterSpec, parallel: ParallelConfig) -> int:
    """KV blocks a replica can hold: the least over its ranks of what the weights leave free.

    Zero or negative means that the weights alone do not fit a device.
    """
    model = spec.model
    blocks = [
        (spec.device_memory_bytes - rank_weight_bytes(model, parallel, rank))
        // kv_bytes_per_block(model, parallel, rank, spec.block_size)
        for rank in range(parallel.num_devices)
    ]
    return min(blocks)


def fits(spec: ClusterSpec, parallel: ParallelConfig) -> bool:
    """Whether a replica can hold the weights and at least one sequence of the longest length."""
    if not spec.model.allows_tp(parallel.tp) or parallel.pp > spec.model.num_layers:
        return False
    return num_kv_blocks(spec, parallel) * spec.block_size >= spec.model.max_model_len


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
