from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.decision import DecisionConfig, DecisionPipeline, PreparedDecision
from controller.predictor import EwmaPredictor
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    EventKind,
    ParallelConfig,
    ReplicaStats,
    Routing,
    SwitchPhase,
    SwitchTicket,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from engine.router import ReplicaLoad, shares

BuildPipeline = Callable[[], DecisionPipeline]


@pytest.fixture
def build_pipeline(synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping) -> BuildPipeline:
    def build() -> DecisionPipeline:
        return DecisionPipeline(
            synthetic_cluster,
            four_types,
            DecisionConfig(),
            EwmaPredictor(4),
            [ParallelConfig(1, 1)] * 4,
        )

    return build


def _snapshot(now_s: float, key: str = "4xtp1pp1", **changes: object) -> ClusterSnapshot:
    deployment = dense_deployment(parse_deployment_key(key))
    ids = tuple(r.replica_id for r in deployment.replicas)
    stats = tuple(ReplicaStats(i, now_s, 2, 0, 0, 300, 200, 20, 0, 0) for i in ids)
    snapshot = ClusterSnapshot(now_s, 3, deployment, Routing(ids), stats, None)
    return replace(snapshot, **changes)  # type: ignore[arg-type]


def _arrivals(start_s: float, seconds: float, per_s: float, seed: int) -> list[ClusterEvent]:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(start_s, start_s + seconds, rng.poisson(per_s * seconds)))
    lengths = np.exp(rng.normal(4.5, 1.2, len(times))).astype(int) + 1
    return [
        ClusterEvent(i, t, EventKind.ARRIVED, arrival=Arrival(f"r{i}", t, int(p)))
        for i, (t, p) in enumerate(zip(times.tolist(), lengths, strict=True))
    ]


def _run(pipeline: DecisionPipeline, ticks: int = 5, per_s: float = 3.0) -> list[PreparedDecision]:
    prepared = []
    for tick in range(ticks):
        pipeline.observe(_arrivals(15.0 * tick, 15.0, per_s, tick))
        prepared.append(pipeline.prepare(_snapshot(15.0 * (tick + 1))))
    return prepared


def test_same_input_same_bytes(build_pipeline: BuildPipeline) -> None:
    """Two pipelines, one with warm caches, agree to the last bit; so do their decisions."""
    warm = build_pipeline()
    _run(warm, 7, 9.0)
    warm.reset(0.0)
    cold = build_pipeline()
    for one, other in zip(_run(warm), _run(cold), strict=True):
        assert one.observation.flat().tobytes() == other.observation.flat().tobytes()
        assert one.candidates == other.candidates
        assert warm.resolve(one, 1) == cold.resolve(other, 1)


def test_forecast_follows_the_arrivals(build_pipeline: BuildPipeline) -> None:
    last = _run(build_pipeline(), 12, 5.0)[-1]
    assert sum(last.forecast.mean) == pytest.approx(5.0, rel=0.2)
    assert all(c.headroom_q90 <= c.headroom for c in last.candidates)


def test_keep_makes_no_plan(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    decision = pipeline.resolve(_run(pipeline)[-1], 0, policy_name="keep")
    assert decision.plan is None
    assert decision.executed_key == decision.chosen_key == "4xtp1pp1"
    assert (decision.propensity, decision.vetoes) == (1.0, ())


def test_a_switch_is_planned_for_the_present_epoch(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    prepared = _run(pipeline)[-1]
    probabilities = np.zeros(12)
    probabilities[:2] = 0.25, 0.75
    decision = pipeline.resolve(prepared, 1, probabilities, "ppo")
    assert decision.plan is not None
    assert decision.plan.target.key == decision.executed_key == prepared.candidates[1].key
    assert decision.plan.expected_epoch == 3
    assert decision.plan.decision_id == decision.decision_id
    assert decision.propensity == 0.75
    assert decision.plan.predicted_s == pytest.approx(prepared.candidates[1].switch_s)
    assert decision.plan.kv.prefill_tokens_per_s > 0


def test_ids_differ_within_a_run(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    ids = [pipeline.resolve(p, 0).decision_id for p in _run(pipeline)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"replicas": ()}, "stale_metrics"),
        ({"switch": SwitchTicket("t", SwitchPhase.TRANSFER, "a", "b", 0, 70.0, 71.0)}, "switch_in"),
        ({"switch": SwitchTicket("t", SwitchPhase.DONE, "a", "b", 0, 70.0, 71.0)}, "dwell"),
    ],
)
def test_only_keep_is_legal_and_executed(
    build_pipeline: BuildPipeline, changes: dict[str, object], reason: str
) -> None:
    pipeline = build_pipeline()
    _run(pipeline, 4)
    prepared = pipeline.prepare(_snapshot(75.0, **changes))
    assert prepared.observation.mask.tolist() == [True] + [False] * 11
    decision = pipeline.resolve(prepared, 1, np.full(12, 1 / 12))
    assert decision.plan is None
    assert decision.executed_key == "4xtp1pp1"
    assert decision.vetoes[0].startswith(reason)
    assert decision.propensity == pytest.approx(1.0)


