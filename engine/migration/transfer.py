"""Moves tensor slices and KV blocks between workers. The plan says what; this only carries it out.

Both ends work through their part of one global order, a few transfers at a time. The first
unfinished transfer of that order is under way at both its ends, so no cycle of waits can arise.
That few bounds the staging memory, and a sender goes no faster than its receiver takes. Buffers are
in host memory, also between GPUs: the transfer group is gloo on every device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.checksum import checksum
from engine.cluster import ModelSpec, Transfer
from engine.memory import new_storage
from engine.messages import KvMove
from engine.packing import dense
from engine.shards import Shard

WINDOW = 8  # transfers in flight per worker


class PeerLostError(Exception):
    """The other end of a transfer has failed or gone; the cause is there."""


@dataclass(slots=True)
class Moved:
    """What a worker's part of a move came to: the checksum of every transfer by its index, from
    either end, and the bytes that left here."""

    checksums: list[tuple[int, int]] = field(default_factory=list)
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One end of a transfer. The buffer is made when its turn comes; if a sender `forwards` what
    it received, then after all that came before. A receiver may be told when it is full."""

    index: int
    peer: int  # rank in the group
    buffer: Callable[[], Tensor]
    sends: bool
    on_received: Callable[[Tensor], None] | None = None
    forwards: bool = False


class Pace:
    """Keeps one sender below `bytes_per_s`, from its first byte on; 0 is no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._sent_bytes, self._start_s = bytes_per_s, 0, 0.0

    def wait(self, nbytes: int) -> None:
        """Return when `nbytes` more may leave."""
        if self._bytes_per_s <= 0:
            return
        now_s = time.monotonic()
        self._start_s = self._start_s or now_s
        due_s = self._start_s + self._sent_bytes / self._bytes_per_s
        if due_s > now_s:
            time.sleep(due_s - now_s)
        self._sent_bytes += nbytes


def shard_view(tensor: Tensor, held: Shard, start: int, stop: int) -> Tensor:
    """The part [start, stop) (in whole-tensor coordinates) of a rank's shard; of a packed one, of
    a copy."""
    tensor = dense(tensor)
    if held.dim is None:
        return tensor
    return tensor.narrow(held.dim, start - held.start, stop - start)


def fill_local(
    model: ModelSpec,
    needs: Sequence[Shard],
    held: dict[str, tuple[Shard, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Storage for a new rank's shards: shared where this device holds the very interval, else
    new, with whatever overlaps copied in."""
    shapes = {t.name: t.shape for t in model.tensors}
    weights: dict[str, Tensor] = {}
    for need in needs:
        have = held.get(need.tensor)
        if have is not None and (have[0].start, have[0].stop) == (need.start, need.stop):
            weights[need.tensor] = have[1]
            continue
        shape = _shard_shape(shapes[need.tensor], need)
        weights[need.tensor] = new_storage(shape, dtype, device)
        if have is not None:
            start, stop = max(need.start, have[0].start), min(need.stop, have[0].stop)
            if start < stop:
                target = shard_view(weights[need.tensor], need, start, stop)
                target.copy_(shard_view(have[1], have[0], start, stop))
    return weights


def to_host(tensor: Tensor) -> Tensor:
    """Contiguous and in host memory; the tensor itself where it is both."""
    return tensor.contiguous().to("cpu")


def _fill(view: Tensor, received: Tensor) -> None:
    view.copy_(received)


def _shard_shape(whole: tuple[int, ...], shard: Shard) -> tuple[int, ...]:
    if shard.dim is None:
        return whole
    return (*whole[: shard.dim], shard.stop - shard.start, *whole[shard.dim + 1 :])


def exchange(group: Any, jobs: Iterable[Job], pace: Pace) -> Moved:
    """Run jobs in the order given, at most WINDOW of them at once."""
    moved = Moved()
    window: deque[tuple[Job, Any, Tensor]] = deque()

    def finish_down_to(count: int) -> None:
        while len(window) > count:
            job, work, buffer = window.popleft()
            try:
                work.wait()
            except RuntimeError as error:  # all that gloo raises
                raise PeerLostError(f"the other end of transfer {job.index} left") from error
            moved.checksums.append((job.index, checksum(buffer)))
            if job.on_received is not None:
                job.on_received(buffer)

    for job in jobs:
        finish_down_to(0 if job.forwards else WINDOW - 1)
        buffer = job.buffer()
        if job.sends:
            pace.wait(buffer.nbytes)
            moved.sent_bytes += buffer.nbytes
        start = group.send if job.sends else group.recv
        window.append((job, start([buffer], job.peer, job.index), buffer))
    finish_down_to(0)
    return moved


def weight_jobs(
    members: Sequence[int],
    device: int,
    first_index: int,
    transfers: Sequence[Transfer],
    source: Callable[[Transfer], Tensor],
    target: Callable[[int], Tensor],
    forwards: Callable[[Transfer], bool],
) -> Iterator[Job]:
    """This device's ends of `transfers`. `source` gives the slice to send, `target` the view that
    the i-th transfer of the list must fill."""
    for i, transfer in enumerate(transfers):
        if transfer.src == device:
            peer, buffer = members.index(transfer.dst), partial(_send_slice, source, transfer)
            yield Job(first_index + i, peer, buffer, sends=True, forwards=forwards(transfer))
        elif transfer.dst == device and transfer.src in members:
            yield _receive(first_index + i, members.index(transfer.src), target(i))


def _receive(index: int, peer: int, view: Tensor) -> Job:
    """Right into its place where gloo can write there."""
    if view.device.type == "cpu" and view.is_contiguous():
        return Job(index, peer, lambda: view, sends=False)
    buffer = partial(torch.empty, view.shape, dtype=view.dtype, device="cpu")
    return Job(index, peer, buffer, sends=False, on_received=partial(_fill, view))


def _send_slice(source: Callable[[Transfer], Tensor], transfer: Transfer) -> Tensor:
    return to_host(source(transfer))


def kv_jobs(
    members: Sequence[int],
    device: int,
    moves: Sequence[KvMove],
    read: Callable[[KvMove], Tensor],
    shape: Callable[[KvMove], tuple[tuple[int, ...], torch.dtype]],
    write: Callable[[KvMove, Tensor], None],
) -> Iterator[Job]:
    """This device's ends of KV copies; a copy within the device is made at once."""
    for i, move in enumerate(moves):
        if move.src == move.dst == device:
            write(move, read(move))
        elif move.src == device:
            yield Job(i, members.index(move.dst), partial(_read_to_host, read, move), sends=True)
        elif move.dst == device:
            size, dtype = shape(move)
            buffer = partial(torch.empty, size, dtype=dtype, device="cpu")
            fill = partial(write, move)
            yield Job(i, members.index(move.src), buffer, sends=False, on_received=fill)


def _read_to_host(read: Callable[[KvMove], Tensor], move: KvMove) -> Tensor:
    return to_host(read(move))
