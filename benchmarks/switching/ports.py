"""What a port between two processes gives, measured while the load runs.

Four processes send to their neighbours over gloo as the engine's workers do (same groups, same
windows), without packing, checksums or copies: what is left is the transport under contention.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

CHUNK_BYTES = 8 << 20
WINDOW = 8  # messages in flight per process
ROUNDS = 3
JOIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class _Ring:
    """The first `num_flows` processes send `nbytes` each to the next one."""

    num_flows: int
    nbytes: int


def _run(rank: int, size: int, folder: str, pipe: Connection) -> None:
    """One process: waits for rings, answers each with (start, end) on the system's clock."""
    import time
    from datetime import timedelta

    import torch
    from torch import distributed

    from engine.parallel import GroupConfig, build_gloo

    torch.set_num_threads(1)
    dist: Any = distributed
    store = dist.FileStore(f"{folder}/store", size)
    store.set_timeout(timedelta(seconds=JOIN_TIMEOUT_S))
    group = build_gloo(GroupConfig("", torch.device("cpu"), JOIN_TIMEOUT_S), store, "c", rank, size)
    buffers = torch.ones(2, WINDOW, CHUNK_BYTES, dtype=torch.uint8)
    pipe.send((0.0, 0.0))
    while (ring := pipe.recv()) is not None:
        start_s, works = time.monotonic(), []
        for i in range(ring.nbytes // CHUNK_BYTES):
            if rank < ring.num_flows:
                works.append(group.send([buffers[0, i % WINDOW]], (rank + 1) % size, i))
            if (rank - 1) % size < ring.num_flows:
                works.append(group.recv([buffers[1, i % WINDOW]], (rank - 1) % size, i))
            if i % WINDOW == WINDOW - 1:
                while works:
                    works.pop().wait()
        while works:
            works.pop().wait()
        pipe.send((start_s, time.monotonic()))


class Ports:
    """Owns the processes; `close` ends them."""

    def __init__(self, size: int = 4) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.preload"])  # the executor's, which may share it
        self._folder = tempfile.TemporaryDirectory(prefix="tw-ports-")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run, args=(rank, size, self._folder.name, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(range(size))

    def _collect(self, ranks: Any) -> list[tuple[float, float]]:
        answers = []
        for rank in ranks:
            if not self._pipes[rank].poll(JOIN_TIMEOUT_S):
                raise RuntimeError(f"port process {rank} did not answer in {JOIN_TIMEOUT_S} s")
            answers.append(self._pipes[rank].recv())
        return answers

    def bytes_per_s(self, num_flows: int, nbytes: int) -> float:
        """Of each of `num_flows` ports that are busy at once; the slowest counts; median."""
        return median(self._ring(num_flows, nbytes) for _ in range(ROUNDS))

    def _ring(self, num_flows: int, nbytes: int) -> float:
        chunks = max(1, nbytes // CHUNK_BYTES)
        for pipe in self._pipes:
            pipe.send(_Ring(num_flows, chunks * CHUNK_BYTES))
        spans = self._collect(range(len(self._pipes)))
        return chunks * CHUNK_BYTES / (max(e for _, e in spans) - min(s for s, _ in spans))

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
        assert not Path(self._folder.name).exists()
