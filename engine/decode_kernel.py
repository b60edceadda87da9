"""Decode attention over the paged cache on the CPU: one pass over keys and values where they lie.

Compiled by numba, once per number format, and kept on disk. The plain path beside it is
`engine.attention.decode_plain`, which copies every context together for torch's attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from engine.vector_exp import vector_exp

f32, u32, u64 = np.float32, np.uint32, np.uint64


def _widen(x):  # type: ignore[no-untyped-def]
    """float32 value of a cache entry, by the type `as_array` gave it."""
    raise NotImplementedError("only inside compiled code")


@overload(_widen, inline="always")
def _widen_compiled(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:  # bfloat16: the upper half of a float32
        return lambda x: u32(u32(x) << u32(16)).view(np.float32)
    if x == types.int16:  # float16: bits moved into place; the product mends the exponent's bias
        return lambda x: (
            f32(f32(u32((u32(x) & u32(0x7FFF)) << u32(13)).view(np.float32)) * f32(2.0**112))
            * (f32(1) if x >= 0 else f32(-1))
        )
    return lambda x: x


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as numpy: float32 as it is, 16-bit formats as their bits (bfloat16
    unsigned, float16 signed)."""
    if tensor.dtype is torch.float32:
        return tensor.numpy()
    bits = tensor.view(torch.int16).numpy()
    return bits.view(np.uint16) if tensor.dtype is torch.bfloat16 else bits


@njit(fastmath=True, error_model="numpy", forceinline=True)
def _score(keys, q, table, block_size, kv_heads, group, d, first, context, scores):  # type: ignore[no-untyped-def]
    for t in range(first, context):
        at = u64((table[t // block_size] * block_size + t % block_size) * kv_heads) * d
        for h in range(u64(kv_heads)):
            for row in range(h * group, (h + u64(1)) * group):
                total = f32(0)
                for i in range(d):
                    total += q[row * d + i] * _widen(keys[at + i])
                scores[row * u64(context) + u64(t)] = total
            at += d


@njit(fastmath=True, error_model="numpy", forceinline=True)
def _normalise(scores, num_heads, first, context):  # type: ignore[no-untyped-def]
    for row in range(u64(num_heads)):
        begin, end = row * u64(context) + u64(first), (row + u64(1)) * u64(context)
        top = scores[begin]
        for t in range(begin, end):
            top = max(top, scores[t])
        total = f32(0)
        for t in range(begin, end):
            e = vector_exp(scores[t] - top)
            scores[t] = e
            total += e
        share = f32(1) / total
        for t in range(begin, end):
            scores[t] *= share


@njit(fastmath=True, error_model="numpy", forceinline=True)
def _mix(values, scores, table, block_size, kv_heads, group, d, first, context, mixed):  # type: ignore[no-untyped-def]
    for i in range(u64(kv_heads) * group * d):
        mixed[i] = f32(0)
    for t in range(first, context):
        at = u64((table[t // block_size] * block_size + t % block_size) * kv_heads) * d
        for h in range(u64(kv_heads)):
            for row in range(h * group, (h + u64(1)) * group):
                share = scores[row * u64(context) + u64(t)]
                for i in range(d):
                    mixed[row * d + i] += share * _widen(values[at + i])
            at += d


@njit(fastmath=True, error_model="numpy", forceinline=True)
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, row, table, context, window, scaling, out
):
    """One sequence."""
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    num_heads, head_dim = query.shape[1], query.shape[2]
    # unsigned indices: numba would test signed ones for negative values in the innermost loops
    d, group, size = u64(head_dim), u64(num_heads // kv_heads), u64(num_heads * head_dim)
    first = max(0, context - window) if window > 0 else 0
    q, mixed = np.empty(num_heads * head_dim, f32), np.empty(num_heads * head_dim, f32)
    scores = np.empty(num_heads * context, f32)
    flat_query, flat_out, base = query.reshape(-1), out.reshape(-1), u64(row) * size
    for i in range(size):
        q[i] = flat_query[base + i] * scaling
    _score(keys.reshape(-1), q, table, block_size, kv_heads, group, d, first, context, scores)
    _normalise(scores, num_heads, first, context)
    _mix(values.reshape(-1), scores, table, block_size, kv_heads, group, d, first, context, mixed)
    for i in range(size):
        flat_out[base + i] = mixed[i]


# two functions, since numba's files of compiled code do not tell `parallel` apart
@njit(fastmath=True, nogil=True, error_model="numpy", cache=True)
def _attend_all(  # type: ignore[no-untyped-def]
    query, keys, values, rows, tables, offsets, contexts, window, scaling, out
):
    for s in range(rows.size):
        table = tables[offsets[s] :]
        _attend(query, keys, values, rows[s], table, contexts[s], window, scaling, out)


@njit(fastmath=True, nogil=True, error_model="numpy", cache=True, parallel=True)
def _attend_all_in_parallel(  # type: ignore[no-untyped-def]
    query, keys, values, rows, tables, offsets, contexts, window, scaling, out
):
    for s in prange(rows.size):
        table = tables[offsets[s] :]
        _attend(query, keys, values, rows[s], table, contexts[s], window, scaling, out)


def decode_attention(
    query: NDArray[np.float32],
    keys: NDArray[Any],
    values: NDArray[Any],
    rows: NDArray[np.int64],
    tables: NDArray[np.int64],
    offsets: NDArray[np.int64],
    contexts: NDArray[np.int64],
    window: int,
    scaling: float,
    out: NDArray[np.float32],
    parallel: bool = False,
) -> None:
    """Attention of sequences with one query token each.

    query, out [T, Hq, d]; keys, values [blocks, block_size, Hkv, d] as `as_array` gives them. Row
    rows[s] of query and out belongs to sequence s, whose block table starts at
    tables[offsets[s]], and which sees the last min(contexts[s], window) of its contexts[s] tokens;
    window 0 is none. Other rows of out stay as they are. `parallel` spreads the sequences over
    numba's threads.
    """
    attend = _attend_all_in_parallel if parallel else _attend_all
    attend(query, keys, values, rows, tables, offsets, contexts, window, f32(scaling), out)


def compile_for(keys: NDArray[Any], parallel: bool) -> None:
    """Compile, or load from the disk, what caches like `keys` need: seconds the first time."""
    none, nothing = np.zeros(0, np.int64), np.zeros((0, 1, 1), f32)
    decode_attention(nothing, keys, keys, none, none, none, none, 0, 1.0, nothing, parallel)
