"""Switches in place on the real engine: token identity, rolling back and forward, a lost worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from identity import Reference, assert_identical, outputs_of, plan_to, prompt, serve

from engine.cluster import (
    Binding,
    Deployment,
    ParallelConfig,
    Placement,
    Replica,
    SwitchMode,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.facade import EngineCluster
from engine.migration.in_place import InPlaceSwitch
from engine.runtime import EngineRuntime

PHASES = (SwitchPhase.PREPARE, SwitchPhase.TRANSFER, SwitchPhase.VERIFY, SwitchPhase.COMMIT)


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine() as cluster:
        yield cluster


def in_place(runtime: EngineRuntime, key: str) -> SwitchPlan:
    return replace(plan_to(runtime, key), mode=SwitchMode.IN_PLACE, mode_reason="a test wants it")


def switch_under_load(
    engine: EngineCluster, references: list[Reference], key: str, name: str
) -> SwitchTicket:
    """Tokens are those of the reference."""
    runtime = engine.runtime
    plan = engine.on_loop(lambda: in_place(runtime, key))
    outputs, ticket = engine.run(serve(runtime, references, 6, plan, name), 120)
    assert ticket is not None
    assert assert_identical(references, outputs) == 0
    return ticket


async def blocks_are_free(runtime: EngineRuntime) -> None:
    """Return when every leader says that it holds none."""
    async with asyncio.timeout(20):
        while True:
            stats = runtime.snapshot().replicas
            if len(stats) == len(runtime.deployment.replicas) and not any(
                s.kv_blocks_used for s in stats
            ):
                return
            await runtime.wait_for_stats()


@pytest.mark.parametrize(
    "keys",
    [
        ("2xtp2pp1", "4xtp1pp1"),
        ("1xtp4pp1", "1xtp1pp4", "4xtp1pp1"),
        ("1xtp2pp2", "1xtp1pp3+1xtp1pp1", "3xtp1pp1", "4xtp1pp1"),
    ],
)
def test_tokens_survive(
    engine: EngineCluster, references: list[Reference], keys: tuple[str, ...]
) -> None:
    num_recomputed = 0
    for key in keys:
        ticket = switch_under_load(engine, references, key, key)
        assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
        assert ticket.mode is SwitchMode.IN_PLACE
        assert engine.runtime.deployment.key == key
        assert ticket.moved_bytes == ticket.planned_bytes == ticket.weight_bytes
        assert all(b.binding is Binding.RECOMPUTE for b in ticket.bindings)
        assert ticket.num_recomputed == len(ticket.bindings)
        assert (ticket.pause_s > 0) >= (ticket.num_recomputed > 0)
        num_recomputed += ticket.num_recomputed
        engine.run(blocks_are_free(engine.runtime))
    assert num_recomputed >= len(references)


def test_replicas_that_stay_serve_on(
    engine: EngineCluster, greedy: Callable[[list[int], int], Reference]
) -> None:
    """While the others are held between two steps, the two that stay generate."""
    runtime = engine.runtime
    long = [greedy(prompt(9, salt=s), 100) for s in range(4)]
    served: dict[int, int] = {}

    async def run() -> list[list[int]]:
        plan = in_place(runtime, "1xtp2pp1+2xtp1pp1")
        stay = set(plan.target.replicas) & set(runtime.deployment.replicas)
        assert len(stay) == 2

        def count(name: str) -> None:
            if name in ("before_step_0", "after_step_4"):
                for r in runtime.deployment.replicas:
                    generated = runtime.requests.generated_tokens(r.replica_id)
                    served[r.replica_id] = generated - served.get(r.replica_id, 0)

        runtime.failpoint = count
        outputs = await outputs_of(runtime, long, "stay", 3, lambda: runtime.apply(plan))
        assert all((served[r.replica_id] > 0) == (r in stay) for r in deployment.replicas), served
        return outputs

    deployment = engine.on_loop(lambda: runtime.deployment)
    try:
        assert assert_identical(long, engine.run(run(), 120)) == 0
    finally:
        runtime.failpoint = lambda name: None
    assert engine.on_loop(lambda: runtime.deployment.key) == "1xtp2pp1+2xtp1pp1"
    ticket = switch_under_load(engine, long, "4xtp1pp1", "stay-back")
    assert ticket.phase is SwitchPhase.DONE


@pytest.mark.parametrize(
    "point", ["before_prepare", "after_prepare", "before_transfer", "before_step_0"]
)
def test_before_the_first_step_a_failure_rolls_back(
    engine: EngineCluster, references: list[Reference], point: str
) -> None:
    runtime = engine.runtime
    before = engine.on_loop(lambda: (runtime.deployment, runtime.epoch))
    with failing_at(runtime, point):
        ticket = switch_under_load(engine, references, "2xtp2pp1", point)
    assert ticket.phase is SwitchPhase.ROLLED_BACK
    assert point in ticket.reason
    assert engine.on_loop(lambda: (runtime.deployment, runtime.epoch)) == before
    engine.run(blocks_are_free(runtime))


@pytest.mark.parametrize(
    "point",
    [
        "after_step_0",
        "before_step_3",
        "after_transfer",
        "before_verify",
        "after_verify",
        "before_commit",
    ],
)
def test_after_the_first_step_a_failure_rolls_forward(
    engine: EngineCluster, references: list[Reference], point: str
) -> None:
    runtime = engine.runtime
    there, back = "1xtp2pp2", "4xtp1pp1"
    with failing_at(runtime, point):
        ticket = switch_under_load(engine, references, there, f"there-{point}")
    assert ticket.phase is SwitchPhase.DONE
    assert ticket.reason == f"rolled forward after: made to fail at {point}"
    assert engine.on_loop(lambda: runtime.deployment.key) == there
    ticket = switch_under_load(engine, references, back, f"back-{point}")
    assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
    engine.run(blocks_are_free(runtime))


class failing_at:
    """While open, the failpoint `point` raises, once."""

    def __init__(self, runtime: EngineRuntime, point: str) -> None:
        self.runtime, self.point, self.num_failed = runtime, point, 0

    def __enter__(self) -> None:
        self.runtime.failpoint = self.fail

    def fail(self, name: str) -> None:
        if name == self.point:
            self.num_failed += 1
            raise RuntimeError(f"made to fail at {name}")

    def __exit__(self, *exc: object) -> None:
        self.runtime.failpoint = lambda name: None
        assert self.num_failed == 1


def test_cancel_works_until_the_first_step(
    engine: EngineCluster, references: list[Reference]
) -> None:
    runtime = engine.runtime

    def cancel_at(point: str) -> Callable[[str], None]:
        return lambda name: name == point and runtime.cancel(latest()) and None  # type: ignore

    def latest() -> str:
        ticket = runtime.snapshot().switch
        assert ticket is not None
        return ticket.ticket_id

    try:
        runtime.failpoint = cancel_at("after_prepare")
        ticket = switch_under_load(engine, references, "2xtp2pp1", "early")
        assert (ticket.phase, ticket.num_recomputed) == (SwitchPhase.CANCELLED, 0)
        runtime.failpoint = cancel_at("after_step_0")
        ticket = switch_under_load(engine, references, "2xtp2pp1", "late")
        assert ticket.phase is SwitchPhase.DONE
        assert "rolls forward" in ticket.reason
    finally:
        runtime.failpoint = lambda name: None
    assert switch_under_load(engine, references, "4xtp1pp1", "back").phase is SwitchPhase.DONE


def test_a_worker_killed_between_steps_is_left_out(
    open_engine: Any, references: list[Reference]
) -> None:
    """Its replica is; the other is completed from disk, and no request is lost."""
    with open_engine() as cluster:
        runtime, victim = cluster.runtime, 3

        def kill(name: str) -> None:
            if name == "before_step_3":
                os.kill(runtime._executor.pid(victim), signal.SIGKILL)

        runtime.failpoint = kill
        ticket = switch_under_load(cluster, references, "2xtp2pp1", "killed")
        assert ticket.phase is SwitchPhase.DONE
        assert "left out tp2pp1: workers [3] died" in ticket.reason
        assert cluster.on_loop(lambda: runtime.deployment.key) == ticket.to_key == "1xtp2pp1"
        assert cluster.snapshot().dead_devices == (victim,)
        cluster.run(blocks_are_free(runtime))


def test_stages_that_change_places_move_in_many_steps(
    engine: EngineCluster, references: list[Reference]
) -> None:
    """Every device gives up all that it has; each step of the journal is done once, in order."""
    runtime = engine.runtime
    assert switch_under_load(engine, references, "1xtp1pp4", "pp4").phase is SwitchPhase.DONE

    async def run() -> InPlaceSwitch:
        from engine.migration.plan import plan_transfers

        old = runtime.deployment.replicas[0]
        moved = Replica(100, ParallelConfig(1, 4), Placement(old.placement.devices[::-1]))
        target = Deployment((moved,))
        transfers = plan_transfers(runtime.spec.model, runtime.deployment, target)
        nbytes = sum(t.nbytes for t in transfers)
        plan = replace(
            in_place(runtime, "4xtp1pp1"),
            target=target,
            transfers=transfers,
            weight_bytes=nbytes,
        )
        switches: list[Any] = []

        def act() -> None:
            runtime.apply(plan)
            switches.append(runtime._switches.current)

        outputs = await outputs_of(runtime, references, "swap", 5, act)
        assert assert_identical(references, outputs) == 0
        await runtime.ended(switches[0].ticket.ticket_id)
        return switches[0]  # type: ignore[no-any-return]

    switch = engine.run(run(), 120)
    assert switch.ticket.phase is SwitchPhase.DONE
    assert switch.journal == list(range(len(switch.steps)))
    assert len(switch.steps) >= runtime.spec.model.num_layers
    assert switch_under_load(engine, references, "4xtp1pp1", "swap-back").phase is SwitchPhase.DONE
