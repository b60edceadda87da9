"""Wires decision pipelines, from values or from a checkpoint's manifest; reads profile files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controller.decision import DecisionConfig, DecisionPipeline
from controller.predictor import EwmaPredictor, NaivePredictor, Predictor
from engine.cluster import WorkloadType, WorkloadTyping, parse_deployment_key
from engine.errors import CheckpointError, InvalidRequestError
from engine.profile import ProfiledCluster


def load_profiled_cluster(path: Path) -> ProfiledCluster:
    """Read what the profiler wrote. Raises InvalidRequestError in one sentence."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path} cannot be read: {error}.") from error
    return ProfiledCluster.from_json(data)


def build_predictor(name: str, num_types: int, grid_s: float) -> Predictor:
    """ "naive", or "ewmaH" with a half-life of H grid intervals, such as ewma4."""
    if name == "naive":
        return NaivePredictor(num_types, interval_s=grid_s)
    try:
        if not name.startswith("ewma"):
            raise ValueError
        return EwmaPredictor(num_types, float(name.removeprefix("ewma")), grid_s)
    except ValueError:
        raise InvalidRequestError(
            f"predictor {name!r} is not known; expected 'naive' or 'ewmaH' with a half-life of H "
            "intervals, such as 'ewma4'."
        ) from None


def build_pipeline(
    cluster: ProfiledCluster,
    typing: WorkloadTyping,
    config: DecisionConfig,
    predictor: str = "ewma4",
    default_key: str = "",
) -> DecisionPipeline:
    """A pipeline; `default_key` names a deployment that is always among the candidates."""
    default = parse_deployment_key(default_key) if default_key else None
    forecaster = build_predictor(predictor, len(typing.types), config.grid_s)
    return DecisionPipeline(cluster, typing, config, forecaster, default)


def pipeline_facts(
    cluster: ProfiledCluster,
    typing: WorkloadTyping,
    config: DecisionConfig,
    predictor: str,
    default_key: str = "",
) -> dict[str, Any]:
    """What a checkpoint's manifest keeps, so that `pipeline_from_facts` builds the same again."""
    return {
        "cluster": cluster.to_json(),
        "typing": asdict(typing),
        "decision": asdict(config),
        "predictor": predictor,
        "default_deployment": default_key,
    }


def pipeline_from_facts(
    facts: Mapping[str, Any], cluster: ProfiledCluster | None = None
) -> DecisionPipeline:
    """The pipeline a policy was trained with, on another cluster if one is given.

    Raises CheckpointError when the facts are incomplete.
    """
    try:
        found = cluster or ProfiledCluster.from_json(facts["cluster"])
        types = tuple(WorkloadType(**t) for t in facts["typing"]["types"])
        typing = WorkloadTyping(types, tuple(facts["typing"]["prior"]))
        config = DecisionConfig(**facts["decision"])
        predictor, default_key = facts["predictor"], facts.get("default_deployment", "")
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint does not say how to build its pipeline ({error}); train it again."
        ) from error
    return build_pipeline(found, typing, config, predictor, default_key)
