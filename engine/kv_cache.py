"""Keys and values of a rank: its stage's layers, its share of the KV heads, in paged blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.decode_kernel import as_array
from engine.memory import lazy_zeros


class KvCache:
    """One tensor [2, layers, blocks, block_size, heads, head_dim]; layers are numbered locally.

    Slot s is position s % block_size of block s // block_size. It starts as zeros, so that what
    masks hide is finite.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (2, num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        on_cpu = torch.device(device).type == "cpu"
        self.data = (
            lazy_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
        )
        # the same memory for compiled kernels, which run on the CPU only
        self.arrays: Any = as_array(self.data) if on_cpu else None
        self._gathered = torch.empty(0, dtype=dtype, device=device)  # grows; one per cache

    @property
    def num_layers(self) -> int:
        return self.data.shape[1]

    @property
    def num_blocks(self) -> int:
        return self.data.shape[2]

    @property
    def block_size(self) -> int:
        return self.data.shape[3]

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[4]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def keys(self, layer: int) -> Tensor:
        """View [num_blocks * block_size, heads, head_dim]."""
        return self.data[0, layer].flatten(0, 1)

    def values(self, layer: int) -> Tensor:
        """View [num_blocks * block_size, heads, head_dim]."""
        return self.data[1, layer].flatten(0, 1)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, heads, head_dim] of one layer in slots [T]."""
        self.keys(layer).index_copy_(0, slots, keys)
        self.values(layer).index_copy_(0, slots, values)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n * block_size, heads, head_dim] of blocks [n], in their order.

        Both lie in one buffer that is reused: they hold until the next gather. A fresh allocation
        of megabytes per layer would cost more in page faults than the copy itself.
        """
        shape = (2, len(blocks), *self.data.shape[3:])
        size = math.prod(shape)
        if self._gathered.numel() < size:
            self._gathered = self.data.new_empty(size)
        both = self._gathered[:size].view(shape)
        for which in (0, 1):
            torch.index_select(self.data[which, layer], 0, blocks, out=both[which])
        return both[0].flatten(0, 1), both[1].flatten(0, 1)

    def read_blocks(
        self, blocks: Sequence[int], layers: tuple[int, int], heads: tuple[int, int]
    ) -> Tensor:
        """Copy [2, L, n, block_size, H, head_dim] of blocks, in their order, of layers
        [start, stop) and heads [start, stop), both numbered locally. Contiguous."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.data.device)
        part = self.data[:, slice(*layers), :, :, slice(*heads)]
        return part.index_select(2, index).contiguous()

    def write_blocks(
        self,
        blocks: Sequence[int],
        layers: tuple[int, int],
        heads: tuple[int, int],
        data: Tensor,
    ) -> None:
        """Inverse of `read_blocks`; `data` has the shape that `read_blocks` would return."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.data.device)
        part = self.data[:, slice(*layers), :, :, slice(*heads)]
        expected = (*part.shape[:2], len(blocks), *part.shape[3:])
        assert tuple(data.shape) == expected, (tuple(data.shape), expected)
        part[:, :, index] = data.to(self.data.device, self.data.dtype)
