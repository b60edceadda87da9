"""Where workers run: the `Executor` protocol and its default, local forkserver processes.

The forkserver has torch and the model classes loaded, so a worker starts in milliseconds, while
the engine process itself never imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from typing import Protocol

from engine.sockets import CurveKeys

STOP_TIMEOUT_S = 5.0
OnDeath = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is told at birth. `run_dir` holds its engine's sockets and rendezvous files.

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


class Executor(Protocol):
    """Starts one worker per device and tells when one is gone."""

    def start(self, configs: Sequence[WorkerConfig], on_death: OnDeath) -> None:
        """Start them all. `on_death(device)` is called once, from another thread, for each that
        ends before `close`. Raises UnavailableError when they cannot be had."""
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
        self._processes: dict[int, ForkServerProcess] = {}
        self._watcher: threading.Thread | None = None
        self._stop_read, self._stop_write = -1, -1  # a pipe; closing its end stops the watcher

    def start(self, configs: Sequence[WorkerConfig], on_death: OnDeath) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.preload"])
        for config in configs:
            process = context.Process(
                target=self._target, args=(config,), name=f"worker-{config.device}", daemon=True
            )
            process.start()
            self._processes[config.device] = process
        self._stop_read, self._stop_write = os.pipe()
        sentinels = {process.sentinel: device for device, process in self._processes.items()}
        self._watcher = threading.Thread(
            target=self._watch, args=(sentinels, on_death), name="worker-watch", daemon=True
        )
        self._watcher.start()

    def _watch(self, sentinels: dict[int, int], on_death: OnDeath) -> None:
        while sentinels:
            for ready in connection.wait([self._stop_read, *sentinels]):
                if ready == self._stop_read:
                    return
                assert isinstance(ready, int)
                on_death(sentinels.pop(ready))

    def pid(self, device: int) -> int:
        pid = self._processes[device].pid
        assert pid is not None
        return pid

    def kill(self, device: int) -> None:
        if device in self._processes:
            self._processes[device].kill()

    def close(self) -> None:
        if self._watcher is not None:
            os.close(self._stop_write)
            self._watcher.join()
            os.close(self._stop_read)
            self._watcher = None
        for process in self._processes.values():
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes = {}
