"""What the forkserver loads once for all workers: imported here, then shared by them unchanged."""

from __future__ import annotations

import gc

import engine.worker  # noqa: F401  torch, the model classes and everything a rank runs

# A collection in a worker would otherwise write to the header of every object made so far, and so
# give each worker pages of its own.
gc.collect()
gc.freeze()
