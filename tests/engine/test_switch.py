"""Live switches on the real engine: token identity, rollback, cancellation, a killed worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from identity import (
    NUM_TOKENS,
    Reference,
    assert_identical,
    plan_to,
    prompt,
    serve,
    serve_through_loss,
)

from engine.cluster import EventKind, KvCostParams, RequestStatus, SwitchPhase, SwitchTicket
from engine.errors import StaleEpochError, SwitchInProgressError
from engine.facade import EngineCluster
from engine.request import SampleSpec, SamplingParams
from engine.sampler import sample

CYCLE = (
    "4xtp1pp1",
    "2xtp2pp1",
    "1xtp4pp1",
    "1xtp2pp2",
    "1xtp1pp3+1xtp1pp1",
    "1xtp2pp1+2xtp1pp1",
    "1xtp1pp4",
    "3xtp1pp1",
)
RECOMPUTE = KvCostParams(1.0, 1e9, 0.01)  # the link looks endless


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine() as cluster:
        yield cluster


@pytest.mark.parametrize("at_token", [1, 7, 16])
def test_tokens_survive_a_switch_between_every_neighbouring_pair(
    engine: EngineCluster, references: list[Reference], at_token: int
) -> None:
    runtime = engine.runtime
    excused = 0
    for key in (*CYCLE[1:], CYCLE[0]):
        plan = engine.on_loop(lambda key=key: plan_to(runtime, key))
        name = f"{key}-{at_token}"
        outputs, ticket = engine.run(serve(runtime, references, at_token, plan, name), 120)
        assert ticket is not None
        assert ticket.phase is SwitchPhase.DONE, ticket.reason
        assert runtime.deployment.key == plan.target.key
        excused += assert_identical(references, outputs)
    assert excused == 0


def test_recompute_gives_the_same_tokens(
    engine: EngineCluster, greedy: Callable[[list[int], int], Reference]
) -> None:
    runtime = engine.runtime
    long = [greedy(prompt(length), 150) for length in (40, 60)]  # still run when KV would move
    for key in ("2xtp2pp1", "4xtp1pp1"):
        plan = engine.on_loop(lambda key=key: plan_to(runtime, key, RECOMPUTE))
        outputs, ticket = engine.run(serve(runtime, long, 5, plan, f"re-{key}"), 120)
        assert ticket is not None
        assert (ticket.phase, ticket.num_migrated) == (SwitchPhase.DONE, 0)
        assert ticket.num_recomputed > 0
        assert assert_identical(long, outputs) == 0


def test_seeded_sampling_survives_a_switch(engine: EngineCluster, plain_model: Any) -> None:
    runtime, context = engine.runtime, prompt(20, salt=1)
    expected: list[int] = []
    with torch.inference_mode():
        for position in range(NUM_TOKENS):
            logits = plain_model(torch.tensor([context + expected])).logits[:, -1]
            expected += sample(logits, [SampleSpec(0.9, 0.95, 50, 42, position)])
    params = SamplingParams(NUM_TOKENS, 0.9, 0.95, 50, seed=42, ignore_eos=True)

    async def run() -> list[int]:
        tokens: list[int] = []
        async for chunk in runtime.generate("sampled", context, params):
            tokens += chunk.token_ids
            if len(tokens) == 9:
                ticket = runtime.apply(plan_to(runtime, "1xtp2pp2"))
        assert (await runtime.ended(ticket.ticket_id)).phase is SwitchPhase.DONE
        back = runtime.apply(plan_to(runtime, "4xtp1pp1"))
        assert (await runtime.ended(back.ticket_id)).phase is SwitchPhase.DONE
        return tokens

    assert engine.run(run(), 120) == expected


@pytest.mark.parametrize(
    "point",
    [
        f"{when}_{phase}"
        for phase in (SwitchPhase.PREPARE, SwitchPhase.TRANSFER, SwitchPhase.VERIFY)
        for when in ("before", "after")
    ]
    + ["before_commit"],
)
def test_a_failure_before_commit_rolls_back(
    engine: EngineCluster, references: list[Reference], point: str
) -> None:
    runtime = engine.runtime

    def fail(name: str) -> None:
        if name == point:
            raise RuntimeError(f"made to fail at {name}")

    before = engine.on_loop(lambda: (runtime.deployment, runtime.epoch))
    plan = engine.on_loop(lambda: plan_to(runtime, "2xtp2pp1"))
    runtime.failpoint = fail
    try:
        outputs, ticket = engine.run(serve(runtime, references, 6, plan, f"fail-{point}"), 120)
    finally:
        runtime.failpoint = lambda name: None
    assert ticket is not None
    assert ticket.phase is SwitchPhase.ROLLED_BACK
    assert point in ticket.reason
    assert engine.on_loop(lambda: (runtime.deployment, runtime.epoch)) == before
    assert assert_identical(references, outputs) == 0


def test_cancel_before_commit_keeps_the_old_deployment(engine: EngineCluster) -> None:
    runtime = engine.runtime

    async def run() -> SwitchTicket:
        ticket = runtime.apply(plan_to(runtime, "2xtp2pp1"))
        with pytest.raises(SwitchInProgressError, match=ticket.ticket_id):
            runtime.apply(plan_to(runtime, "1xtp4pp1"))
        runtime.cancel(ticket.ticket_id)
        return await runtime.ended(ticket.ticket_id)

    assert engine.run(run(), 120).phase is SwitchPhase.CANCELLED
    assert runtime.deployment.key == "4xtp1pp1"


def test_a_request_cancelled_while_it_moves_frees_its_blocks(engine: EngineCluster) -> None:
    runtime = engine.runtime

    async def run() -> None:
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        stream = runtime.generate("leaver", prompt(40), params)
        await anext(stream)
        runtime.failpoint = lambda name: stream.cancel() if name == "before_verify" else None
        try:
            for key in ("2xtp2pp1", "4xtp1pp1"):
                done = await runtime.ended(runtime.apply(plan_to(runtime, key)).ticket_id)
                assert done.phase is SwitchPhase.DONE
        finally:
            runtime.failpoint = lambda name: None
        assert [c.finish_reason async for c in stream][-1] == "abort"
        async with asyncio.timeout(20):
            while True:
                stats = runtime.snapshot().replicas
                if len(stats) == 4 and not any(s.kv_blocks_used for s in stats):
                    return
                await runtime.wait_for_change(0.1)

    engine.run(run(), 120)


def test_a_stale_plan_is_refused(engine: EngineCluster) -> None:
    runtime = engine.runtime
    plan = engine.on_loop(lambda: plan_to(runtime, "2xtp2pp1"))

    async def run() -> None:
        for key in ("2xtp2pp1", "4xtp1pp1"):
            await runtime.ended(runtime.apply(plan_to(runtime, key)).ticket_id)
        with pytest.raises(StaleEpochError, match="plan again"):
            runtime.apply(plan)

    engine.run(run(), 120)


def test_a_killed_worker_loses_no_request(open_engine: Any, references: list[Reference]) -> None:
    with open_engine("1xtp2pp1+2xtp1pp1") as cluster:
        runtime = cluster.runtime
        victim = runtime.deployment.replicas[0].placement.devices[1]

        def kill() -> None:
            os.kill(runtime._executor.pid(victim), signal.SIGKILL)

        def is_noticed() -> bool:
            return bool(runtime.deployment.key == "2xtp1pp1")

        work = serve_through_loss(runtime, references * 3, kill, is_noticed)
        outputs = cluster.run(work, 120)
        assert assert_identical(references * 3, outputs) == 0
        events = runtime.events(0).events
        ended_now = [e.outcome.status for e in events if e.outcome is not None]
        assert ended_now == [RequestStatus.FINISHED] * len(outputs)
        assert [e.device for e in events if e.kind is EventKind.DEVICE_LOST] == [victim]


def test_a_new_copy_forwards_what_it_received(
    open_engine: Any, references: list[Reference]
) -> None:
    """One replica becomes four: the plan has devices send on what came a moment before."""
    with open_engine("1xtp1pp1") as cluster:
        runtime = cluster.runtime
        for key in ("4xtp1pp1", "1xtp1pp1", "2xtp2pp1"):
            plan = cluster.on_loop(lambda key=key: plan_to(runtime, key))
            forwarding = {t.src for t in plan.transfers} - runtime.deployment.devices
            assert forwarding or key != "4xtp1pp1"
            outputs, ticket = cluster.run(serve(runtime, references, 3, plan, f"to-{key}"), 120)
            assert ticket is not None
            assert ticket.phase is SwitchPhase.DONE, ticket.reason
            assert ticket.moved_bytes >= plan.weight_bytes == plan.lower_bound_bytes
            assert assert_identical(references, outputs) == 0
