"""Where workers run: the `Executor` protocol and its default, local forkserver processes.

The forkserver has torch and the model classes loaded, so a worker starts in milliseconds, while
the engine process itself never imports torch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from typing import Protocol

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is told at birth. `run_dir` holds sockets and rendezvous files."""

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
    enable_prefix_caching: bool = True


class Executor(Protocol):
    """Starts one worker per device and tells when one is gone."""

    def start(self, configs: Sequence[WorkerConfig]) -> None: ...

    def sentinel(self, device: int) -> int:
        """A file descriptor that becomes readable when that worker has ended."""
        ...

    def pid(self, device: int) -> int: ...

    def close(self) -> None:
        """End every worker; none is left when this returns."""
        ...


def _enter(config: WorkerConfig) -> None:
    from engine.worker import run_worker

    run_worker(config)


class LocalExecutor:
    """One forkserver process per device on this machine."""

    def __init__(self) -> None:
        self._processes: dict[int, ForkServerProcess] = {}

    def start(self, configs: Sequence[WorkerConfig]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.worker"])
        for config in configs:
            process = context.Process(
                target=_enter, args=(config,), name=f"worker-{config.device}", daemon=True
            )
            process.start()
            self._processes[config.device] = process

    def sentinel(self, device: int) -> int:
        return self._processes[device].sentinel

    def pid(self, device: int) -> int:
        pid = self._processes[device].pid
        assert pid is not None
        return pid

    def close(self) -> None:
        for process in self._processes.values():
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes = {}
