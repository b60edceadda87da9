"""Jobs in processes of their own: what comes back, and that nothing is left."""

from __future__ import annotations

import os
import select
import signal
from functools import partial
from pathlib import Path

import pytest

from engine.errors import InvalidRequestError
from envs.pool import run_in_processes

WAIT_MS = 60_000  # for the end of a process


def square(number: int) -> int:
    if number < 0:
        raise InvalidRequestError(f"{number} is below zero.")
    return number * number


def meet(fifo: Path, role: str) -> int:
    """The writer tells its process and stays for ever; the reader gives it."""
    if role == "reader":
        return int(fifo.read_text())
    fifo.write_text(str(os.getpid()))
    signal.pause()
    return 0


def test_every_job_comes_back_with_its_result() -> None:
    assert dict(run_in_processes(square, [3, 1, 2], 2)) == {1: 1, 2: 4, 3: 9}
    assert list(run_in_processes(square, [], 2)) == []


def test_an_error_is_that_of_the_job() -> None:
    with pytest.raises(InvalidRequestError, match=r"-1 is below zero\."):
        list(run_in_processes(square, [-1], 1))


def test_leaving_the_loop_ends_what_still_runs(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    running = run_in_processes(partial(meet, fifo), ["writer", "reader"], 2)
    role, pid = next(running)
    assert role == "reader"
    descriptor = os.pidfd_open(pid)
    running.close()  # type: ignore[attr-defined]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(WAIT_MS), "a process is left"
    os.close(descriptor)
