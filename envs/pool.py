"""Jobs in processes of their own, which end when the one that started them does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], number: int
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, as they end, `number` at a time. An error of a job is raised, and
    jobs that have not begun are dropped; an interrupt, or leaving the loop, ends all at once."""
    if not jobs:
        return
    context = get_context("forkserver")
    with ProcessPoolExecutor(number, context, initializer=_end_with_parent) as pool:
        running = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except (KeyboardInterrupt, GeneratorExit):
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """For a process of a pool."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
