"""A pipeline from the facts in a checkpoint's manifest."""

from __future__ import annotations

import json

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
    with pytest.raises(InvalidRequestError, match="'ewma4'"):
        build_predictor("prophet", 2, 5.0)
