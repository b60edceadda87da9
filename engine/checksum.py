"""A checksum as fast as memory: what a tensor was when it left, to compare with what arrived."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

u64 = np.uint64


# i -> 2i + 1 is odd, hence invertible modulo 2^64: a change of any one word changes the sum, and
# words that change places change it too
@njit("u8(u8[::1])", nogil=True, cache=True)
def _weighted_sum(words):  # type: ignore[no-untyped-def]
    total = u64(0)
    for i in range(words.size):
        total += words[i] * (u64(2) * u64(i) + u64(1))
    return total


def checksum(tensor: Tensor) -> int:
    """64 bits of a contiguous tensor in host memory: the sum modulo 2^64 of its bytes as words of
    eight (the last one filled up with zeros), each times an odd number that tells its place. For
    errors, not for adversaries: bytes that differ in one word never have the same."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    whole = data.size // 8 * 8
    total = int(_weighted_sum(data[:whole].view(np.uint64)))
    if whole < data.size:
        last = int.from_bytes(data[whole:].tobytes(), "little")
        total += last * (2 * (whole // 8) + 1)
    return total % 2**64
