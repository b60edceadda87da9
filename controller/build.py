"""Wires decision pipelines, from values or from a checkpoint's manifest; reads measured files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controller.decision import DecisionConfig, DecisionPipeline
from controller.ets_predictor import AutoEtsPredictor
from controller.lstm_files import load_lstm
from controller.lstm_predictor import LstmPredictor
from controller.predictor import (
    EwmaPredictor,
    MovingAveragePredictor,
    NaivePredictor,
    Predictor,
    SeasonalNaivePredictor,
)
from controller.slo import SloConfig, read_slo
from controller.slo_rates import MAKE, SloRates, digest, fingerprint
from engine.cluster import WorkloadType, WorkloadTyping, parse_deployment_key
from engine.errors import CheckpointError, InvalidRequestError
from engine.profile import ProfiledCluster

PREDICTORS = (
    "'naive' (the last interval), 'ewmaH' with a half-life of H grid intervals such as 'ewma4', "
    "'meanN' of the last N, 'seasonalP' (the interval P before), 'autoets', or 'lstm:FILE' with "
    "what envs.lstm_training wrote"
)
SLO_RATES = Path(__file__).parents[1] / "configs" / "slo_rates"


def load_profiled_cluster(path: Path) -> ProfiledCluster:
    """Read what the profiler wrote. Raises InvalidRequestError in one sentence."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path} cannot be read: {error}.") from error
    return ProfiledCluster.from_json(data)


def find_slo_rates(
    cluster: ProfiledCluster, slo: SloConfig | None = None, folder: Path = SLO_RATES
) -> SloRates:
    """What `python -m envs.slo_rates` made from this profile and the targets in force.

    Raises InvalidRequestError when there is none, and for files that are no SLO rates.
    """
    targets, made_from = (slo or read_slo()).targets, fingerprint(cluster)
    for path in sorted(folder.glob("*.json")):
        try:
            found = SloRates.from_json(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"SLO rates {path} cannot be read: {error}.") from error
        if found.digest == digest(made_from, found.typing, targets):
            return found
    raise InvalidRequestError(
        f"no file in {folder} has the SLO rates of {cluster.profile.model} on "
        f"{cluster.profile.device}: they are missing, or made from another profile or other "
        f"targets; make them with {MAKE}."
    )


def build_predictor(
    name: str, num_types: int, grid_s: float, horizons: Sequence[int] = (1,)
) -> Predictor:
    """The forecaster that PREDICTORS names; an LSTM has the horizons that it was trained for.

    Raises InvalidRequestError for an unknown name, a wrong number or an unreadable file.
    """
    if name.startswith("lstm:"):
        model = load_lstm(Path(name.removeprefix("lstm:")))
        return LstmPredictor(model, num_types, grid_s)
    match = re.fullmatch(r"([a-z]+)([\d.]*)", name)
    kind, number = match.groups() if match else ("", "")
    with contextlib.suppress(ValueError):
        match kind, bool(number):
            case "naive", False:
                return NaivePredictor(num_types, grid_s, horizons)
            case "autoets", False:
                return AutoEtsPredictor(num_types, interval_s=grid_s, horizons=horizons)
            case "ewma", True:
                return EwmaPredictor(num_types, float(number), grid_s, horizons)
            case "mean", True:
                return MovingAveragePredictor(num_types, int(number), grid_s, horizons)
            case "seasonal", True:
                return SeasonalNaivePredictor(num_types, int(number), grid_s, horizons)
    raise InvalidRequestError(f"predictor {name!r} is not known; expected {PREDICTORS}.")


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
    slo_rates = find_slo_rates(cluster) if config.capacity == "slo" else None
    return DecisionPipeline(cluster, typing, config, forecaster, default, slo_rates)


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
