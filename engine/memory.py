"""Gives memory that Python and the allocator have finished with back to the machine."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any


def release_memory() -> None:
    """Collect reference cycles and return free pages; takes milliseconds once `gc.freeze` has set
    the imported modules apart. Without glibc, pages stay with the process."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
