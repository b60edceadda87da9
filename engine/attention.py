"""Paged attention for transformers' decoders: reads and writes a rank's KV cache.

One step is a flat batch [1, heads, T, head_dim]: decoding sequences contribute one token each and
are attended together, prefill chunks one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from engine.kv_cache import KvCache
from engine.request import StepInput

ATTENTION_NAME = "tidewright_paged"


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The D sequences with one token: `rows` [D] of the flat batch, block tables [D, N] padded
    with block 0, and the last visible position [D]."""

    rows: Tensor
    block_tables: Tensor
    positions: Tensor


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


def build_forward_context(step: StepInput, kv: KvCache, first_layer: int) -> ForwardContext:
    """Index tensors of a step, on the cache's device."""
    device, size = kv.data.device, kv.block_size
    tables = [torch.tensor(table, dtype=torch.long) for table in step.block_tables]
    positions, slots, chunks = [], [], []
    decode_rows: list[int] = []
    decode_tables: list[Tensor] = []
    row = 0
    for table, start, length in zip(tables, step.starts, step.lengths, strict=True):
        where = torch.arange(start, start + length)
        table = table[: -(-(start + length) // size)]
        positions.append(where)
        slots.append(table[where // size] * size + where % size)
        if length == 1:
            decode_rows.append(row)
            decode_tables.append(table)
        else:
            chunks.append(PrefillChunk(row, row + length, start, table.to(device)))
        row += length
    all_positions = torch.cat(positions).to(device)
    return ForwardContext(
        kv=kv,
        first_layer=first_layer,
        slot_mapping=torch.cat(slots).to(device),
        positions=all_positions,
        decode=_decode_group(decode_rows, decode_tables, all_positions),
        prefill=tuple(chunks),
    )


def _decode_group(rows: list[int], tables: list[Tensor], positions: Tensor) -> DecodeGroup | None:
    if not rows:
        return None
    index = torch.tensor(rows, device=positions.device)
    width = max(len(table) for table in tables)
    padded = torch.stack([pad(table, (0, width - len(table))) for table in tables])
    return DecodeGroup(index, padded.to(positions.device), positions[index])


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
        rows, tables = context.decode.rows, context.decode.block_tables
        k, v = context.kv.gather(layer, tables.flatten())
        output[rows] = _decode(q[rows], k, v, context.decode, scaling, sliding_window)
    for chunk in context.prefill:
        part = slice(chunk.start, chunk.stop)
        k, v = context.kv.gather(layer, chunk.block_table)
        output[part] = _prefill(q[part], k, v, chunk.context, scaling, sliding_window)
    return output.unsqueeze(0), None


def _decode(
    q: Tensor, k: Tensor, v: Tensor, group: DecodeGroup, scaling: float, window: int | None
) -> Tensor:
    """q [D, Hq, d] against each sequence's own context, k and v [D * S, Hkv, d]. The query heads
    that share a KV head ride as its query positions, so keys and values are not repeated."""
    size, heads, dim = q.shape[0], k.shape[1], q.shape[2]
    k, v = (x.view(size, -1, heads, dim).transpose(1, 2) for x in (k, v))  # [D, Hkv, S, d]
    at, last = torch.arange(k.shape[2], device=q.device), group.positions[:, None]
    seen = at <= last
    if window is not None:
        seen &= at > last - window
    grouped = q.view(size, heads, -1, dim)  # [D, Hkv, Hq / Hkv, d]
    out = scaled_dot_product_attention(
        grouped, k, v, attn_mask=seen[:, None, None, :], scale=scaling
    )
    return out.flatten(1, 2)


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
