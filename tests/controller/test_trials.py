"""Shadows, a canary and advisory mode in a loop over the surrogate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from steered import INITIAL, Even, build_loop, close, drive, start

from controller.canary import CanaryConfig
from controller.decision_log import read_log
from controller.loop import ControlLoop
from controller.records import Mode, TickRecord
from controller.roster import LoadedPolicy, PolicyInfo
from engine.cluster import Routing, SloSpec
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Observation
from policies.baselines import KeepPolicy, StaticPolicy

MakeLoop = Callable[..., ControlLoop]


def loaded(policy: Any) -> LoadedPolicy:
    return LoadedPolicy(PolicyInfo(policy.name, "rule"), policy)


@pytest.fixture
def make_loop(synthetic_cluster: ProfiledCluster) -> Iterator[MakeLoop]:
    made: list[ControlLoop] = []

    def build(cluster: Any, policy: Any, **options: Any) -> ControlLoop:
        made.append(build_loop(synthetic_cluster, cluster, policy, **options))
        return made[-1]

    yield build
    for loop in made:
        loop.trials.close()
        close(loop)


class Failing:
    name = "failing"

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        raise RuntimeError("made to fail")


class NoRouting(SurrogateCluster):
    """Says so when somebody steers it."""

    num_routings = 0

    def set_routing(self, routing: Routing) -> None:
        self.num_routings += 1
        super().set_routing(routing)


def test_advisory_decides_as_active_does_and_does_nothing(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    """Until the first switch both see the same, and decide the same to the last bit."""
    ran: dict[Mode, list[TickRecord]] = {}
    for mode in (Mode.ACTIVE, Mode.ADVISORY):
        cluster = NoRouting(synthetic_cluster, INITIAL)
        loop = make_loop(cluster, Even())
        loop.mode = mode
        drive(cluster, loop, 10)
        ran[mode] = list(loop.records)
    active, advisory = ran[Mode.ACTIVE], ran[Mode.ADVISORY]
    first = next(i for i, r in enumerate(active) if r.ticket is not None)
    same = {"mode": Mode.ACTIVE, "ticket": None, "tick_s": 0.0}
    for one, other in zip(active[: first + 1], advisory[: first + 1], strict=True):
        assert replace(one, **same) == replace(other, **same)  # type: ignore[arg-type]
    assert {r.deployment_key for r in advisory} == {"4xtp1pp1"}
    assert {r.ticket for r in advisory} == {None}
    assert cluster.num_routings == 0


def test_shadows_are_asked_at_the_same_ticks_and_decide_nothing(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, KeepPolicy(), log=tmp_path / "log")
    for policy in (Even(), StaticPolicy("2xtp2pp1"), Failing()):
        loop.trials.add_shadow(loaded(policy))
    drive(cluster, loop, 4)
    assert {r.deployment_key for r in loop.records} == {"4xtp1pp1"}
    assert loop.counters.num_fallbacks == 0
    loop.log.close()
    records = read_log(tmp_path / "log").records
    decisions = [r for r in records if r["record"] == "decision"]
    shadows = [r for r in records if r["record"] == "shadow"]
    assert [r["decision_id"] for r in shadows] == [r["decision_id"] for r in decisions]
    for decision, shadow in zip(decisions, shadows, strict=True):
        told = shadow["policies"]
        legal = np.array(decision["mask"], float)
        np.testing.assert_allclose(told["even"]["probabilities"], legal / legal.sum())
        assert told["failing"] == {"problem": "RuntimeError: made to fail"}
        keys = [c["key"] for c in decision["candidates"]]
        assert keys[0] == decision["executed_key"]
        assert told["static 2xtp2pp1"]["key"] == "2xtp2pp1"


def test_a_canary_decides_in_its_blocks_and_the_active_policy_in_the_others(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, StaticPolicy("4xtp1pp1"), log=tmp_path / "log")
    config = CanaryConfig(0.5, min_block_s=30.0, max_block_s=40.0, burn_in_s=5.0)
    drive(cluster, loop, 1)
    canary = loaded(StaticPolicy("2xtp2pp1"))
    loop.trials.begin_canary(canary, config, SloSpec(100.0, 100.0), cluster.snapshot().now_s)
    drive(cluster, loop, 60)
    decided = [(r.arm, r.policy) for r in list(loop.records)[1:]]
    assert set(decided) == {("active", "static 4xtp1pp1"), ("canary", "static 2xtp2pp1")}
    assert {r.deployment_key for r in loop.records} == {"4xtp1pp1", "2xtp2pp1"}
    assert loop.trials.canary is not None
    assert len(loop.trials.canary.blocks) > 3
    loop.log.close()
    decisions = [r for r in read_log(tmp_path / "log").records if r["record"] == "decision"]
    assert [r["arm"] for r in decisions] == ["", *(arm for arm, _ in decided)]
    loop.trials.end_canary()
    drive(cluster, loop, 1)
    assert loop.records[-1].arm == ""


def test_a_canary_that_fails_is_rolled_back_and_the_breaker_stays_closed(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, Even())
    config = CanaryConfig(0.999)
    loop.trials.begin_canary(loaded(Failing()), config, SloSpec(), 0.0)
    drive(cluster, loop, 6)
    assert [r.policy for r in loop.records] == ["keep"] * 3 + ["even"] * 3
    notes = [note for r in loop.records for note in r.notes]
    assert len(notes) == 1
    assert notes[0].startswith("canary failing is rolled back: 3 failures, the last: failing Run")
    assert loop.oversight.breaker.state == "closed"


def test_a_canary_that_serves_far_worse_is_rolled_back(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    """Its blocks are those in which nothing meets the targets, by way of the outcomes."""
    loop_of: list[ControlLoop] = []

    class Worse(SurrogateCluster):
        def events(self, cursor: int) -> Any:
            batch = super().events(cursor)
            if not loop_of or loop_of[0].trials.arm != "canary":
                return batch
            late = [
                replace(e, outcome=replace(e.outcome, first_token_s=e.outcome.first_token_s + 50))
                if e.outcome is not None and e.outcome.first_token_s is not None
                else e
                for e in batch.events
            ]
            return replace(batch, events=tuple(late))

    cluster = Worse(synthetic_cluster, INITIAL)
    loop = make_loop(cluster, KeepPolicy())
    loop_of.append(loop)
    config = CanaryConfig(0.5, min_block_s=30.0, max_block_s=40.0, burn_in_s=5.0)
    loop.trials.begin_canary(loaded(KeepPolicy()), config, SloSpec(20.0, 0.0), 0.0)
    drive(cluster, loop, 120)
    assert loop.trials.canary is None
    notes = [note for r in loop.records for note in r.notes]
    assert len(notes) == 1
    assert notes[0].startswith("canary keep is rolled back: goodput 0.")
