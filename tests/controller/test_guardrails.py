from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.guardrails import (
    RULES,
    UNDO_WAIVES,
    Circumstances,
    GuardrailConfig,
    guard_map,
    mask_reasons,
    review,
)
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    ParallelConfig,
    Routing,
    SwitchPhase,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster

FLYING = SwitchTicket("t", SwitchPhase.PREPARE, "a", "b", 0, 0.0, 0.0)
SNAPSHOT = ClusterSnapshot(
    9.0, 0, dense_deployment([ParallelConfig(1, 1)] * 4), Routing((0, 1, 2, 3)), (), None
)


def _candidate(key: str, headroom: float) -> Candidate:
    return Candidate(parse_deployment_key(key), "x", (), headroom, headroom, 1.0, 1, 0, 0.0, 0)


ROWS = (_candidate("4xtp1pp1", 1.5), _candidate("2xtp2pp1", 1.2), _candidate("1xtp4pp1", 0.9))


def _reasons(
    cluster: ProfiledCluster,
    rows: tuple[Candidate, ...] = ROWS,
    snapshot: ClusterSnapshot = SNAPSHOT,
    waived: frozenset[str] = frozenset(),
    **changes: Any,
) -> tuple[str, ...]:
    now = Circumstances(cluster.spec, snapshot, **changes)
    return mask_reasons(now, rows, GuardrailConfig(), waived)


def test_headroom_floor_holds_while_keep_is_above_it(synthetic_cluster: ProfiledCluster) -> None:
    assert _reasons(synthetic_cluster) == ("", "", "headroom")


def test_in_overload_what_is_no_worse_is_allowed(synthetic_cluster: ProfiledCluster) -> None:
    rows = (_candidate("4xtp1pp1", 0.7), _candidate("2xtp2pp1", 0.8), _candidate("1xtp4pp1", 0.5))
    assert _reasons(synthetic_cluster, rows) == ("", "", "headroom")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_stale": True}, "stale_metrics"),
        ({"not_now": ("dwell",)}, "dwell"),
        ({"not_now": ("hold", "dwell")}, "hold"),
        ({"snapshot": replace(SNAPSHOT, switch=FLYING)}, "switch_in_flight"),
    ],
)
def test_only_keep_is_legal(
    synthetic_cluster: ProfiledCluster, changes: dict[str, Any], reason: str
) -> None:
    assert _reasons(synthetic_cluster, **changes) == ("", reason, reason)


def test_what_does_not_fit_is_infeasible(synthetic_cluster: ProfiledCluster) -> None:
    lost = replace(SNAPSHOT, dead_devices=(3,))
    assert _reasons(synthetic_cluster, snapshot=lost)[1:] == ("infeasible", "infeasible")
    odd = (ROWS[0], _candidate("1xtp3pp1", 9.0), _candidate("5xtp1pp1", 9.0))
    assert _reasons(synthetic_cluster, odd) == ("", "infeasible", "infeasible")


def test_review_maps_vetoed_rows_to_keep() -> None:
    reasons = ("", "", "headroom")
    assert review(reasons, 1).executed == 1
    found = review(reasons, 2, [0.5, 0.2, 0.2, 0.1])
    assert (found.executed, found.vetoes) == (0, ("headroom",))
    assert found.propensity == pytest.approx(0.8)  # keep, the vetoed row and the empty row
    assert review(reasons, 1, [0.5, 0.2, 0.2, 0.1]).propensity == pytest.approx(0.2)
    assert review(reasons, 7).vetoes == ("no_such_candidate",)


# ------------------------------------------------------------------ each fires, and each is silent

SMALL, LARGE = ParallelConfig(1, 1), ParallelConfig(2, 1)
KEEP_4 = Candidate(parse_deployment_key("4xtp1pp1"), "keep", (), 1.5, 1.4, 1.0, 100, 0, 0.0, 0)


def _one(cluster: ProfiledCluster, candidate: Candidate, **changes: Any) -> str:
    keep = changes.pop("keep", KEEP_4)
    return _reasons(cluster, (keep, candidate), **changes)[1]


def _like_keep(key: str, **changes: Any) -> Candidate:
    return replace(KEEP_4, configs=parse_deployment_key(key), origin="x", **changes)


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ((3.0, 0.0), "coverage"),  # nothing for the second type
        ((3.0, 0.45), "coverage"),  # 2 x 0.45 of 1 per second
        ((3.0, 0.5), ""),
    ],
)
def test_coverage(
    synthetic_cluster: ProfiledCluster, rates: tuple[float, float], reason: str
) -> None:
    capacity = {SMALL: (2.0, 0.5), LARGE: rates}
    found = _one(synthetic_cluster, _like_keep("2xtp2pp1"), capacity=capacity, demand=(1.0, 1.0))
    assert found == reason


def test_coverage_asks_no_more_than_keep_has(synthetic_cluster: ProfiledCluster) -> None:
    """Of the second type keep takes 4 x 0.2 of 1 per second, or 3 x 0.2 with a dead replica."""
    capacity = {SMALL: (2.0, 0.2), LARGE: (3.0, 0.35)}
    changes: dict[str, Any] = {"capacity": capacity, "demand": (1.0, 1.0)}
    wanted = _like_keep("2xtp2pp1")
    assert _one(synthetic_cluster, wanted, **changes) == "coverage"
    assert _one(synthetic_cluster, wanted, dead=frozenset({1}), **changes) == ""
    assert _one(synthetic_cluster, wanted, capacity=capacity, demand=(1.0, 0.0)) == ""


