"""One transition under load: what it took, what it moved, what clients saw of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from engine.cluster import (
    Deployment,
    EventKind,
    KvCostParams,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
    parse_deployment_key,
)
from engine.facade import EngineCluster
from engine.messages import MoveWeights, Reply
from engine.migration.check import check_plan
from engine.migration.plan import plan_switch
from engine.runtime import EngineRuntime
from switching.load import Client, Load, percentile

SWITCH_TIMEOUT_S = 120.0
POLL_S = 0.02


@dataclass(slots=True)
class WeightTraffic:
    """Watches the calls that move weights: their span on the engine's clock, bytes sent."""

    start_s: float | None = None
    end_s: float = 0.0
    sent_bytes: int = 0

    def watch(self, runtime: EngineRuntime) -> None:
        """From now on, see every call of this runtime."""
        inner: Callable[..., Coroutine[Any, Any, Reply]] = runtime.call

        async def call(device: int, kind: type[Any], **fields: Any) -> Reply:
            if kind is not MoveWeights:
                return await inner(device, kind, **fields)
            self.start_s = runtime.now_s() if self.start_s is None else self.start_s
            reply = await inner(device, kind, **fields)
            self.end_s = runtime.now_s()
            self.sent_bytes += getattr(reply, "sent_bytes", 0)
            return reply

        runtime.call = call  # type: ignore[method-assign]

    def take(self) -> WeightTraffic:
        """What was seen since the last time."""
        seen = WeightTraffic(self.start_s, self.end_s, self.sent_bytes)
        self.start_s, self.end_s, self.sent_bytes = None, 0.0, 0
        return seen

    @property
    def makespan_s(self) -> float:
        return self.end_s - self.start_s if self.start_s is not None else 0.0


@dataclass(slots=True)
class Bench:
    """What the transitions of one run share."""

    cluster: EngineCluster
    load: Load
    folder: Path
    traffic: WeightTraffic
    kv: KvCostParams
    link_bytes_per_s: float
    cursor: int = 0

    @property
    def runtime(self) -> EngineRuntime:
        return self.cluster.runtime

    def plan(self, key: str) -> tuple[SwitchPlan, float]:
        """The plan to a deployment, checked, and the milliseconds that both took."""
        runtime = self.runtime
        spec = replace(runtime.spec, link_bytes_per_s=self.link_bytes_per_s)
        target = parse_deployment_key(key)
        start_s = time.perf_counter()
        plan = plan_switch(spec, runtime.deployment, runtime.epoch, target, self.kv)
        check_plan(spec, runtime.deployment, plan)
        return plan, 1e3 * (time.perf_counter() - start_s)


@dataclass(frozen=True, slots=True)
class Steady:
    """The load without a switch. Gaps in seconds, by replica."""

    start_s: float
    end_s: float
    tokens_per_s: float
    gaps_s: dict[int, list[float]]

    @property
    def step_s(self) -> float:
        """Median decode step: the gap between two tokens of a request."""
        return median(g for gaps in self.gaps_s.values() for g in gaps)

    def of(self, replica_ids: Collection[int]) -> list[float]:
        return [g for r in replica_ids for g in self.gaps_s.get(r, [])]


def observe(bench: Bench, seconds: float) -> Steady:
    """Let the load run for so long."""
    now_s = bench.runtime.now_s
    start_s = now_s()
    time.sleep(seconds)
    end_s = now_s()

    def read() -> Steady:
        gaps: dict[int, list[float]] = {}
        for gap in bench.load.gaps(start_s, end_s):
            gaps.setdefault(gap.replica_id, []).append(gap.seconds)
        tokens = bench.load.num_tokens(start_s, end_s)
        return Steady(start_s, end_s, tokens / (end_s - start_s), gaps)

    return bench.cluster.on_loop(read)


