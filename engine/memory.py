"""What a worker does with memory: keeps what a step frees for the next one, gives back what a load
or a switch frees, takes pages of a KV cache only as they are written, and of weights beforehand."""

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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
MADV_POPULATE_WRITE = 23  # linux/mman.h
SPARE_BYTES = 128


def release_memory() -> None:
    """Collect reference cycles and return free pages; takes milliseconds once `gc.freeze` has set
    the imported modules apart. Without glibc, pages stay with the process."""
    gc.collect()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Tell glibc to hold on to what a step has freed: the next one needs as much, and pages that
    went back to the system cost a fault and a page of zeros each. Threads that start later share
    one arena, since further ones give theirs back all the same. No effect without glibc."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that take a page when it is first written and give all of them back
    when the tensor goes. `torch.zeros` would clear every page at once."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def new_storage(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for numbers that come from elsewhere. In host memory its pages are there already, so
    that what arrives waits for none; and it is a little larger than it looks, since glibc takes an
    aligned block only from a larger free one: other weights can take its place when it goes."""
    size = math.prod(shape)
    tensor = torch.empty(size + SPARE_BYTES // dtype.itemsize, dtype=dtype, device=device)
    if device.type == "cpu":
        _take_pages(tensor)
    return tensor[:size].view(shape)


def _take_pages(tensor: Tensor) -> None:
    """No effect without Linux 5.14."""
    madvise = _libc("madvise")
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is not None and start < stop:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_POPULATE_WRITE)


@cache
def _libc(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
