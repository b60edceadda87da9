"""Lost workers come back: restarts, an engine that heals itself, and tokens through all of it."""

from __future__ import annotations

import asyncio
import multiprocessing.forkserver
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from identity import Reference, assert_identical, outputs_of, plan_to, prompt, serve

from engine.channel import ChannelConfig
from engine.cluster import EventKind, RequestStatus, SwitchPhase
from engine.errors import InfeasibleError, UnavailableError
from engine.executor import LocalExecutor, WorkerConfig
from engine.facade import EngineCluster
from engine.messages import RankFailed
from engine.metrics import EngineMetrics
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.worker_pool import Backoff, RecoveryConfig

QUICK = RecoveryConfig(first_wait_s=0.05)
WAIT_S = 90.0


def num_workers() -> int:
    """Processes that the forkserver has made and that still run."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return len(psutil.Process(pid).children()) if pid else 0


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    before = num_workers()
    yield
    assert num_workers() <= before


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine(recovery=QUICK) as cluster:
        yield cluster


def strike(runtime: EngineRuntime, *devices: int, number: int = signal.SIGKILL) -> None:
    for device in devices:
        os.kill(runtime._executor.pid(device), number)


async def until(runtime: EngineRuntime, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await runtime.wait_for_change(1.0)


def told(runtime: EngineRuntime, kind: EventKind) -> list[int | None]:
    return [e.device for e in runtime.events(0).events if e.kind is kind]


def statuses(runtime: EngineRuntime) -> list[RequestStatus]:
    return [e.outcome.status for e in runtime.events(0).events if e.outcome is not None]


def all_alive(runtime: EngineRuntime, num_lost: int) -> Callable[[], bool]:
    """Whether that many workers have been lost and all have come back."""
    return lambda: len(told(runtime, EventKind.DEVICE_JOINED)) >= num_lost


async def serve_and_strike(
    runtime: EngineRuntime, references: list[Reference], name: str, *devices: int
) -> list[list[int]]:
    """Run the requests; kill the devices' workers at the first one's fourth token, wait until
    they are back."""
    awaited = len(told(runtime, EventKind.DEVICE_JOINED)) + len(devices)
    outputs = await outputs_of(runtime, references, name, 4, lambda: strike(runtime, *devices))
    await until(runtime, all_alive(runtime, awaited))
    return outputs


# -------------------------------------------------------------------------------- parts


def test_waits_double_up_to_the_longest_and_start_over_after_a_steady_life() -> None:
    backoff = Backoff(RecoveryConfig())
    waits = [backoff.next_wait_s(lived_s=59.0) for _ in range(8)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert [backoff.next_wait_s(lived_s=s) for s in (60.0, 0.0)] == [1.0, 2.0]


def sleep_for_ever(config: WorkerConfig) -> None:
    threading.Event().wait()


def worker_config(device: int, incarnation: int = 0) -> WorkerConfig:
    sizes = {"block_size": 16, "max_model_len": 64, "max_num_seqs": 1}
    return WorkerConfig(
        device, "", "", "float32", "cpu", **sizes, max_num_batched_tokens=16,
        eos_token_ids=(), incarnation=incarnation,
    )  # fmt: skip


def test_the_local_executor_replaces_the_dead_and_the_living() -> None:
    deaths: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    executor = LocalExecutor(sleep_for_ever)
    executor.start([worker_config(d) for d in (0, 1)], lambda d, n: deaths.put((d, n)))
    try:
        other = executor.pid(1)
        pids = [executor.pid(0)]
        executor.kill(0)
        assert deaths.get(timeout=WAIT_S) == (0, 0)
        executor.restart(worker_config(0, 1))
        pids.append(executor.pid(0))
        executor.restart(worker_config(0, 2))  # its predecessor still lives
        assert deaths.get(timeout=WAIT_S) == (0, 1)
        pids.append(executor.pid(0))
        assert [psutil.pid_exists(pid) for pid in (*pids, other)] == [False, False, True, True]
        executor.kill(0)
        assert deaths.get(timeout=WAIT_S) == (0, 2)
        executor.kill(1)
        assert deaths.get(timeout=WAIT_S) == (1, 0)
    finally:
        executor.close()
    assert not any(psutil.pid_exists(pid) for pid in (*pids, other))
    assert deaths.empty()
    with pytest.raises(UnavailableError, match="closing"):
        executor.restart(worker_config(0, 3))


# -------------------------------------------------------------------------------- some are left


@pytest.mark.timeout(300)
def test_each_worker_in_turn_is_lost_and_used_again(
    engine: EngineCluster, references: list[Reference]
) -> None:
    runtime = engine.runtime
    metrics = engine.on_loop(lambda: EngineMetrics(runtime, "m"))
    references = references[:2]
    for device in range(4):
        outputs = engine.run(serve_and_strike(runtime, references, f"kill-{device}", device), 120)
        assert assert_identical(references, outputs) == 0
        assert told(runtime, EventKind.DEVICE_LOST)[device:] == [device]
        assert told(runtime, EventKind.DEVICE_JOINED)[device:] == [device]
        snapshot = engine.snapshot()
        assert (snapshot.dead_devices, snapshot.deployment.key) == ((), "3xtp1pp1")
        plan = engine.on_loop(lambda: plan_to(runtime, "4xtp1pp1"))
        outputs, ticket = engine.run(serve(runtime, references, 2, plan, f"use-{device}"), 120)
        assert ticket is not None
        assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
        assert assert_identical(references, outputs) == 0
    assert statuses(runtime) == [RequestStatus.FINISHED] * 8 * len(references)
    lines = engine.on_loop(metrics.text).decode().splitlines()
    for name in ("workers_lost_total", "workers_restarted_total"):
        assert f'tidewright:{name}{{model_name="m"}} 4.0' in lines


def test_penalties_samples_and_logprobs_survive_a_loss(engine: EngineCluster) -> None:
    runtime, context = engine.runtime, prompt(40, salt=3)
    params = SamplingParams(
        40, 0.9, 0.95, 50, seed=11, ignore_eos=True, presence_penalty=0.7,
        frequency_penalty=0.4, repetition_penalty=1.2, logprobs=2,
    )  # fmt: skip

    async def run(name: str, at_token: int) -> list[Any]:
        chunks = []
        async for chunk in runtime.generate(name, context, params):
            chunks.append(chunk)
            if len(chunks) == at_token:
                (request,) = runtime.requests._requests.values()
                assert request.replica_id is not None
                replica = runtime.deployment.replica(request.replica_id)
                strike(runtime, replica.placement.devices[0])
        return chunks

    undisturbed, struck = engine.run(run("calm", 0), 120), engine.run(run("struck", 13), 120)
    assert [c.token_ids for c in struck] == [c.token_ids for c in undisturbed]
    for one, other in zip(undisturbed, struck, strict=True):
        for expected, found in zip(one.logprobs, other.logprobs, strict=True):
            assert found.token_id == expected.token_id
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    engine.run(until(runtime, lambda: not runtime.dead_devices), 120)
    outcome = [e.outcome for e in runtime.events(0).events if e.outcome is not None][-1]
    assert (outcome.num_moves, outcome.output_tokens) == (1, 40)


def test_a_loss_during_a_switch_rolls_it_back_and_the_device_is_used_again(
    open_engine: Any, references: list[Reference]
) -> None:
    with open_engine("4xtp1pp1", recovery=QUICK) as cluster:
        runtime = cluster.runtime

        def failpoint(name: str) -> None:
            if name == "before_verify":
                strike(runtime, 2)

        runtime.failpoint = failpoint
        plan = cluster.on_loop(lambda: plan_to(runtime, "2xtp2pp1"))
        outputs, ticket = cluster.run(serve(runtime, references, 4, plan, "hit"), 120)
        runtime.failpoint = lambda name: None
        assert ticket is not None
        assert ticket.phase is SwitchPhase.ROLLED_BACK
        assert assert_identical(references, outputs) == 0
        cluster.run(until(runtime, all_alive(runtime, 1)), 120)
        assert cluster.snapshot().deployment.key == "3xtp1pp1"
        plan = cluster.on_loop(lambda: plan_to(runtime, "2xtp2pp1"))
        outputs, ticket = cluster.run(serve(runtime, references, 4, plan, "again"), 120)
        assert ticket is not None
        assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
        assert assert_identical(references, outputs) == 0
        assert statuses(runtime) == [RequestStatus.FINISHED] * 2 * len(references)


# -------------------------------------------------------------------------------- none is left


def test_the_only_replica_is_loaded_again(open_engine: Any, references: list[Reference]) -> None:
    """A stopped worker is killed and replaced; the engine turns new requests away meanwhile."""
    channel = ChannelConfig(heartbeat_timeout_s=2.0)
    with open_engine("1xtp4pp1", channel=channel, recovery=QUICK) as cluster:
        runtime, refused = cluster.runtime, []
        process = psutil.Process(runtime._executor.pid(3))

        def stop() -> None:
            strike(runtime, 3, number=signal.SIGSTOP)

        async def run() -> list[list[int]]:
            work = asyncio.ensure_future(outputs_of(runtime, references, "only", 4, stop))
            await until(runtime, lambda: bool(told(runtime, EventKind.DEVICE_LOST)))
            assert "1xtp4pp1 is loaded again when workers [3] are back" in runtime.not_ready
            with pytest.raises(UnavailableError, match="no replica is left") as error:
                runtime.generate("new", [1, 2], SamplingParams(4))
            refused.append(error)
            return await work

        outputs = cluster.run(run(), 120)
        assert refused
        assert assert_identical(references, outputs) == 0
        assert not process.is_running()
        snapshot = cluster.snapshot()
        assert (snapshot.deployment.key, snapshot.dead_devices) == ("1xtp4pp1", ())
        assert snapshot.epoch == 2  # it was lost, and loaded
        assert runtime.not_ready == ""
        counted = statuses(runtime)
        assert counted.count(RequestStatus.FINISHED) == len(references)
        assert counted.count(RequestStatus.REJECTED) == 1


class OneStillborn(LocalExecutor):
    """The first successor of every worker dies while it starts."""

    def restart(self, config: WorkerConfig) -> None:
        super().restart(config)
        if config.incarnation == 1:
            self.kill(config.device)


def test_two_deaths_at_once_and_successors_that_die_at_birth(
    open_engine: Any, references: list[Reference]
) -> None:
    with open_engine("2xtp2pp1", OneStillborn(), recovery=QUICK) as cluster:
        runtime = cluster.runtime
        outputs = cluster.run(serve_and_strike(runtime, references, "two", 1, 2), 120)
        assert assert_identical(references, outputs) == 0
        assert sorted(map(int, told(runtime, EventKind.DEVICE_LOST))) == [1, 2]  # type: ignore[arg-type]
        assert statuses(runtime) == [RequestStatus.FINISHED] * len(references)
        snapshot = cluster.snapshot()
        assert (snapshot.deployment.key, snapshot.dead_devices) == ("2xtp2pp1", ())
        assert cluster.on_loop(lambda: runtime.workers.lives(range(4))) == {0: 0, 1: 2, 2: 2, 3: 0}


class OneGoneForGood(LocalExecutor):
    """No successor of worker 1 is to be had."""

    def restart(self, config: WorkerConfig) -> None:
        if config.device == 1:
            raise UnavailableError("there is no place for worker 1")
        super().restart(config)


def test_past_the_deadline_the_replicas_that_can_be_are_loaded(
    open_engine: Any, references: list[Reference]
) -> None:
    late = RecoveryConfig(first_wait_s=0.05, longest_wait_s=1.0, heal_timeout_s=1.0)
    with open_engine("2xtp1pp1", OneGoneForGood(), recovery=late) as cluster:
        runtime = cluster.runtime
        work = outputs_of(runtime, references, "part", 4, lambda: strike(runtime, 0, 1))
        outputs = cluster.run(work, 120)
        assert assert_identical(references, outputs) == 0
        snapshot = cluster.snapshot()
        assert (snapshot.deployment.key, snapshot.dead_devices) == ("1xtp1pp1", (1,))


def test_a_broken_rank_of_living_workers_is_loaded_again(
    open_engine: Any, references: list[Reference]
) -> None:
    with open_engine("1xtp2pp1", recovery=QUICK) as cluster:
        runtime = cluster.runtime
        broken = RankFailed(device=1, replica_id=0, error="a step raised")
        work = outputs_of(runtime, references, "broken", 4, lambda: runtime.on_message(broken))
        outputs = cluster.run(work, 120)
        assert assert_identical(references, outputs) == 0
        assert cluster.on_loop(lambda: runtime.workers.lives([0, 1])) == {0: 0, 1: 0}
        assert (runtime.epoch, runtime.workers.num_lost) == (2, 0)


def test_requests_fail_when_no_worker_comes_back_in_time(
    open_engine: Any, references: list[Reference]
) -> None:
    late = RecoveryConfig(first_wait_s=1000.0, heal_timeout_s=0.2)
    with open_engine("1xtp2pp1", recovery=late) as cluster:
        runtime = cluster.runtime
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)

        async def run() -> list[Any]:
            chunks = []
            async for chunk in runtime.generate("doomed", references[0].prompt, params):
                chunks.append(chunk)
                if len(chunks) == 4:
                    strike(runtime, 1)
            return chunks

        assert cluster.run(run(), 120)[-1].finish_reason == "error"
        assert statuses(runtime) == [RequestStatus.FAILED]
        assert cluster.snapshot().dead_devices == (1,)
        assert cluster.snapshot().num_queued_unrouted == 0


def test_a_plan_for_a_device_without_a_worker_is_refused(open_engine: Any) -> None:
    with open_engine(recovery=RecoveryConfig(first_wait_s=600.0)) as cluster:
        runtime = cluster.runtime
        plan = cluster.on_loop(lambda: plan_to(runtime, "1xtp1pp1"))
        (device,) = plan.target.devices
        strike(runtime, device)
        cluster.run(until(runtime, lambda: bool(runtime.dead_devices)), WAIT_S)
        plan = cluster.on_loop(lambda: replace(plan, expected_epoch=runtime.epoch))
        with pytest.raises(InfeasibleError, match="dead"):
            cluster.on_loop(lambda: runtime.apply(plan))


def test_an_engine_closes_while_a_worker_is_restarted(open_engine: Any) -> None:
    restarting = threading.Event()

    class Told(LocalExecutor):
        def restart(self, config: WorkerConfig) -> None:
            restarting.set()
            super().restart(config)

    with open_engine("4xtp1pp1", Told(), recovery=QUICK) as cluster:
        cluster.on_loop(lambda: strike(cluster.runtime, 0))
        assert restarting.wait(WAIT_S)
    # `no_orphans` looks whether one is left
