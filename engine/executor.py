"""Where workers run: the `Executor` protocol and its default, local forkserver processes.

The forkserver has torch and the model classes loaded, so a worker starts in milliseconds, while
the engine process itself never imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from typing import Protocol

from engine.errors import UnavailableError
from engine.sockets import CurveKeys

STOP_TIMEOUT_S = 5.0
OnDeath = Callable[[int, int], None]  # (device, incarnation)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is told at birth. `run_dir` holds its engine's sockets and rendezvous files.
    `incarnation` counts the workers that this device has had before.

    With a `host` (the worker's own address) both go over `tcp://` instead. `stage_tensors` makes
    groups copy tensors through host memory also where they need not, for tests.
    """

    device: int
    run_dir: str
    model_dir: str
    dtype: str
    torch_device: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    group_timeout_s: float = 30.0
    switch_bytes_per_s: float = 0.0  # that this worker sends during a switch; 0 is no limit
    enable_prefix_caching: bool = True
    num_threads: int = 1
    engine_endpoint: str = ""  # set by the engine when its socket is bound
    host: str = ""
    keys: CurveKeys | None = None
    stage_tensors: bool = False
    incarnation: int = 0


class Executor(Protocol):
    """Starts one worker per device and tells when one is gone."""

    def start(self, configs: Sequence[WorkerConfig], on_death: OnDeath) -> None:
        """Start them all. `on_death(device, incarnation)` is called once, from another thread,
        for each that ends before `close`. Raises UnavailableError when they cannot be had."""
        ...

    def restart(self, config: WorkerConfig) -> None:
        """Start a worker in place of one that has ended or been killed; `on_death` is told of it
        too. Blocks until the predecessor is gone. Raises UnavailableError when no worker can be
        had, also after `close`."""
        ...

    def pid(self, device: int) -> int:
        """Process id, on the machine where the worker runs."""
        ...

    def kill(self, device: int) -> None:
        """End a worker that no longer answers; a no-op for one that has ended."""
        ...

    def close(self) -> None:
        """End every worker; none is left when this returns, nor is any death told after."""
        ...


def _enter(config: WorkerConfig) -> None:
    from engine.worker import run_worker

    run_worker(config)


class LocalExecutor:
    """One forkserver process per device on this machine. `target` is what each runs."""

    def __init__(self, target: Callable[[WorkerConfig], None] = _enter) -> None:
        self._target = target
        self._workers: dict[int, tuple[ForkServerProcess, threading.Thread]] = {}
        self._lock = threading.Lock()  # of starts and ends: a close waits for a restart
        self._closed = False
        self._stop_read, self._stop_write = -1, -1  # a pipe; closing its end stops the watchers

    def start(self, configs: Sequence[WorkerConfig], on_death: OnDeath) -> None:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["engine.preload"])
        self._on_death = on_death
        self._stop_read, self._stop_write = os.pipe()
        with self._lock:
            for config in configs:
                self._start_one(config)

    def _start_one(self, config: WorkerConfig) -> None:
        process = multiprocessing.get_context("forkserver").Process(
            target=self._target, args=(config,), name=f"worker-{config.device}", daemon=True
        )
        process.start()
        watcher = threading.Thread(
            target=self._watch, args=(process, config), name=f"watch-{config.device}", daemon=True
        )
        self._workers[config.device] = process, watcher
        watcher.start()

    def _watch(self, process: ForkServerProcess, config: WorkerConfig) -> None:
        if self._stop_read not in connection.wait([self._stop_read, process.sentinel]):
            self._on_death(config.device, config.incarnation)

    def restart(self, config: WorkerConfig) -> None:
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is closing; no worker is started any more.")
            if config.device in self._workers:
                _end(*self._workers.pop(config.device))
            self._start_one(config)

    def pid(self, device: int) -> int:
        pid = self._workers[device][0].pid
        assert pid is not None
        return pid

    def kill(self, device: int) -> None:
        worker = self._workers.get(device)
        if worker is not None and worker[0].is_alive():
            worker[0].kill()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._workers:
                return
            os.close(self._stop_write)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for process, _ in self._workers.values():  # they were told to shut down
                process.join(max(0.0, deadline - time.monotonic()))
            for worker in self._workers.values():
                _end(*worker)
            os.close(self._stop_read)
            self._workers = {}


def _end(process: ForkServerProcess, watcher: threading.Thread) -> None:
    """Kill the process if it still runs, and free what belongs to it."""
    if process.is_alive():
        process.kill()
    process.join()
    watcher.join()  # it looks at the sentinel, which the process owns
    process.close()