def test_capacity_changes_by_half_the_pool_at_most(synthetic_cluster: ProfiledCluster) -> None:
    assert _one(synthetic_cluster, _like_keep("2xtp1pp1")) == ""
    assert _one(synthetic_cluster, _like_keep("1xtp1pp1")) == "capacity_change"
    one = replace(KEEP_4, configs=(SMALL,))
    assert _one(synthetic_cluster, _like_keep("4xtp1pp1"), keep=one) == "capacity_change"
    short = replace(one, headroom=0.6)  # what is short of capacity may grow at once
    assert _one(synthetic_cluster, _like_keep("4xtp1pp1"), keep=short) == ""


@pytest.mark.parametrize(
    ("headroom", "changed", "in_place", "reason"),
    [
        (1.25, 4, True, "transition"),  # a load of 0.8, and nothing would serve
        (1.25, 4, False, ""),  # live
        (2.5, 4, True, ""),  # a load of 0.4
        (1.7, 2, True, "transition"),  # 0.59, and half stays
        (1.7, 1, True, ""),  # three quarters stay
    ],
)
def test_transition(
    synthetic_cluster: ProfiledCluster, headroom: float, changed: int, in_place: bool, reason: str
) -> None:
    keep = replace(KEEP_4, headroom=headroom)
    wanted = _like_keep("2xtp2pp1", headroom=2.5, num_devices_changed=changed)
    assert _one(synthetic_cluster, wanted, keep=keep, is_in_place=lambda _: in_place) == reason


def test_a_pause_is_allowed_where_keep_fails_anyhow(synthetic_cluster: ProfiledCluster) -> None:
    keep = replace(KEEP_4, headroom=0.8)
    ways: dict[str, Any] = {"keep": keep, "is_in_place": lambda _: True}
    enough = _like_keep("2xtp2pp1", headroom=1.1, num_devices_changed=4)
    assert _one(synthetic_cluster, enough, **ways) == ""
    assert _one(synthetic_cluster, replace(enough, headroom=0.9), **ways) == "transition"


def test_disagreement_needs_all_that_the_planner_knows(synthetic_cluster: ProfiledCluster) -> None:
    worse = _like_keep("2xtp2pp1", headroom=1.1, headroom_q90=1.05, latency_s=1.3)
    assert _one(synthetic_cluster, worse) == "disagreement"
    for changes in (
        {"latency_s": 1.2},
        {"headroom": 1.3},
        {"headroom_q90": 1.3},
        {"kv_capacity_tokens": 101},
        {"configs": parse_deployment_key("1xtp2pp1")},  # gives devices back
    ):
        assert _one(synthetic_cluster, replace(worse, **changes)) == "", changes


def test_banned_deployments_only(synthetic_cluster: ProfiledCluster) -> None:
    rows = (ROWS[0], ROWS[1])
    assert _reasons(synthetic_cluster, rows, banned={"2xtp2pp1": "undone"}) == ("", "undone")
    assert _reasons(synthetic_cluster, rows, banned={"1xtp4pp1": "undone"}) == ("", "")


def test_an_undo_waives_pace_and_estimates_and_nothing_else(
    synthetic_cluster: ProfiledCluster,
) -> None:
    rows = (ROWS[0], ROWS[2])  # the second lacks headroom
    assert _reasons(synthetic_cluster, rows, not_now=("dwell",))[1] == "dwell"
    assert _reasons(synthetic_cluster, rows, waived=UNDO_WAIVES, not_now=("dwell",))[1] == ""
    for kept in ("switch_budget", "hold", "drift"):
        assert (
            _reasons(synthetic_cluster, rows, waived=UNDO_WAIVES, not_now=("dwell", kept))[1]
            == kept
        )
    assert (
        _reasons(synthetic_cluster, rows, waived=UNDO_WAIVES, is_stale=True)[1] == "stale_metrics"
    )


def test_the_first_rule_in_the_table_is_the_reason(synthetic_cluster: ProfiledCluster) -> None:
    """One candidate against which many rules stand: waiving one after another, their order."""
    names = [rule.name for rule in RULES]
    capacity = {SMALL: (2.0,)}
    wrong = _like_keep("5xtp2pp1", headroom=0.5, headroom_q90=0.5, latency_s=9.0)
    wrong = replace(wrong, num_devices_changed=4)
    keep = replace(KEEP_4, headroom=1.2)
    now = Circumstances(
        synthetic_cluster.spec,
        replace(SNAPSHOT, switch=FLYING),
        is_stale=True,
        not_now=("unobserved", "hold", "drift", "dwell", "switch_budget"),
        banned={wrong.key: "undone"},
        capacity=capacity,
        demand=(1.0,),
        is_in_place=lambda _: True,
    )
    waived: frozenset[str] = frozenset()
    seen = []
    while reason := mask_reasons(now, (keep, wrong), GuardrailConfig(), waived)[1]:
        seen.append(reason)
        waived |= {reason}
    assert seen == names


def test_the_guard_map_sends_vetoed_and_empty_rows_to_keep() -> None:
    assert guard_map(("", "headroom", ""), 5) == (0, 0, 2, 0, 0)
