"""What a worker does with memory: keeps what a step frees for the next one, gives back what a load
or a switch frees, and takes pages of a KV cache only as they are written."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def release_memory() -> None:
    """Collect reference cycles and return free pages; takes milliseconds once `gc.freeze` has set
    the imported modules apart. Without glibc, pages stay with the process."""
    gc.collect()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Tell glibc to hold on to what a step has freed: the next one needs as much, and pages that
    went back to the system cost a fault and a page of zeros each. No effect without glibc."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that take a page when it is first written and give all of them back
    when the tensor goes. `torch.zeros` would clear every page at once."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


@cache
def _libc(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
