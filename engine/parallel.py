"""ParallelState: the process groups of one rank of one replica, as an explicit object.

Raw gloo groups on a file store, one name per generation, so that two generations live side by
side and no default process group exists (dist.new_group with a rebuilt name hangs).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from engine.cluster import ParallelConfig

PIPELINE_TAG = 0
dist: Any = distributed  # the raw process groups have no type stubs


def build_group(run_dir: Path, name: str, rank: int, size: int, timeout_s: float) -> Any:
    """A gloo group on loopback; blocks until all `size` ranks have come, at most `timeout_s`."""
    store = dist.FileStore(str(run_dir / f"store-{name}"), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, options)


@dataclass(slots=True)
class ParallelState:
    """Groups of one rank: `tp_group` sums inside its stage, `replica_group` links the stages."""

    parallel: ParallelConfig
    rank: int
    tp_group: Any | None
    replica_group: Any | None

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the tp ranks of this stage, in place."""
        assert self.tp_group is not None
        self.tp_group.allreduce([tensor]).wait()

    def send_next(self, hidden: Tensor) -> Any:
        """Start sending to the same tp rank of the next stage; keep the tensor until waited for."""
        assert self.replica_group is not None
        return self.replica_group.send([hidden], self.rank + self.parallel.tp, PIPELINE_TAG)

    def recv_previous(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Hidden states [num_tokens, hidden_size] from the same tp rank of the stage before."""
        assert self.replica_group is not None
        hidden = torch.empty(num_tokens, hidden_size, dtype=dtype)
        self.replica_group.recv([hidden], self.rank - self.parallel.tp, PIPELINE_TAG).wait()
        return hidden


def build_parallel_state(
    run_dir: Path, name: str, parallel: ParallelConfig, rank: int, timeout_s: float
) -> ParallelState:
    """Join this rank's groups. All ranks of the replica must call it at about the same time."""
    stage, tp_rank = parallel.stage_of(rank), parallel.tp_rank_of(rank)
    tp_group = replica_group = None
    if parallel.tp > 1:
        tp_group = build_group(run_dir, f"{name}-tp{stage}", tp_rank, parallel.tp, timeout_s)
    if parallel.pp > 1:
        replica_group = build_group(run_dir, f"{name}-pp", rank, parallel.num_devices, timeout_s)
    return ParallelState(parallel, rank, tp_group, replica_group)
