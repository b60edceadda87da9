"""Sums in shared memory, against torch's own, and what a rank does that waits for one in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.shared_sum import PIECE_BYTES, SharedSum, is_supported, open_shared_sum

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs Linux on x86-64")
FLOATS_PER_PIECE = PIECE_BYTES // 4


class Board:
    """What ranks that are threads tell one another when they join."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[tuple[str, int], str] = {}
        self.barrier = threading.Barrier(size)

    def share(self, rank: int) -> Callable[[str, str], list[str]]:
        def share(label: str, value: str) -> list[str]:
            self.values[label, rank] = value
            self.barrier.wait()
            return [self.values[label, other] for other in range(self.size)]

        return share


def on_ranks(size: int, work: Callable[[SharedSum, int], Any], timeout_s: float = 30) -> list[Any]:
    board = Board(size)

    def run(rank: int) -> Any:
        return work(open_shared_sum(board.share(rank), rank, size, timeout_s), rank)

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(run, rank) for rank in range(size)]]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, FLOATS_PER_PIECE, 3 * FLOATS_PER_PIECE + 5])
def test_sums_equal_torchs_and_are_the_same_bits_on_all_ranks(
    size: int, dtype: torch.dtype, count: int
) -> None:
    torch.manual_seed(count + size)
    parts = torch.randn(size, count).to(dtype)

    def work(group: SharedSum, rank: int) -> torch.Tensor:
        mine = parts[rank].clone()
        group.all_reduce(mine)
        return mine

    sums = on_ranks(size, work)
    expected = parts.double().sum(0)
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(sums[0].double(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(sums[0], other) for other in sums)


def test_no_slot_is_filled_before_all_have_read_it() -> None:
    """Ranks that are early and late in turn, over many sums of several pieces."""

    def work(group: SharedSum, rank: int) -> list[float]:
        seen = []
        for turn in range(300):
            if turn % 3 == rank:
                os.sched_yield()
            tensor = torch.full((2 * FLOATS_PER_PIECE if turn % 50 == 0 else 5,), turn + rank)
            tensor = tensor.float()
            group.all_reduce(tensor)
            assert tensor.min() == tensor.max()
            seen.append(float(tensor[0]))
        return seen

    expected = [float(3 * turn + 3) for turn in range(300)]
    assert on_ranks(3, work) == [expected] * 3


def test_who_left_does_not_undo_the_sum_it_took_part_in() -> None:
    board, left = Board(2), threading.Event()

    def leaver() -> None:
        group = open_shared_sum(board.share(1), 1, 2, 30)
        group._counters[group._own] = 1  # its part of the first sum is there
        del group
        left.set()

    thread = threading.Thread(target=leaver)
    thread.start()
    group = open_shared_sum(board.share(0), 0, 2, 30)
    assert left.wait(10)
    thread.join()
    tensor = torch.ones(4)
    group.all_reduce(tensor)
    assert torch.equal(tensor, torch.ones(4))  # its slot was empty
    with pytest.raises(RuntimeError, match="has left"):
        group.all_reduce(tensor)


def test_a_rank_that_does_not_come_ends_the_wait() -> None:
    def work(group: SharedSum, rank: int) -> None:
        if rank == 0:
            with pytest.raises(RuntimeError, match="did not come to the sum within"):
                group.all_reduce(torch.ones(4))
        done.wait()

    done = threading.Barrier(2)
    on_ranks(2, work, timeout_s=0.1)


PEER = """
import os, sys, torch
from engine.shared_sum import open_shared_sum

def share(label, value):
    print(value, flush=True)
    return [sys.stdin.readline().strip(), value]

group = open_shared_sum(share, 1, 2, 30.0)
group.all_reduce(torch.ones(4))
print("summed", flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_ends_the_wait_at_once() -> None:
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with peer:
        to_peer, from_peer = peer.stdin, peer.stdout
        assert to_peer is not None
        assert from_peer is not None

        def share(label: str, value: str) -> list[str]:
            to_peer.write(value + "\n")
            to_peer.flush()
            return [value, from_peer.readline().strip()]

        group = open_shared_sum(share, 0, 2, timeout_s=30)
        tensor = torch.full((4,), 2.0)
        group.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((4,), 3.0))
        assert from_peer.readline() == "summed\n"
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="has ended"):
            group.all_reduce(tensor)


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        on_ranks(2, lambda group, rank: group.all_reduce(torch.ones(4)))
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert "tidewright-sum" not in maps.read()
