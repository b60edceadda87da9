"""Modules that take the place of transformers' own, for a rank's share or for speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from engine.packing import any_linear, packed_gate

AllReduce = Callable[[Tensor], None]  # sums a tensor over the stage's tp ranks, in place


class ShardedLinear(nn.Module):
    """A linear layer as one rank holds it. Where its input columns are split over the tp ranks
    (`all_reduce` is given), the partial products are summed over them, and only then the bias is
    added. `weight` may be packed, see `engine.packing`."""

    def __init__(
        self, columns: int, rows: int, bias: bool, all_reduce: AllReduce | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self._all_reduce = all_reduce

    def forward(self, x: Tensor) -> Tensor:
        if self._all_reduce is None:
            return any_linear(x, self.weight, self.bias)
        out = any_linear(x, self.weight, None)
        self._all_reduce(out)
        return out if self.bias is None else out.add_(self.bias)


class GatedMlp(nn.Module):
    """down(silu(gate x) * (up x)), with the product made inside the two packed matrix products."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj: ShardedLinear = mlp.gate_proj
        self.up_proj: ShardedLinear = mlp.up_proj
        self.down_proj: ShardedLinear = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if gate.weight.is_mkldnn:
            gated = packed_gate(x, gate.weight, gate.bias, up.weight, up.bias)
        else:
            gated = silu(gate(x)) * up(x)
        out: Tensor = self.down_proj(gated)
        return out
