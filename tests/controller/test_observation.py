from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from controller.monitor import Monitor
from controller.observation import Situation, build_observation, observation_spec
from controller.predictor import Forecast
from engine.cluster import (
    Candidate,
    ClusterSnapshot,
    ParallelConfig,
    Routing,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster
from policies.base import Observation, ObservationSpec
from policies.baselines import HysteresisPolicy, KeepPolicy, MyopicPolicy, StaticPolicy

SNAPSHOT = ClusterSnapshot(
    30.0, 0, dense_deployment([ParallelConfig(1, 1)] * 4), Routing((0, 1, 2, 3)), (), None
)
ROWS = (
    Candidate(parse_deployment_key("4xtp1pp1"), "keep", (), 2.0, 1.5, 3.0, 4000, 0, 0.0, 0),
    Candidate(
        parse_deployment_key("1xtp2pp1+2xtp1pp1"),
        "optimum+undo",
        (),
        3.0,
        2.0,
        1.5,
        8000,
        10,
        2.0,
        2,
    ),
)
SPEC = observation_spec(4, 5, 15.0)


@pytest.fixture
def situation(synthetic_cluster: ProfiledCluster, four_types: WorkloadTyping) -> Situation:
    state = Monitor(four_types, 60.0, 10.0).state(SNAPSHOT)
    forecast = Forecast((1.0,) * 4, (1.0,) * 4, (2.0,) * 4, (0.1,) * 4)
    return Situation(synthetic_cluster.spec, SNAPSHOT, state, forecast, math.inf)


def _build(situation: Situation, reasons: tuple[str, ...] = ("", "")) -> Observation:
    return build_observation(SPEC, situation, ROWS, reasons)


def _features(spec: ObservationSpec, row: np.ndarray) -> dict[str, float]:
    return dict(zip(spec.candidate_features, row.tolist(), strict=True))


def test_shapes_mask_and_padding(situation: Situation) -> None:
    found = _build(situation, ("", "dwell"))
    assert found.mask.tolist() == [True, False, False, False, False]
    assert found.candidates.shape == (5, len(SPEC.candidate_features))
    assert not found.candidates[2:].any()
    assert found.flat().shape == (SPEC.flat_size,)
    assert found.keys == ("4xtp1pp1", "1xtp2pp1+2xtp1pp1")


def test_names_are_unique() -> None:
    for names in (SPEC.state_features, SPEC.candidate_features):
        assert len(set(names)) == len(names)


def test_candidate_features_by_hand(situation: Situation) -> None:
    keep, other = (_features(SPEC, row) for row in _build(situation).candidates[:2])
    assert (keep["is_keep"], keep["is_optimum"], keep["latency_vs_keep"]) == (1.0, 0.0, 0.0)
    assert (other["is_keep"], other["is_optimum"], other["was_last"]) == (0.0, 1.0, 1.0)
    assert other["log_latency"] == pytest.approx(math.log(1.5))
    assert other["latency_vs_keep"] == pytest.approx(-math.log(2.0))
    assert other["switch_s"] == 2.0
    assert other["kv_capacity"] == pytest.approx(math.log(2.0))
    assert (other["tp1_share"], other["tp2_share"], other["pp1_share"]) == (0.5, 0.5, 1.0)
    assert other["devices_changed"] == 0.5


def test_state_tells_stale_from_idle(situation: Situation) -> None:
    state = dict(zip(SPEC.state_features, _build(situation).state.tolist(), strict=True))
    assert (state["stale"], state["never_switched"], state["latency_known"]) == (1.0, 1.0, 0.0)
    assert state["forecast_q90.type2"] == pytest.approx(math.log(3.0))
    assert state["utilisation"] == 0.5


def test_extremes_are_finite(situation: Situation) -> None:
    awful = (replace(ROWS[0], headroom=0.0, headroom_q90=0.0, latency_s=1e4), *ROWS[1:])
    nan = replace(situation.monitor, kv_usage_mean=math.nan, latency_s=math.inf)
    found = build_observation(SPEC, replace(situation, monitor=nan), awful, ("", ""))
    assert np.isfinite(found.flat()).all()
    assert np.abs(found.flat()).max() <= 10.0


def test_the_rules_read_what_they_need(situation: Situation) -> None:
    found = _build(situation)
    policies = (KeepPolicy(), StaticPolicy(ROWS[1].key), MyopicPolicy(SPEC), HysteresisPolicy(SPEC))
    chosen = [[int(p.probabilities(found).argmax()) for _ in range(2)] for p in policies]
    assert chosen == [[0, 0], [1, 1], [1, 1], [0, 1]]