def test_undo_names_the_deployment_before(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    _run(pipeline, 2)
    rows = pipeline.prepare(_snapshot(45.0, "1xtp2pp1+2xtp1pp1")).candidates
    assert "undo" in next(c.origin for c in rows if c.key == "4xtp1pp1").split("+")


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.0, 60.0),
    st.sampled_from(["4xtp1pp1", "1xtp2pp1+2xtp1pp1", "1xtp4pp1", "1xtp1pp3+1xtp1pp1"]),
    st.sets(st.integers(0, 3), max_size=3),
    st.integers(0, 11),
)
def test_whatever_comes_a_legal_decision_goes_out(
    synthetic_cluster: ProfiledCluster,
    four_types: WorkloadTyping,
    per_s: float,
    key: str,
    dead: set[int],
    action: int,
) -> None:
    pipeline = DecisionPipeline(synthetic_cluster, four_types, DecisionConfig(), EwmaPredictor(4))
    pipeline.observe(_arrivals(0.0, 15.0, per_s, 1))
    prepared = pipeline.prepare(_snapshot(15.0, key, dead_devices=tuple(sorted(dead))))
    assert prepared.observation.mask[0]
    assert np.isfinite(prepared.observation.flat()).all()
    decision = pipeline.resolve(
        prepared, action, prepared.observation.mask / prepared.observation.mask.sum()
    )
    assert 0.0 < decision.propensity <= 1.0
    if decision.plan is not None:
        assert dead.isdisjoint(decision.plan.target.devices)
    pipeline.routing_for(prepared)


def test_routing_covers_every_live_replica(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    prepared = _run(pipeline)[-1]
    routing = pipeline.routing_for(prepared)
    weights = np.array(routing.weights)
    assert routing.replica_ids == (0, 1, 2, 3)
    assert weights.sum(axis=1) == pytest.approx(np.ones(4))
    assert weights.min() > 0.015
    loads = [ReplicaLoad(i, 1, 0, 10_000) for i in routing.replica_ids]
    assert sum(shares(routing, loads, 123)) == pytest.approx(1.0)


def test_dead_replicas_get_no_traffic(build_pipeline: BuildPipeline) -> None:
    pipeline = build_pipeline()
    prepared = pipeline.prepare(_snapshot(15.0, dead_devices=(2,)))
    weights = np.array(pipeline.routing_for(prepared).weights)
    assert weights[:, 2].max() == 0.0
    assert weights[:, [0, 1, 3]].min() > 0.0
    assert weights.sum(axis=1) == pytest.approx(np.ones(4))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="grid_s"):
        DecisionConfig(grid_s=0.0)


def test_no_switch_before_traffic_was_seen_for_long_enough(
    synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping
) -> None:
    """Silent at and after the limit, counted from the reset; every switch is vetoed before."""
    config = DecisionConfig(min_observed_s=30.0)
    first = [ParallelConfig(1, 1)] * 4
    pipeline = DecisionPipeline(synthetic_cluster, four_types, config, EwmaPredictor(4), first)
    pipeline.reset(100.0)
    pipeline.observe(_arrivals(100.0, 40.0, 2.0, seed=0))
    for at_s, is_vetoed in ((100.0, True), (115.0, True), (130.0, False), (145.0, False)):
        reasons = pipeline.prepare(_snapshot(at_s)).mask_reasons[1:]
        assert all((reason == "unobserved") == is_vetoed for reason in reasons), at_s
        assert reasons
