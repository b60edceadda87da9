"""Holds, drift, bans and time-outs: each fires, and each is silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.breaker import Actor, BreakerConfig
from controller.drift import DriftWatch
from controller.oversight import Oversight, OversightConfig
from controller.switch_watch import Undo
from engine.cluster import (
    ClusterSnapshot,
    Routing,
    SwitchPhase,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError

FLYING = SwitchTicket("t1", SwitchPhase.TRANSFER, "4xtp1pp1", "1xtp4pp1", 0, 10.0, 11.0, "d1")
DONE = replace(FLYING, phase=SwitchPhase.DONE, updated_s=15.0)


def _snapshot(
    now_s: float, key: str = "4xtp1pp1", epoch: int = 0, ticket: SwitchTicket | None = None
) -> ClusterSnapshot:
    deployment = dense_deployment(parse_deployment_key(key))
    return ClusterSnapshot(now_s, epoch, deployment, Routing(()), (), ticket)


LOSS = Undo("t1", "4xtp1pp1", "1xtp4pp1", 0.9, 0.5)
AFTER = _snapshot(20.0, "1xtp4pp1", 1, DONE)


def test_our_own_switch_is_no_drift() -> None:
    watch = DriftWatch()
    assert watch.observe(_snapshot(5.0)) is None
    watch.expect("d1")
    assert watch.observe(_snapshot(12.0, ticket=FLYING)) is None
    assert watch.observe(AFTER) is None
    assert watch.observe(replace(AFTER, now_s=25.0)) is None


@pytest.mark.parametrize(
    ("ticket", "who", "wanted"),
    [
        (replace(DONE, decision_id=""), "by hand", True),
        (DONE, "by decision d1", True),  # another controller's
        (None, "by the engine", False),  # it healed itself
        (replace(DONE, phase=SwitchPhase.ROLLED_BACK), "by the engine", False),
    ],
)
def test_any_other_change_is_drift_once(
    ticket: SwitchTicket | None, who: str, wanted: bool
) -> None:
    watch = DriftWatch()
    watch.observe(_snapshot(5.0))
    found = watch.observe(replace(AFTER, switch=ticket))
    assert found is not None
    assert (found.from_key, found.to_key, found.who) == ("4xtp1pp1", "1xtp4pp1", who)
    assert found.is_wanted is wanted
    assert watch.observe(replace(AFTER, now_s=25.0, switch=ticket)) is None


def test_healing_after_our_switch_is_not_put_down_to_it() -> None:
    watch = DriftWatch()
    watch.expect("d1")
    watch.observe(_snapshot(5.0))
    assert watch.observe(AFTER) is None
    found = watch.observe(_snapshot(30.0, "2xtp2pp1", 2, DONE))
    assert found is not None
    assert found.who == "by the engine"


def test_drift_holds_the_controller_back_and_then_no_longer() -> None:
    oversight = Oversight(OversightConfig(drift_hold_s=100.0))
    oversight.observe(0.0, _snapshot(5.0), ())
    assert oversight.restraints(0.0).not_now == ()
    assert oversight.observe(15.0, AFTER, ()) is not None
    assert oversight.restraints(114.9).not_now == ("drift",)
    assert oversight.holds(114.9)[0].reason == "4xtp1pp1 -> 1xtp4pp1 by decision d1"
    assert oversight.restraints(115.0).not_now == ()


def test_drift_of_the_engine_itself_or_only_reported_holds_nothing() -> None:
    healed = Oversight(OversightConfig())
    healed.observe(0.0, _snapshot(5.0), ())
    assert healed.observe(15.0, replace(AFTER, switch=None), ()) is not None
    assert healed.restraints(15.0).not_now == ()
    told = Oversight(OversightConfig(drift_hold_s=0.0))
    told.observe(0.0, _snapshot(5.0), ())
    assert told.observe(15.0, AFTER, ()) is not None
    assert told.restraints(15.0).not_now == ()


def test_a_hold_expires_or_is_ended() -> None:
    oversight = Oversight(OversightConfig())
    held = oversight.hold(100.0, 60.0, "maintenance")
    assert (held.until_s, held.reason) == (160.0, "maintenance")
    assert oversight.restraints(159.0).not_now == ("hold",)
    assert oversight.restraints(160.0).not_now == ()
    oversight.hold(200.0, 60.0, "again")
    assert [h.reason for h in oversight.resume()] == ["again"]
    assert oversight.restraints(201.0).not_now == ()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 8 * 86400.0])
def test_a_hold_of_no_sensible_length_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="expected more than 0 and at most 604800"):
        Oversight(OversightConfig()).hold(0.0, seconds, "x")


def test_an_undone_deployment_is_banned_for_a_while() -> None:
    oversight = Oversight(OversightConfig(ban_s=100.0))
    oversight.observe(0.0, AFTER, ())
    oversight.take_back(0.0, LOSS)
    restraints = oversight.restraints(0.0)
    assert restraints.banned == {"1xtp4pp1": "undone"}
    assert "dwell" in restraints.waived
    oversight.observe(15.0, _snapshot(35.0, "4xtp1pp1", 2), ())  # it was taken back
    assert oversight.undo is None
    assert oversight.restraints(15.0).waived == frozenset()
    assert oversight.restraints(99.0).banned == {"1xtp4pp1": "undone"}
    assert oversight.restraints(100.0).banned == {}


def test_an_undo_that_other_rules_are_against_is_given_up() -> None:
    oversight = Oversight(OversightConfig(undo_patience_s=50.0))
    oversight.take_back(0.0, LOSS)
    oversight.observe(50.0, AFTER, ())
    assert oversight.undo is not None
    oversight.observe(51.0, AFTER, ())
    assert oversight.undo is None


def test_a_switch_far_beyond_its_time_is_named_once() -> None:
    oversight = Oversight(OversightConfig(switch_timeout_s=20.0))
    flying = replace(FLYING, predicted_s=2.0)  # started at 10 s: until 10 + 20 + 5 * 2
    assert oversight.overdue(_snapshot(40.0, ticket=flying)) is None
    assert oversight.overdue(_snapshot(40.1, ticket=flying)) is flying
    assert oversight.overdue(_snapshot(55.0, ticket=flying)) is None
    assert oversight.overdue(_snapshot(999.0, ticket=DONE)) is None
    assert oversight.overdue(_snapshot(999.0)) is None


def test_switches_that_fail_open_the_breaker_and_those_an_operator_ends_do_not() -> None:
    oversight = Oversight(OversightConfig(breaker=BreakerConfig(max_failures=2)))
    for phase in (SwitchPhase.DONE, SwitchPhase.CANCELLED, SwitchPhase.CANCELLED):
        oversight.ended(0.0, replace(DONE, phase=phase))
    assert oversight.actor(0.0) is Actor.POLICY
    for _ in range(2):
        oversight.ended(1.0, replace(DONE, phase=SwitchPhase.ROLLED_BACK, reason="lost a device"))
    assert oversight.actor(1.0) is Actor.RULE
    assert "switch t1 rolled_back: lost a device" in oversight.breaker.reason
