"""Trained LSTM forecasters as files: one safetensors file with its facts. Nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from controller.lstm_predictor import LstmModel, LstmWeights
from engine.errors import InvalidRequestError


def save_lstm(path: Path, model: LstmModel) -> None:
    facts = asdict(model)
    tensors = {name: np.ascontiguousarray(a) for name, a in facts.pop("weights").items()}
    save_file(tensors, path, metadata={"lstm": json.dumps(facts)})


def load_lstm(path: Path) -> LstmModel:
    """Raises InvalidRequestError in one sentence."""
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["lstm"])
            values: dict[str, Any] = {
                n: tuple(v) if isinstance(v, list) else v for n, v in facts.items()
            }
            arrays = {f.name: file.get_tensor(f.name) for f in fields(LstmWeights)}
            return LstmModel(LstmWeights(**arrays), **values)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{path} is no LSTM forecaster ({error}); give a file that envs.lstm_training wrote."
        ) from error
