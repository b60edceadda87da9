"""What the forkserver loads once for all workers: imported here, then shared by them unchanged."""

from __future__ import annotations

import gc
import os

# Threads that wait for work spin for about 50 us instead of a millisecond: torch and numba take
# turns on the same cores. OpenMP reads it when torch brings it in.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import transformers

import engine.worker  # noqa: F401  torch, the model classes and everything a rank runs
from engine.architectures import ARCHITECTURES
from engine.decode_kernel import as_array, compile_for

for name in ARCHITECTURES:
    getattr(transformers, name)  # loads its module
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    compile_for(as_array(torch.zeros(1, 1, 1, 1, dtype=dtype)), parallel=False)

# A collection in a worker would otherwise write to the header of every object made so far, and so
# give each worker pages of its own.
gc.collect()
gc.freeze()
