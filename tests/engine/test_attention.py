"""Paged attention against attention computed straight from the definition."""

import pytest
import torch
from torch import Tensor, nn

from engine.attention import build_forward_context, paged_attention
from engine.kv_cache import KvCache
from engine.request import StepInput

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4


class Layer(nn.Module):
    layer_idx = 6


def make_step(tables: list[list[int]], starts: list[int], lengths: list[int]) -> StepInput:
    return StepInput(0, [0] * sum(lengths), starts, lengths, tables, [None] * len(tables))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """q [t, H, d] at positions start.., k and v [start + t, Hkv, d]; loops, float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, start + i - window + 1)
        seen = slice(first, start + i + 1)
        for head in range(HEADS):
            keys, values = (x[seen, head // (HEADS // KV_HEADS)].double() for x in (k, v))
            weights = torch.softmax(keys @ q[i, head].double() * 0.3, dim=0)
            out[i, head] = weights @ values
    return out.float()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("plain", [True, False])
def test_chunks_and_decodes_in_one_batch(window: int | None, plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    totals, tables = [14, 9, 1, 11], [[7, 2, 5, 0], [1, 3, 8], [4], [6, 10, 9]]
    cuts = [[5, 13, 14], [9], [1], [10, 11]]  # where each sequence's steps end
    q, k, v = (
        [torch.randn(n, h, DIM, generator=generator) for n in totals]
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    cache = KvCache(2, 11, BLOCK, KV_HEADS, DIM, torch.float32, "cpu")
    outputs: list[list[Tensor]] = [[] for _ in totals]
    for round_number in range(3):
        live = [b for b, ends in enumerate(cuts) if round_number < len(ends)]
        starts = [0 if round_number == 0 else cuts[b][round_number - 1] for b in live]
        stops = [cuts[b][round_number] for b in live]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        step = make_step([tables[b] for b in live], starts, lengths)
        context = build_forward_context(step, cache, first_layer=5, plain=plain)
        flat = [
            torch.cat([x[b][s:e] for b, s, e in zip(live, starts, stops, strict=True)])
            .transpose(0, 1)
            .unsqueeze(0)
            for x in (q, k, v)
        ]
        out, _ = paged_attention(
            Layer(), *flat, None, 0.3, sliding_window=window, forward_context=context
        )
        assert out.shape == (1, sum(lengths), HEADS, DIM)
        for b, part in zip(live, out[0].split(lengths), strict=True):
            outputs[b].append(part)
    for b in range(len(totals)):
        expected = plain_attention(q[b], k[b], v[b], 0, window)
        torch.testing.assert_close(torch.cat(outputs[b]), expected, atol=1e-5, rtol=1e-5)
    assert not cache.data[:, 0].any()  # layer 6 of a stage that starts at 5 is local layer 1


def test_the_context_of_a_step_by_hand() -> None:
    cache = KvCache(1, 8, BLOCK, KV_HEADS, DIM, torch.float32, "cpu")
    step = make_step([[3, 1], [5], [2, 6, 7]], starts=[5, 0, 3], lengths=[1, 3, 2])
    context = build_forward_context(step, cache, 0)
    assert context.positions.tolist() == [5, 0, 1, 2, 3, 4]
    assert context.slot_mapping.tolist() == [1 * 4 + 1, 20, 21, 22, 2 * 4 + 3, 6 * 4 + 0]
    assert context.decode is not None
    assert context.decode.rows.tolist() == [0]
    assert context.decode.contexts.tolist() == [6]
    assert context.decode.tables[context.decode.offsets[0] :][:2].tolist() == [3, 1]
    assert [(c.start, c.stop, c.context) for c in context.prefill] == [(1, 4, 0), (4, 6, 3)]
    assert context.prefill[1].block_table.tolist() == [2, 6]  # block 7 is not reached yet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_gives_what_the_plain_path_gives(
    dtype: torch.dtype, parallel: bool, window: int | None
) -> None:
    """Random contexts, tables and rows; the bound is half a unit in the last place of the output
    format for outputs below 4, and float32 rounding on top."""
    generator = torch.Generator().manual_seed(1)
    cache = KvCache(1, 64, BLOCK, KV_HEADS, DIM, dtype, "cpu")
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    free, tables, starts = torch.randperm(64, generator=generator).tolist(), [], [0, 3, 4, 30, 57]
    for start in starts:
        count = start // BLOCK + 1
        tables.append([free.pop() for _ in range(count)])
    step = make_step(tables, starts, [1] * len(starts))
    q, k, v = (
        torch.randn(1, h, len(starts), DIM, generator=generator).to(dtype)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    outputs = []
    for plain in (True, False):
        context = build_forward_context(step, cache, 6, plain, parallel)
        out, _ = paged_attention(
            Layer(), q, k, v, None, 0.3, sliding_window=window, forward_context=context
        )
        outputs.append(out.float())
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert (outputs[0] - outputs[1]).abs().max() <= 2 * bound
