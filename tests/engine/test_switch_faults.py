"""What breaks inside workers while a switch runs: it rolls back at once, or completes, and no
request is lost. Each fault is built into the worker that has it, and waits for a file to strike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from identity import MIGRATE, Reference, assert_identical, plan_to, serve

from engine.cluster import RequestStatus, SwitchPhase, SwitchTicket
from engine.executor import LocalExecutor, WorkerConfig
from engine.facade import EngineCluster

FAULTY = 2  # the device whose worker breaks
AT_ONCE_S = 15.0  # far below the 30 s that a group waits for a silent peer


def strikes(config: WorkerConfig) -> bool:
    return config.device == FAULTY and Path(config.run_dir, "strike").exists()


def wrong_checksum(config: WorkerConfig) -> None:
    from engine.migration import transfer
    from engine.worker import run_worker

    right = transfer.checksum
    transfer.checksum = lambda tensor: right(tensor) ^ strikes(config)
    run_worker(config)


def fails_to_move(config: WorkerConfig) -> None:
    from engine.migration import calls
    from engine.worker import run_worker

    moves = calls.exchange

    def exchange(group: Any, jobs: Any, pace: Any) -> Any:
        if strikes(config):
            raise RuntimeError("made to fail")
        return moves(group, jobs, pace)

    calls.exchange = exchange
    run_worker(config)


def vanishes_in_mid_transfer(config: WorkerConfig) -> None:
    from engine.migration import calls
    from engine.worker import run_worker

    moves = calls.exchange

    def exchange(group: Any, jobs: Any, pace: Any) -> Any:
        def until_the_second() -> Any:
            for number, job in enumerate(jobs):
                if strikes(config) and number == 1:
                    os._exit(1)
                yield job

        return moves(group, until_the_second(), pace)

    calls.exchange = exchange
    run_worker(config)


def out_of_memory(config: WorkerConfig) -> None:
    from engine import kv_cache
    from engine.worker import run_worker

    allocate = kv_cache.lazy_zeros

    def lazy_zeros(shape: Any, dtype: Any) -> Any:
        if strikes(config):
            raise MemoryError("made to be out of memory")
        return allocate(shape, dtype)

    kv_cache.lazy_zeros = lazy_zeros
    run_worker(config)


def switch_with_a_strike(
    cluster: EngineCluster, references: list[Reference], key: str, name: str
) -> SwitchTicket:
    runtime = cluster.runtime
    strike = Path(runtime._run_dir, "strike")
    strike.touch()
    try:
        plan = cluster.on_loop(lambda: plan_to(runtime, key, MIGRATE))
        outputs, ticket = cluster.run(serve(runtime, references, 3, plan, name), 120)
    finally:
        strike.unlink()
    assert ticket is not None
    assert assert_identical(references, outputs) == 0
    outcomes = [e.outcome for e in runtime.events(0).events if e.outcome is not None]
    mine = [o.status for o in outcomes if o.request_id.startswith(f"{name}-")]
    assert mine == [RequestStatus.FINISHED] * len(references)
    return ticket


@pytest.fixture(scope="module")
def long(greedy: Callable[[list[int], int], Reference]) -> list[Reference]:
    """Long enough to be there when KV moves, also on a busy machine; with blocks enough for several
    copies."""
    return [greedy([(5 * i + n) % 256 for i in range(n)], 150) for n in (20, 33, 50, 90)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (wrong_checksum, "wrong checksum"),
        (fails_to_move, "made to fail"),
        (out_of_memory, "made to be out of memory"),
    ],
)
def test_a_fault_before_commit_rolls_back_and_the_next_switch_works(
    open_engine: Any,
    long: list[Reference],
    fault: Callable[[WorkerConfig], None],
    reason: str,
) -> None:
    with open_engine(executor=LocalExecutor(fault)) as cluster:
        before = cluster.snapshot()
        ticket = switch_with_a_strike(cluster, long, "2xtp2pp1", "struck")
        assert (ticket.phase, ticket.duration_s < AT_ONCE_S) == (SwitchPhase.ROLLED_BACK, True)
        assert reason in ticket.reason
        after = cluster.snapshot()
        assert (after.deployment, after.epoch) == (before.deployment, before.epoch)
        plan = cluster.on_loop(lambda: plan_to(cluster.runtime, "2xtp2pp1", MIGRATE))
        outputs, done = cluster.run(serve(cluster.runtime, long, 3, plan, "after"), 120)
        assert done is not None
        assert done.phase is SwitchPhase.DONE, done.reason
        assert assert_identical(long, outputs) == 0


def test_a_peer_that_vanishes_while_kv_moves_loses_no_request(
    open_engine: Any, long: list[Reference]
) -> None:
    executor = LocalExecutor(vanishes_in_mid_transfer)
    with open_engine(executor=executor) as cluster:
        ticket = switch_with_a_strike(cluster, long, "2xtp2pp1", "vanished")
        assert (ticket.phase, ticket.duration_s < AT_ONCE_S) == (SwitchPhase.ROLLED_BACK, True)
        assert cluster.runtime.deployment.key == "3xtp1pp1"
