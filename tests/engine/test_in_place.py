"""Switches in place on the real engine: token identity, rolling back and forward, a lost worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from identity import Reference, assert_identical, outputs_of, plan_to, serve

from engine.cluster import (
    Binding,
    Deployment,
    EventKind,
    ParallelConfig,
    Placement,
    Replica,
    SwitchMode,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.facade import EngineCluster
from engine.messages import Reply
from engine.migration import phases
from engine.migration.in_place import InPlaceSwitch
from engine.migration.order import InPlaceStep
from engine.migration.plan import plan_transfers
from engine.migration.sequences import check_sums
from engine.runtime import EngineRuntime


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
        ("1xtp2pp2", "1xtp1pp3+1xtp1pp1", "4xtp1pp1"),
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
    engine: EngineCluster, references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch waits between two steps until requests that came meanwhile have been served."""
    runtime, move = engine.runtime, InPlaceSwitch._move
    stay: set[int] = set()

    async def serve_then_move(switch: InPlaceSwitch, step: InPlaceStep) -> None:
        if len(switch.journal) == 2:
            stay.update(r.replica_id for r in switch.plan.target.replicas)
            stay.difference_update(r.replica_id for r in switch.coming)
            outputs = await outputs_of(runtime, references, "meanwhile")
            assert assert_identical(references, outputs) == 0
        await move(switch, step)

    monkeypatch.setattr(InPlaceSwitch, "_move", serve_then_move)
    ticket = switch_under_load(engine, references, "1xtp2pp1+2xtp1pp1", "stay")
    assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
    ended = [e.outcome for e in engine.on_loop(lambda: runtime.events(0)).events if e.outcome]
    on = {o.replica_id for o in ended if o.request_id.startswith("meanwhile")}
    assert len(stay) == 2
    assert on == stay


@pytest.mark.parametrize(
    "point", ["before_prepare", "after_prepare", "before_transfer", "before_step_0"]
)
def test_while_the_old_weights_are_there_a_failure_rolls_back(
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
        "before_step_5",
        "after_transfer",
        "before_verify",
        "after_verify",
        "before_commit",
    ],
)
def test_when_old_weights_are_gone_a_failure_rolls_forward(
    engine: EngineCluster, references: list[Reference], point: str
) -> None:
    runtime = engine.runtime
    present = engine.on_loop(lambda: runtime.deployment.key)
    target = "4xtp1pp1" if present == "1xtp2pp2" else "1xtp2pp2"
    with failing_at(runtime, point):
        ticket = switch_under_load(engine, references, target, f"forward-{point}")
    assert ticket.phase is SwitchPhase.DONE
    assert ticket.reason == f"rolled forward after: made to fail at {point}"
    assert engine.on_loop(lambda: runtime.deployment.key) == target
    engine.run(blocks_are_free(runtime))


def test_a_wrong_checksum_is_found_before_anything_is_dropped_for_it(
    engine: EngineCluster, references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step that moves bytes the old weights are whole, in the fifth they are not."""
    assert switch_under_load(engine, references, "2xtp2pp1", "crc").phase is SwitchPhase.DONE
    wrong, num_checked = 0, 0

    def check(replies: list[Reply], what: str) -> None:
        nonlocal num_checked
        if any(reply.checksums for reply in replies):
            if num_checked == wrong:
                first = next(i for i, reply in enumerate(replies) if reply.checksums)
                replies[first] = wrong_sums(replies[first])
            num_checked += 1
        check_sums(replies, what)

    monkeypatch.setattr(phases, "check_sums", check)
    ticket = switch_under_load(engine, references, "4xtp1pp1", "crc-0")
    assert ticket.phase is SwitchPhase.ROLLED_BACK
    assert "weight transfer 0 arrived with a wrong checksum" in ticket.reason
    wrong, num_checked = 4, 0
    ticket = switch_under_load(engine, references, "4xtp1pp1", "crc-4")
    assert ticket.phase is SwitchPhase.DONE
    assert ticket.reason.startswith("rolled forward after: weight transfer")
    assert ticket.reason.endswith("arrived with a wrong checksum")


def wrong_sums(reply: Reply) -> Reply:
    return msgspec.structs.replace(
        reply, checksums=[(i, value ^ 1) for i, value in reply.checksums]
    )


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


def test_cancel_works_while_the_old_weights_are_there(
    engine: EngineCluster, references: list[Reference]
) -> None:
    runtime = engine.runtime

    def cancel_at(point: str) -> Callable[[str], None]:
        def cancel(name: str) -> None:
            ticket = runtime.snapshot().switch
            if name == point and ticket is not None:
                runtime.cancel(ticket.ticket_id)

        return cancel

    try:
        runtime.failpoint = cancel_at("before_step_0")
        ticket = switch_under_load(engine, references, "2xtp2pp1", "early")
        assert (ticket.phase, ticket.num_recomputed) == (SwitchPhase.CANCELLED, 0)
        runtime.failpoint = cancel_at("after_step_0")
        ticket = switch_under_load(engine, references, "2xtp2pp1", "late")
        assert ticket.phase is SwitchPhase.DONE
        assert "rolls forward" in ticket.reason
    finally:
        runtime.failpoint = lambda name: None


@pytest.mark.parametrize(
    ("point", "target", "phase", "left"),
    [
        ("before_transfer", "2xtp2pp1", SwitchPhase.CANCELLED, "3xtp1pp1"),
        ("before_step_3", "2xtp2pp1", SwitchPhase.DONE, "1xtp2pp1"),
        ("before_step_3", "1xtp4pp1", SwitchPhase.ROLLED_BACK, "4xtp1pp1"),  # loaded again
    ],
)
def test_a_worker_killed_on_the_way(
    open_engine: Any,
    references: list[Reference],
    point: str,
    target: str,
    phase: SwitchPhase,
    left: str,
) -> None:
    """Its replica is lost or left out; where nothing is left, the engine heals itself. Every
    request ends once, with its own tokens."""
    with open_engine() as cluster:
        runtime, victim = cluster.runtime, 3

        def kill(name: str) -> None:
            if name == point:
                os.kill(runtime._executor.pid(victim), signal.SIGKILL)

        async def run() -> SwitchTicket:
            plan = in_place(runtime, target)
            outputs, ticket = await serve(runtime, references, 6, plan, "killed")
            assert ticket is not None
            assert assert_identical(references, outputs) == 0
            while runtime.deployment.key != left:
                await runtime.wait_for_change(1.0)
            return ticket

        runtime.failpoint = kill
        ticket = cluster.run(run(), 90)
        assert ticket.phase in (phase, SwitchPhase.ROLLED_BACK)
        if point == "before_step_3":
            assert "left out" in ticket.reason
            assert "workers [3] died" in ticket.reason
        events = runtime.events(0).events
        assert [e.device for e in events if e.kind is EventKind.DEVICE_LOST] == [victim]
        assert len([e for e in events if e.outcome is not None]) == len(references)
        cluster.run(blocks_are_free(runtime))


def test_stages_that_change_places_move_in_many_steps(
    engine: EngineCluster, references: list[Reference]
) -> None:
    """Every device gives up all that it has; each step of the journal is done once, in order."""
    runtime = engine.runtime
    assert switch_under_load(engine, references, "1xtp1pp4", "pp4").phase is SwitchPhase.DONE

    async def run() -> InPlaceSwitch:
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