@dataclass(slots=True)
class Passage:
    """A transition by whatever means. Times on the engine's clock, gaps in seconds."""

    command_s: float
    commit_s: float = 0.0
    done_s: float = 0.0
    next_token_s: float = 0.0  # when the last affected request had its next one
    num_affected: int = 0
    pauses_s: list[float] = field(default_factory=list)  # affected: the gap during which it moved
    gaps_affected_s: list[float] = field(default_factory=list)  # all their gaps until then
    gaps_unaffected_s: list[float] = field(default_factory=list)
    num_tokens: int = 0  # that clients got from the command to `end_s`
    ticket: SwitchTicket | None = None

    @property
    def seconds(self) -> float:
        """From the command until the last affected request has its next token."""
        return (self.next_token_s or self.done_s) - self.command_s

    @property
    def end_s(self) -> float:
        return max(self.done_s, self.next_token_s)


def switch_live(bench: Bench, plan: SwitchPlan) -> Passage:
    """Carry the plan out as a live switch."""
    bench.cursor = bench.cluster.events(bench.cursor).next_cursor

    async def work(passage: Passage) -> None:
        runtime = bench.runtime
        passage.ticket = await runtime.ended(runtime.apply(plan).ticket_id)
        passage.done_s = runtime.now_s()
        batch = runtime.events(bench.cursor)
        passage.commit_s = min(
            (
                event.at_s
                for event in batch.events
                if event.kind is EventKind.SWITCH
                and event.ticket is not None
                and event.ticket.phase is SwitchPhase.COMMIT
            ),
            default=passage.done_s,
        )

    passage = _pass(bench, plan.target, work)
    assert passage.ticket is not None
    if passage.ticket.phase is not SwitchPhase.DONE:
        raise RuntimeError(f"the switch to {plan.target.key} ended as {passage.ticket}")
    return passage


def pass_by(
    bench: Bench, target: Deployment, work: Callable[[], Coroutine[Any, Any, None]]
) -> Passage:
    """Carry a transition out by `work`, which ends with the commit."""

    async def timed(passage: Passage) -> None:
        await work()
        passage.commit_s = passage.done_s = bench.runtime.now_s()

    return _pass(bench, target, timed)


def _pass(
    bench: Bench,
    target: Deployment,
    work: Callable[[Passage], Coroutine[Any, Any, None]],
) -> Passage:
    load, before = bench.load, bench.runtime.deployment
    kept = {r.replica_id for r in before.replicas if r in target.replicas}
    leaving = {r.replica_id for r in before.replicas} - kept

    async def run() -> Passage:
        passage = Passage(bench.runtime.now_s())
        affected = load.on_replicas(leaving)
        await work(passage)
        while waiting := [c for c in affected if c.awaits_token(leaving)]:
            if bench.runtime.now_s() > passage.commit_s + SWITCH_TIMEOUT_S:
                raise RuntimeError(f"no token for {[c.request_id for c in waiting]}")
            await asyncio.sleep(POLL_S)
        _read_gaps(load, passage, affected, leaving, kept)
        return passage

    return bench.cluster.run(run(), 2 * SWITCH_TIMEOUT_S)


def _read_gaps(
    load: Load,
    passage: Passage,
    affected: list[Client],
    leaving: Collection[int],
    kept: Collection[int],
) -> None:
    """A request has moved when its next token comes from another replica: by that, and not by the
    time at which the commit is told, is its gap found."""
    nexts = [c.first_token_s(passage.command_s, leaving) for c in affected]
    passage.num_affected = sum(n is not None for n in nexts)
    passage.next_token_s = max((n for n in nexts if n is not None), default=0.0)
    for gap in load.gaps(passage.command_s, passage.end_s):
        if gap.replica_id in kept:
            passage.gaps_unaffected_s.append(gap.seconds)
        elif gap.replica_id in leaving:
            passage.gaps_affected_s.append(gap.seconds)
            if gap.next_replica_id not in leaving:
                passage.pauses_s.append(gap.seconds)
    passage.num_tokens = load.num_tokens(passage.command_s, passage.end_s)


def spread(values: list[float]) -> dict[str, float | None]:
    """p50, p99 and largest of some seconds; None without any."""
    if not values:
        return {"p50": None, "p99": None, "max": None}
    return {
        "p50": percentile(values, 50),
        "p99": percentile(values, 99),
        "max": max(values),
    }
