"""ParallelState: the process groups of one rank of one replica, as an explicit object.

Raw groups on a store of their own, one name per generation, so that two generations live side by
side and no default process group exists (dist.new_group with a rebuilt name hangs).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from engine import shared_sum
from engine.cluster import ParallelConfig

PIPELINE_TAG = 0
MEETING_POLL_S = 0.005
LOOPBACK = "127.0.0.1"
dist: Any = distributed  # the raw process groups have no type stubs


# ------------------------------------------------------------------------------------
# Stores: where the ranks of a group find one another


def host_store(run_dir: str, name: str, host: str, timeout_s: float) -> tuple[Any, str]:
    """The store of a group and its address: a file on one machine, or a TCP server on `host`,
    which lives as long as the store."""
    if not host:
        return None, f"file://{run_dir}/store-{name}"
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, f"tcp://{host}:{port}"


def open_store(address: str, size: int, timeout_s: float) -> Any:
    """A client of the store that `host_store` gave this address; `size` ranks open it, once each,
    and a file goes with the last."""
    kind, _, place = address.partition("://")
    timeout = timedelta(seconds=timeout_s)
    if kind == "file":
        store = dist.FileStore(place, size)
        store.set_timeout(timeout)
        return store
    host, _, port = place.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=timeout)


def meet(
    store: Any, rank: int, size: int, timeout_s: float, is_abandoned: Callable[[], bool]
) -> None:
    """Return when all ranks have come. gloo's own wait for them can't be given up.

    Raises RuntimeError after `timeout_s`, or as soon as `is_abandoned`.
    """
    store.set(f"here-{rank}", "")
    names = [f"here-{other}" for other in range(size)]
    deadline_s = time.monotonic() + timeout_s
    while not store.check(names):
        if is_abandoned():
            raise RuntimeError("the group is given up: one of its ranks is lost")
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not all {size} ranks of the group came within {timeout_s:.0f} s")
        time.sleep(MEETING_POLL_S)


# ------------------------------------------------------------------------------------
# Groups


@dataclass(frozen=True, slots=True)
class Sending:
    """A send under way; keeps its tensor alive."""

    work: Any
    tensor: Tensor

    def wait(self) -> None:
        self.work.wait()


class SumGroup(Protocol):
    """What the tp ranks of a stage need, on tensors of this rank's device."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        ...


class Group(SumGroup, Protocol):
    """Collectives of one group on tensors of this rank's device."""

    def send(self, tensor: Tensor, peer: int, tag: int) -> Sending: ...

    def recv(self, tensor: Tensor, peer: int, tag: int) -> None:
        """Fill `tensor`; blocks."""
        ...


@dataclass(frozen=True, slots=True)
class DirectGroup:
    """The backend takes the tensors as they are: gloo on the CPU, NCCL on a GPU per rank."""

    raw: Any

    def all_reduce(self, tensor: Tensor) -> None:
        self.raw.allreduce([tensor]).wait()

    def send(self, tensor: Tensor, peer: int, tag: int) -> Sending:
        return Sending(self.raw.send([tensor], peer, tag), tensor)

    def recv(self, tensor: Tensor, peer: int, tag: int) -> None:
        self.raw.recv([tensor], peer, tag).wait()


@dataclass(frozen=True, slots=True)
class StagedGroup:
    """gloo between GPU ranks: every tensor passes through host memory, which gloo needs for
    sends, and NCCL refuses two ranks on one device."""

    raw: Any

    def all_reduce(self, tensor: Tensor) -> None:
        staged = _host_copy(tensor)
        self.raw.allreduce([staged]).wait()
        tensor.copy_(staged)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Sending:
        staged = _host_copy(tensor)
        return Sending(self.raw.send([staged], peer, tag), staged)

    def recv(self, tensor: Tensor, peer: int, tag: int) -> None:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self.raw.recv([staged], peer, tag).wait()
        tensor.copy_(staged)


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """How this process joins groups: its own address, its device, and for how long it waits.
    `stage` copies tensors through host memory also where that is not needed."""

    host: str
    device: torch.device
    timeout_s: float
    stage: bool = False


