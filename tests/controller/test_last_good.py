"""What a replica last reported stands in for what is missing or no number, and ages visibly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.decision import DecisionConfig, DecisionPipeline
from controller.last_good import LastGood, is_good
from controller.predictor import EwmaPredictor
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    EventKind,
    ReplicaStats,
    Routing,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster

NAN = float("nan")
DEPLOYMENT = dense_deployment(parse_deployment_key("4xtp1pp1"))
FIELDS = ("num_running", "num_waiting", "waiting_prompt_tokens", "kv_blocks_used", "measured_at_s")


def _stats(replica: int, now_s: float, waiting: int = 3) -> ReplicaStats:
    return ReplicaStats(replica, now_s, 2, waiting, 50, 300, 200, 20, 0, 0)


def _snapshot(now_s: float, stats: tuple[ReplicaStats, ...]) -> ClusterSnapshot:
    return ClusterSnapshot(now_s, 3, DEPLOYMENT, Routing((0, 1, 2, 3)), stats, None)


def _full(now_s: float) -> ClusterSnapshot:
    return _snapshot(now_s, tuple(_stats(i, now_s) for i in range(4)))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [NAN, float("inf"), -1])
def test_what_is_no_number_is_not_good(name: str, value: float) -> None:
    bad = replace(_stats(0, 5.0), **{name: value})  # type: ignore[arg-type]
    assert not is_good(bad) or (name == "measured_at_s" and value == -1)
    assert is_good(_stats(0, 5.0))


def test_good_snapshots_pass_as_they_are() -> None:
    snapshot = _full(5.0)
    assert LastGood().fill(snapshot) is snapshot


def test_the_last_good_measurement_stands_with_its_own_time() -> None:
    last = LastGood()
    last.fill(_full(5.0))
    broken = replace(_stats(1, 20.0), num_waiting=NAN)  # type: ignore[arg-type]
    filled = last.fill(_snapshot(20.0, (_stats(0, 20.0, 9), broken, _stats(2, 20.0))))
    found = {s.replica_id: (s.measured_at_s, s.num_waiting) for s in filled.replicas}
    assert found == {0: (20.0, 9), 1: (5.0, 3), 2: (20.0, 3), 3: (5.0, 3)}
    again = {s.replica_id: s.measured_at_s for s in last.fill(_snapshot(35.0, ())).replicas}
    assert again == {0: 20.0, 1: 5.0, 2: 20.0, 3: 5.0}


def test_what_never_was_good_is_missing_and_a_dead_replica_stays_dead() -> None:
    last = LastGood()
    first = last.fill(_snapshot(5.0, (_stats(0, 5.0),)))
    assert [s.replica_id for s in first.replicas] == [0]
    dead = replace(_stats(0, NAN), alive=False)
    assert [s.alive for s in last.fill(_snapshot(9.0, (dead,))).replicas] == [False]
    last.reset()
    assert last.fill(_snapshot(12.0, ())).replicas == ()


def test_a_snapshot_of_no_time_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="of nan s"):
        LastGood().fill(_full(NAN))


def _arrivals(start_s: float, number: int) -> list[ClusterEvent]:
    times = [start_s + 15.0 * i / number for i in range(number)]
    return [
        ClusterEvent(i, t, EventKind.ARRIVED, arrival=Arrival(f"r{t}", t, 60))
        for i, t in enumerate(times)
    ]


def test_an_outage_is_never_read_as_no_load(
    synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping
) -> None:
    """Figures go missing for four decisions: load and forecast stand, only keep is legal, and
    all is as before when they are back."""
    config = DecisionConfig()
    pipeline = DecisionPipeline(synthetic_cluster, four_types, config, EwmaPredictor(4))
    for tick in range(1, 5):
        pipeline.observe(_arrivals(15.0 * (tick - 1), 60))
        before = pipeline.prepare(_full(15.0 * tick))
    assert set(before.mask_reasons[1:]) != {"stale_metrics"}
    for tick in range(5, 9):
        pipeline.observe([], num_lost=60)  # the engine's log was too short, too
        during = pipeline.prepare(_snapshot(15.0 * tick, ()))
        assert during.monitor_state.num_waiting == 12
        assert during.monitor_state.is_stale
        assert during.forecast.mean == before.forecast.mean
        assert set(during.mask_reasons[1:]) == {"stale_metrics"}
    pipeline.observe(_arrivals(120.0, 60))
    after = pipeline.prepare(_full(135.0))
    assert set(after.mask_reasons[1:]) != {"stale_metrics"}
    assert sum(after.forecast.mean) == pytest.approx(sum(before.forecast.mean), rel=0.1)


def test_events_lost_hold_the_decision_though_the_snapshot_is_fresh(
    synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping
) -> None:
    pipeline = DecisionPipeline(synthetic_cluster, four_types, DecisionConfig(), EwmaPredictor(4))
    pipeline.observe(_arrivals(0.0, 60))
    pipeline.prepare(_full(15.0))
    pipeline.observe(_arrivals(15.0, 5), num_lost=1)
    assert set(pipeline.prepare(_full(30.0)).mask_reasons[1:]) == {"stale_metrics"}
    pipeline.observe(_arrivals(30.0, 60))
    assert "stale_metrics" not in pipeline.prepare(_full(45.0)).mask_reasons
