"""Linear layers on the CPU in oneDNN's own layout: up to three times as fast for small batches.

oneDNN reads weights in blocks that fit its registers. Without packing it re-arranges the whole
matrix at every call, and torch gives float32 to another library, which is slower still. A packed
weight takes the place of the plain one, so that nothing is held twice; `dense` gives the very same
numbers back when a slice of it is to move. Number formats that the processor has no instructions
for stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_onednn: Any = torch.ops.mkldnn  # the operations that torch's own compiler uses


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this torch have the packed operation for that number format."""
    weight = torch.ones(2, 3, dtype=dtype)
    try:
        out = packed_linear(weight, pack(weight), None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(out, torch.full((2, 2), 3.0, dtype=dtype))


def pack(weight: Tensor) -> Tensor:
    """The packed form of a weight [out, in]; itself when it is packed."""
    packed: Tensor = weight if weight.is_mkldnn else _onednn._reorder_linear_weight(weight)
    return packed


def dense(weight: Tensor) -> Tensor:
    """A weight in the plain layout: a copy when it is packed, else itself."""
    return weight.to_dense() if weight.is_mkldnn else weight


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a packed weight [out, in], plus bias [out]."""
    out: Tensor = _onednn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def packed_gate(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None
) -> Tensor:
    """silu(gate x + bias) * (up x + bias) for packed weights."""
    gated = _onednn._linear_pointwise(x, gate, gate_bias, "swish", [], "")
    out: Tensor = _onednn._linear_pointwise.binary(x, gated, up, up_bias, "mul")
    return out


def any_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a weight [out, in], packed or not, plus bias [out]."""
    return (packed_linear if weight.is_mkldnn else linear)(x, weight, bias)