def build_gloo(config: GroupConfig, store: Any, name: str, rank: int, size: int) -> Any:
    """A raw gloo group; blocks until all `size` ranks have come, at most `timeout_s`."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=config.host or LOOPBACK)]
    options._timeout = timedelta(seconds=config.timeout_s)
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, options)


def build_group(config: GroupConfig, store: Any, name: str, rank: int, size: int) -> Group:
    """The fastest group for this device. NCCL when every rank has a GPU of its own; ranks on the
    CPU, or that share a GPU, use gloo. All ranks decide alike, from what they put in the store."""
    if config.device.type == "cpu":
        raw = build_gloo(config, store, name, rank, size)
        return StagedGroup(raw) if config.stage else DirectGroup(raw)
    gpus = _share(store, f"{name}-gpu", rank, size, _gpu_id(config.device))
    if config.stage or len(set(gpus)) < size or not dist.is_nccl_available():
        return StagedGroup(build_gloo(config, store, name, rank, size))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=config.timeout_s)
    return DirectGroup(dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options))


def build_sum_group(config: GroupConfig, store: Any, name: str, rank: int, size: int) -> SumGroup:
    """As `build_group`, for sums alone: ranks on the CPU of one machine sum in shared memory."""
    if config.host or config.stage or config.device.type != "cpu" or not shared_sum.is_supported():
        return build_group(config, store, name, rank, size)

    def share(label: str, value: str) -> list[str]:
        return _share(store, f"{name}-{label}", rank, size, value)

    return shared_sum.open_shared_sum(share, rank, size, config.timeout_s)


def _gpu_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _share(store: Any, name: str, rank: int, size: int, value: str) -> list[str]:
    """The value of every rank, in rank order; blocks until all have given theirs."""
    store.set(f"{name}-{rank}", value)
    return [store.get(f"{name}-{other}").decode() for other in range(size)]


# ------------------------------------------------------------------------------------
# What a rank holds


@dataclass(slots=True)
class ParallelState:
    """Groups of one rank: `tp_group` sums inside its stage, `replica_group` links the stages.
    `store` stays open as long as they do: one rank of the replica may be its server."""

    parallel: ParallelConfig
    rank: int
    tp_group: SumGroup | None
    replica_group: Group | None
    device: torch.device
    store: Any = None

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the tp ranks of this stage, in place."""
        assert self.tp_group is not None
        self.tp_group.all_reduce(tensor)

    def send_next(self, hidden: Tensor) -> Sending:
        """Start sending to the same tp rank of the next stage."""
        assert self.replica_group is not None
        return self.replica_group.send(hidden, self.rank + self.parallel.tp, PIPELINE_TAG)

    def recv_previous(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Hidden states [num_tokens, hidden_size] from the same tp rank of the stage before."""
        assert self.replica_group is not None
        hidden = torch.empty(num_tokens, hidden_size, dtype=dtype, device=self.device)
        self.replica_group.recv(hidden, self.rank - self.parallel.tp, PIPELINE_TAG)
        return hidden


def build_parallel_state(
    config: GroupConfig, store: Any, parallel: ParallelConfig, rank: int
) -> ParallelState:
    """Join this rank's groups. All ranks of the replica must call it at about the same time.
    `store` is the replica's own, None for a rank alone."""
    stage, tp_rank = parallel.stage_of(rank), parallel.tp_rank_of(rank)
    tp_group = replica_group = None
    if parallel.tp > 1:
        tp_group = build_sum_group(config, store, f"tp{stage}", tp_rank, parallel.tp)
    if parallel.pp > 1:
        replica_group = build_group(config, store, "pp", rank, parallel.num_devices)
    return ParallelState(parallel, rank, tp_group, replica_group, config.device, store)
