"""Guardrails with a memory, in a loop over the surrogate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from steered import CONFIG, GRID_S, INITIAL, Even, build_loop, close, drive, start

from controller.breaker import BreakerConfig
from controller.decision import plan_to
from controller.decision_log import read_log
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.oversight import Oversight, OversightConfig
from controller.records import Mode
from controller.switch_watch import WatchConfig
from engine.cluster import (
    ClusterSnapshot,
    EventBatch,
    SwitchPhase,
    SwitchTicket,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Observation
from policies.baselines import KeepPolicy, StaticPolicy

MakeLoop = Callable[..., ControlLoop]


@pytest.fixture
def make_loop(synthetic_cluster: ProfiledCluster) -> Iterator[MakeLoop]:
    made: list[ControlLoop] = []

    def build(cluster: Any, policy: Any, **options: Any) -> ControlLoop:
        made.append(build_loop(synthetic_cluster, cluster, policy, **options))
        return made[-1]

    yield build
    for loop in made:
        close(loop)


def reasons(loop: ControlLoop) -> list[set[str]]:
    """Per tick, the mask reasons of all rows but keep."""
    return [{c.mask_reason for c in r.candidates[1:]} for r in loop.records]


class Late:
    """No valid answer until it is mended."""

    name = "late"
    is_mended = False

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        if not self.is_mended:
            raise RuntimeError("made to fail")
        return np.eye(1, len(observation.mask), 0)[0]


class Slowed(SurrogateCluster):
    """Every request that arrives after the first switch waits ten seconds more for its tokens."""

    since_s = float("inf")

    def events(self, cursor: int) -> EventBatch:
        batch = super().events(cursor)
        return replace(batch, events=tuple(map(self._slowed, batch.events)))

    def _slowed(self, event: Any) -> Any:
        if event.ticket is not None and event.ticket.phase is SwitchPhase.DONE:
            self.since_s = min(self.since_s, event.ticket.updated_s)
        outcome = event.outcome
        if outcome is None or outcome.arrival_s < self.since_s or outcome.first_token_s is None:
            return event
        return replace(event, outcome=replace(outcome, first_token_s=outcome.first_token_s + 10.0))


class Stuck(SurrogateCluster):
    """A switch never gets anywhere, and is told to end."""

    cancelled: tuple[str, ...] = ()

    def snapshot(self) -> ClusterSnapshot:
        snapshot = super().snapshot()
        stuck = SwitchTicket("t9", SwitchPhase.TRANSFER, "a", "b", 0, 0.0, 1.0, predicted_s=1.0)
        return snapshot if self.cancelled else replace(snapshot, switch=stuck)

    def cancel(self, ticket_id: str) -> SwitchTicket:
        self.cancelled = (*self.cancelled, ticket_id)
        return SwitchTicket(ticket_id, SwitchPhase.CANCELLED, "a", "b", 0, 0.0, 1.0)


def test_a_switch_that_costs_goodput_is_taken_back_and_not_made_again(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = Slowed(synthetic_cluster, INITIAL)
    oversight = Oversight(OversightConfig(watch=WatchConfig(num_ticks=2, min_requests=4)))
    config = replace(CONFIG, min_dwell_s=60.0)
    static = StaticPolicy("2xtp2pp1")
    log = tmp_path / "log"
    loop = make_loop(cluster, static, oversight=oversight, config=config, log=log)
    drive(cluster, loop, 30, per_tick=20)
    keys = [r.deployment_key for r in loop.records]
    first = keys.index("2xtp2pp1")
    back = keys.index("4xtp1pp1", first)
    assert (back - first) * GRID_S < config.min_dwell_s  # an undo does not wait for it
    assert set(keys[back:]) == {"4xtp1pp1"}
    (undo,) = [r for r in loop.records if r.policy == "undo"]
    assert undo.executed_key == "4xtp1pp1"
    assert undo.notes[0].startswith("undo: goodput 0.")
    assert loop.counters.num_undone == 1
    later = {c.key: c.mask_reason for c in loop.records[-1].candidates}
    assert later["2xtp2pp1"] == "undone"
    loop.log.close()
    decisions = [r for r in read_log(log).records if r["record"] == "decision"]
    assert [r["propensity"] for r in decisions if r["policy"] == "undo"] == [1.0]


def test_a_switch_that_costs_nothing_stays(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = start(synthetic_cluster)
    oversight = Oversight(OversightConfig(watch=WatchConfig(num_ticks=2, min_requests=4)))
    loop = make_loop(cluster, StaticPolicy("2xtp2pp1"), oversight=oversight)
    drive(cluster, loop, 20, per_tick=20)
    assert loop.records[-1].deployment_key == "2xtp2pp1"
    assert loop.counters.num_undone == 0


def test_a_switch_by_hand_is_reported_and_not_fought(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = start(synthetic_cluster)
    oversight = Oversight(OversightConfig(drift_hold_s=40.0))
    loop = make_loop(cluster, StaticPolicy("4xtp1pp1"), oversight=oversight)
    drive(cluster, loop, 2)
    target = parse_deployment_key("2xtp2pp1")
    cluster.apply(plan_to(synthetic_cluster, cluster.snapshot(), target, ""))
    drive(cluster, loop, 14)
    assert loop.counters.num_drifts == 1
    notes = [note for r in loop.records for note in r.notes]
    assert notes == ["drift: 4xtp1pp1 -> 2xtp2pp1 by hand"]
    drifted = next(i for i, r in enumerate(loop.records) if r.notes)
    assert reasons(loop)[drifted : drifted + 8] == [{"drift"}] * 8
    assert "drift" not in reasons(loop)[drifted + 8]
    assert {r.deployment_key for r in list(loop.records)[drifted : drifted + 8]} == {"2xtp2pp1"}


@pytest.mark.parametrize("way", ["past the controller", "through it"])
def test_what_somebody_wanted_is_not_undone_though_it_costs_goodput(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, way: str
) -> None:
    cluster = Slowed(synthetic_cluster, INITIAL)
    watch = WatchConfig(num_ticks=2, min_requests=4)
    oversight = Oversight(OversightConfig(watch=watch, drift_hold_s=0.0))
    loop = make_loop(cluster, KeepPolicy(), oversight=oversight)
    drive(cluster, loop, 8, per_tick=20)
    if way == "through it":
        assert Operations(loop).propose("2xtp2pp1", dry_run=False).ticket is not None
    else:
        target = parse_deployment_key("2xtp2pp1")
        cluster.apply(plan_to(synthetic_cluster, cluster.snapshot(), target, ""))
    drive(cluster, loop, 20, per_tick=20)
    assert loop.records[-1].deployment_key == "2xtp2pp1"
    assert loop.counters.num_undone == 0


def test_its_own_switches_are_no_drift(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, Even())
    drive(cluster, loop, 20)
    assert loop.counters.num_switches_done > 0
    assert loop.counters.num_drifts == 0


def test_held_it_switches_nothing_and_afterwards_it_does(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, StaticPolicy("2xtp2pp1"))
    Operations(loop).hold(4 * GRID_S, "maintenance")
    drive(cluster, loop, 6)
    assert reasons(loop)[:3] == [{"hold"}] * 3
    assert loop.records[2].deployment_key == "4xtp1pp1"
    assert loop.records[-1].deployment_key == "2xtp2pp1"


def test_a_policy_that_fails_is_left_for_the_rule_then_the_safe_plan_and_tried_again(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster, policy, rule = start(synthetic_cluster), Late(), Late()
    rule.name = "rule"  # type: ignore[misc]
    config = BreakerConfig(max_failures=2, cool_down_s=4 * GRID_S, num_trials=1)
    oversight = Oversight(OversightConfig(breaker=config))
    loop = make_loop(cluster, policy, oversight=oversight, rule=rule, safe=StaticPolicy("2xtp2pp1"))
    drive(cluster, loop, 7)
    assert [r.reason.split(":")[0] for r in loop.records] == ["fallback"] * 2 + ["breaker"] * 5
    assert [r.policy for r in loop.records] == ["keep"] * 4 + ["static 2xtp2pp1"] * 3
    assert loop.records[-1].deployment_key == "2xtp2pp1"
    policy.is_mended = rule.is_mended = True
    drive(cluster, loop, 10)
    assert loop.records[-1].policy == "late"
    assert loop.records[-1].reason.startswith("keep")
    assert oversight.breaker.state == "closed"


def test_switches_that_are_rolled_back_open_the_breaker(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = SurrogateCluster(synthetic_cluster, INITIAL, rollback_probability=1.0)
    oversight = Oversight(OversightConfig(breaker=BreakerConfig(max_failures=2)))
    loop = make_loop(cluster, StaticPolicy("2xtp2pp1"), oversight=oversight)
    drive(cluster, loop, 20)
    assert loop.counters.num_switches_failed == 2
    assert loop.counters.num_drifts == 0
    assert loop.records[-1].reason == "breaker: rule decides"


def test_a_switch_far_beyond_its_time_is_cancelled_once(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = Stuck(synthetic_cluster, INITIAL)
    oversight = Oversight(OversightConfig(switch_timeout_s=12.0))
    loop = make_loop(cluster, KeepPolicy(), oversight=oversight, log=tmp_path / "log")
    drive(cluster, loop, 3)
    assert cluster.cancelled == ()
    drive(cluster, loop, 3)
    assert cluster.cancelled == ("t9",)
    assert loop.counters.num_timeouts == 1
    loop.log.close()
    events = [r["event"] for r in read_log(tmp_path / "log").records if r["record"] == "switch"]
    assert events == ["timeout"]


def test_in_advisory_mode_nothing_is_cancelled_or_undone(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = Stuck(synthetic_cluster, INITIAL)
    oversight = Oversight(OversightConfig(switch_timeout_s=12.0))
    loop = make_loop(cluster, KeepPolicy(), oversight=oversight)
    loop.mode = Mode.ADVISORY
    drive(cluster, loop, 6)
    assert cluster.cancelled == ()


def test_the_clock_of_holds_is_the_controllers_own(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    """The engine is started again, its clock goes back, and a hold does not get longer."""
    first = start(synthetic_cluster)
    loop = make_loop(first, StaticPolicy("2xtp2pp1"))
    Operations(loop).hold(5 * GRID_S, "maintenance")
    drive(first, loop, 3)
    second = start(synthetic_cluster)
    loop.cluster = second
    drive(second, loop, 3)
    assert loop.counters.num_restarts == 1
    assert [r == {"hold"} for r in reasons(loop)] == [True] * 4 + [False] * 2
