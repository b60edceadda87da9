"""Moves tensor slices and KV blocks between workers. The plan says what; this only carries it out.

Both ends work through their part of one global order in windows. The first unfinished transfer of
that order is in the present window of both its ends, so no cycle of waits can arise. Buffers are
in host memory, also between GPUs: the transfer group is gloo on every device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.cluster import ModelSpec, Transfer
from engine.messages import KvMove
from engine.packing import dense
from engine.shards import Shard

WINDOW = 8  # transfers in flight per worker: bounds the staging memory
Checksums = list[tuple[int, int]]


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous tensor in host memory."""
    return zlib.crc32(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")


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
        weights[need.tensor] = torch.empty(shape, dtype=dtype, device=device)
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


def _exchange(
    group: Any, jobs: Iterator[tuple[int, int, bool, Tensor, Callable[[Tensor], None] | None]]
) -> Checksums:
    """Run (index, peer rank, is_send, buffer, on_received) jobs in windows; CRC of every buffer."""
    sums: Checksums = []
    window: list[tuple[int, Any, Tensor, Callable[[Tensor], None] | None]] = []

    def finish() -> None:
        for index, work, buffer, on_received in window:
            work.wait()
            sums.append((index, checksum(buffer)))
            if on_received is not None:
                on_received(buffer)
        window.clear()

    for index, peer, is_send, buffer, on_received in jobs:
        start = group.send if is_send else group.recv
        window.append((index, start([buffer], peer, index), buffer, on_received))
        if len(window) == WINDOW:
            finish()
    finish()
    return sums


def move_weights(
    group: Any,
    members: Sequence[int],
    device: int,
    transfers: Sequence[Transfer],
    source: Callable[[Transfer], Tensor],
    target: Callable[[int, Transfer], Tensor],
) -> Checksums:
    """Carry out this device's transfers. `source` gives the slice to send, `target(i, transfer)`
    the view that the i-th transfer of the list must fill."""

    def jobs() -> Iterator[tuple[int, int, bool, Tensor, Callable[[Tensor], None] | None]]:
        for i, transfer in enumerate(transfers):
            if transfer.src == device:
                yield i, members.index(transfer.dst), True, to_host(source(transfer)), None
            elif transfer.dst == device:
                view = target(i, transfer)
                buffer = torch.empty(view.shape, dtype=view.dtype, device="cpu")
                yield i, members.index(transfer.src), False, buffer, partial(_fill, view)

    return _exchange(group, jobs())


def move_kv(
    group: Any,
    members: Sequence[int],
    device: int,
    moves: Sequence[KvMove],
    read: Callable[[KvMove], Tensor],
    shape: Callable[[KvMove], tuple[tuple[int, ...], torch.dtype]],
    write: Callable[[KvMove, Tensor], None],
) -> Checksums:
    """Carry out this device's KV copies; a copy within the device needs no link."""
    sums: Checksums = []

    def jobs() -> Iterator[tuple[int, int, bool, Tensor, Callable[[Tensor], None] | None]]:
        for i, move in enumerate(moves):
            if move.src == move.dst == device:
                write(move, read(move))
            elif move.src == device:
                yield i, members.index(move.dst), True, to_host(read(move)), None
            elif move.dst == device:
                size, dtype = shape(move)
                buffer = torch.empty(size, dtype=dtype, device="cpu")
                peer = members.index(move.src)
                yield i, peer, False, buffer, partial(write, move)

    return sums + _exchange(group, jobs())
