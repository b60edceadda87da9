"""Paged attention for transformers' decoders: reads and writes a rank's KV cache.

One step is a flat batch [1, heads, T, head_dim]: sequences with one token are attended together,
on the CPU by a kernel that reads the cache in place, prefill chunks one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.decode_kernel import decode_attention
from engine.kv_cache import KvCache
from engine.request import StepInput

ATTENTION_NAME = "tidewright_paged"


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The D sequences with one token: `rows` [D] of the flat batch, tokens each sees [D], and all
    block tables one after another, sequence s from offsets[s] on."""

    rows: NDArray[np.int64]
    contexts: NDArray[np.int64]
    tables: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows [start, stop) of the flat batch: tokens `context` .. of one sequence, whose cached
    tokens before them are `context` many, in blocks `block_table` [N]."""

    start: int
    stop: int
    context: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What attention needs to know of a step, made once and read by each layer."""

    kv: KvCache
    first_layer: int  # of this stage; cache layers are numbered from it
    slot_mapping: Tensor  # [T], where each token's keys and values go
    positions: Tensor  # [T], context position of each token
    decode: DecodeGroup | None
    prefill: tuple[PrefillChunk, ...]
    plain: bool = False  # torch's operations only
    parallel: bool = False  # the CPU kernel may use several threads


def build_forward_context(
    step: StepInput,
    kv: KvCache,
    first_layer: int,
    plain: bool = False,
    parallel: bool = False,
) -> ForwardContext:
    """Index tensors of a step, on the cache's device. A cache elsewhere than on the CPU has the
    plain path only."""
    device, size = kv.data.device, kv.block_size
    starts, lengths = np.array(step.starts), np.array(step.lengths)
    widths = np.fromiter(map(len, step.block_tables), np.int64, len(step.block_tables))
    tables = np.fromiter(chain.from_iterable(step.block_tables), np.int64, widths.sum())
    offsets, rows = np.cumsum(widths) - widths, np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(starts)), lengths)
    positions = np.arange(len(owner)) - rows[owner] + starts[owner]
    slots = tables[offsets[owner] + positions // size] * size + positions % size
    single = lengths == 1
    chunks = tuple(
        PrefillChunk(
            start=int(rows[b]),
            stop=int(rows[b] + lengths[b]),
            context=int(starts[b]),
            block_table=torch.from_numpy(
                tables[offsets[b] : offsets[b] - (-(starts[b] + lengths[b]) // size)]
            ).to(device),
        )
        for b in np.flatnonzero(~single)
    )
    group = DecodeGroup(rows[single], starts[single] + 1, tables, offsets[single])
    return ForwardContext(
        kv=kv,
        first_layer=first_layer,
        slot_mapping=torch.from_numpy(slots).to(device),
        positions=torch.from_numpy(positions).to(device),
        decode=group if len(group.rows) else None,
        prefill=chunks,
        plain=plain or kv.arrays is None,
        parallel=parallel,
    )


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    forward_context: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' AttentionInterface.

    query [1, Hq, T, d]; key, value [1, Hkv, T, d]; returns [1, T, Hq, d].
    """
    context = forward_context
    assert context is not None, "the model must be called with forward_context"
    assert dropout == 0.0, dropout
    layer = int(module.layer_idx) - context.first_layer  # type: ignore[arg-type]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    context.kv.write(layer, context.slot_mapping, k, v)
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if context.decode is not None:
        decode = decode_plain if context.plain else decode_in_place
        decode(context, layer, q, scaling, sliding_window, output)
    for chunk in context.prefill:
        part = slice(chunk.start, chunk.stop)
        own = (k[part], v[part])
        seen = own if chunk.context == 0 else context.kv.gather(layer, chunk.block_table)
        output[part] = _prefill(q[part], *seen, chunk.context, scaling, sliding_window)
    return output.unsqueeze(0), None


def decode_in_place(
    context: ForwardContext,
    layer: int,
    q: Tensor,
    scaling: float,
    window: int | None,
    output: Tensor,
) -> None:
    """Fill the decode group's rows of output [T, Hq, d] by the CPU kernel."""
    group = context.decode
    assert group is not None
    whole = q.dtype is torch.float32
    out = output if whole else torch.empty(q.shape, dtype=torch.float32)
    keys, values = context.kv.arrays[:, layer]
    decode_attention(
        q.float().contiguous().numpy(),
        keys,
        values,
        group.rows,
        group.tables,
        group.offsets,
        group.contexts,
        window or 0,
        scaling,
        out.numpy(),
        context.parallel,
    )
    if not whole:
        rows = torch.from_numpy(group.rows)
        output[rows] = out[rows].to(output.dtype)


def decode_plain(
    context: ForwardContext,
    layer: int,
    q: Tensor,
    scaling: float,
    window: int | None,
    output: Tensor,
) -> None:
    """The same by torch's attention over gathered contexts, padded to the longest. The query heads
    that share a KV head ride as its query positions, so keys and values are not repeated."""
    group, device, size = context.decode, q.device, context.kv.block_size
    assert group is not None
    rows = torch.from_numpy(group.rows).to(device)
    width = -(-int(group.contexts.max()) // size)
    at = np.minimum(group.offsets[:, None] + np.arange(width), len(group.tables) - 1)
    used = np.arange(width) * size < group.contexts[:, None]
    padded = torch.from_numpy(np.where(used, group.tables[at], 0)).to(device)  # [D, width]
    k, v = context.kv.gather(layer, padded.flatten())
    heads, dim = k.shape[1], k.shape[2]
    k, v = (x.view(len(rows), -1, heads, dim).transpose(1, 2) for x in (k, v))  # [D, Hkv, S, d]
    position = torch.arange(k.shape[2], device=device)
    seen_until = torch.from_numpy(group.contexts).to(device)[:, None]
    seen = position < seen_until
    if window is not None:
        seen &= position >= seen_until - window
    grouped = q[rows].view(len(rows), heads, -1, dim)  # [D, Hkv, Hq / Hkv, d]
    out = scaled_dot_product_attention(
        grouped, k, v, attn_mask=seen[:, None, None, :], scale=scaling
    )
    output[rows] = out.flatten(1, 2)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, start: int, scaling: float, window: int | None
) -> Tensor:
    """q [t, Hq, d] at positions start .. start + t, against k and v from position 0."""
    stop = start + q.shape[0]
    mask = _causal_mask(start, stop, window, q.device)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[:stop].transpose(0, 1)[None],
        v[:stop].transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _causal_mask(start: int, stop: int, window: int | None, device: torch.device) -> Tensor | None:
    """[stop - start, stop], True where seen; None where plain square causality says the same."""
    if start == 0 and (window is None or window >= stop):
        return None
    at = torch.arange(start, stop, device=device)[:, None]
    to = torch.arange(stop, device=device)[None, :]
    mask = to <= at
    return mask if window is None else mask & (to > at - window)
