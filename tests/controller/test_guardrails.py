from __future__ import annotations

from dataclasses import replace

import pytest

from controller.guardrails import GuardrailConfig, mask_reasons, review
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
    is_stale: bool = False,
    not_now: str = "",
) -> tuple[str, ...]:
    return mask_reasons(cluster.spec, snapshot, rows, is_stale, not_now, GuardrailConfig())


def test_headroom_floor_holds_while_keep_is_above_it(synthetic_cluster: ProfiledCluster) -> None:
    assert _reasons(synthetic_cluster) == ("", "", "headroom")


def test_in_overload_what_is_no_worse_is_allowed(synthetic_cluster: ProfiledCluster) -> None:
    rows = (_candidate("4xtp1pp1", 0.7), _candidate("2xtp2pp1", 0.8), _candidate("1xtp4pp1", 0.5))
    assert _reasons(synthetic_cluster, rows) == ("", "", "headroom")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_stale": True}, "stale_metrics"),
        ({"not_now": "dwell"}, "dwell"),
        ({"snapshot": replace(SNAPSHOT, switch=FLYING)}, "switch_in_flight"),
    ],
)
def test_only_keep_is_legal(
    synthetic_cluster: ProfiledCluster, changes: dict[str, object], reason: str
) -> None:
    assert _reasons(synthetic_cluster, **changes) == ("", reason, reason)  # type: ignore[arg-type]


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
