"""A pipeline from the facts in a checkpoint's manifest."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from controller.build import build_pipeline, build_predictor, pipeline_facts, pipeline_from_facts
from controller.decision import DecisionConfig, DecisionPipeline
from engine.cluster import WorkloadType, WorkloadTyping
from engine.errors import CheckpointError, InvalidRequestError
from engine.profile import ProfiledCluster

TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))
CONFIG = DecisionConfig(grid_s=5.0, min_dwell_s=10.0, max_candidates=8)


def test_a_pipeline_is_rebuilt_from_its_facts(synthetic_cluster: ProfiledCluster) -> None:
    facts = json.loads(
        json.dumps(pipeline_facts(synthetic_cluster, TYPING, CONFIG, "naive", "2xtp2pp1"))
    )
    rebuilt: DecisionPipeline = pipeline_from_facts(facts)
    assert rebuilt.cluster == synthetic_cluster
    assert rebuilt.typing == TYPING
    assert rebuilt.config == CONFIG
    assert (
        rebuilt.observation_spec
        == build_pipeline(synthetic_cluster, TYPING, CONFIG).observation_spec
    )
    with pytest.raises(CheckpointError, match="typing"):
        pipeline_from_facts({"cluster": facts["cluster"]})


@pytest.mark.parametrize("name", ["naive", "ewma4", "ewma0.5", "mean50", "seasonal1440"])
def test_predictors_are_built_by_name(name: str) -> None:
    predictor = build_predictor(name, 2, 5.0, (1, 4))
    assert (predictor.name, predictor.horizons) == (name, (1, 4))
    assert predictor.forecast(4).mean == (0.0, 0.0)


@pytest.mark.parametrize(
    "name", ["prophet", "naive3", "ewma", "ewma-1", "mean2.5", "ewma1.2.3", ""]
)
def test_unknown_predictors_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is not known; expected .*'ewma4'"):
        build_predictor(name, 2, 5.0)


def test_autoets_names_its_extra_when_it_is_missing() -> None:
    if importlib.util.find_spec("statsforecast"):
        pytest.skip("statsforecast is installed")
    with pytest.raises(InvalidRequestError, match=r"pip install 'tidewright\[ets\]'"):
        build_predictor("autoets", 2, 5.0)


def test_autoets_follows_a_level() -> None:
    pytest.importorskip("statsforecast")
    rng, predictor = np.random.default_rng(0), build_predictor("autoets", 2, 60.0, (1, 3))
    for counts in rng.poisson([60.0, 600.0], (80, 2)):
        predictor.observe(counts / 60.0)
    for ahead in (1, 3):
        forecast = predictor.forecast(ahead)
        assert forecast.mean == pytest.approx((1.0, 10.0), rel=0.2)
        assert all(q > m for q, m in zip(forecast.q90, forecast.mean, strict=True))
