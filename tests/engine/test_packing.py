"""Packed linear layers against the plain ones."""

import pytest
import torch
from torch.nn.functional import linear

from engine.packing import any_linear, can_pack, dense, pack

SHAPES = [(1, 1), (7, 3), (96, 256), (131, 67), (320, 256), (1408, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_gives_what_plain_gives(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Sums in another order: the bound is the dtype's rounding of a sum of `columns` products."""
    if not can_pack(dtype):
        pytest.skip(f"this processor packs no {dtype}")
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    packed = pack(weight)
    assert torch.equal(dense(packed), weight)  # the same numbers come back
    assert pack(packed) is packed
    for tokens in (1, 3, 64):
        x = torch.randn(1, tokens, columns, generator=generator).to(dtype)
        bound = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        for b in (None, bias):
            error = (any_linear(x, packed, b).float() - linear(x, weight, b).float()).abs().max()
            assert error <= bound


def test_plain_weights_stay_as_they_are() -> None:
    weight = torch.randn(4, 5)
    assert dense(weight) is weight
    x = torch.randn(2, 5)
    assert torch.equal(any_linear(x, weight, None), linear(x, weight))
