"""A trained policy in numpy: torch takes longer to begin than to add, and seconds to import.

Probabilities are those of torch to 1e-6; the order of sums differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from policies.base import Floats, Observation, ObservationSpec
from policies.normalizer import FlatLayout, ObservationNormalizer

Weights = Mapping[str, Floats]  # by the names that torch gives them


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Size and start of the network. Stored in the checkpoint."""

    hidden_size: int = 64  # H of every layer
    keep_weight: float = 1.0  # initial weight of the (normalised) keep marker in the logit: the
    # untrained policy then mostly keeps, instead of switching at random
    kind: Literal["candidates", "mlp"] = (
        "candidates"  # mlp: over the flat observation, with weights
    )
    # of its own for each row: what is not known there is that rows are alike


@dataclass(frozen=True, slots=True)
class Layer:
    """weights[O, I] and bias[O]; those of a network on the CPU may be views, which follow its
    training. Copies of them do not."""

    weights: Floats
    bias: Floats

    def __call__(self, values: Floats) -> Floats:
        return np.asarray(values @ self.weights.T + self.bias)


def _matrix(weights: Weights, name: str, outputs: int, inputs: int) -> Floats:
    found = weights[name]
    if found.shape != (outputs, inputs):
        raise ValueError(f"{name} is of shape {found.shape}, expected {(outputs, inputs)}")
    return found


def _layer(weights: Weights, name: str, outputs: int, inputs: int) -> Layer:
    bias = weights[f"{name}.bias"]
    if bias.shape != (outputs,):
        raise ValueError(f"{name}.bias is of shape {bias.shape}, expected {(outputs,)}")
    return Layer(_matrix(weights, f"{name}.weight", outputs, inputs), bias)


class CandidateActor:
    """`CandidateNetwork.forward_actor` of one flat observation [flat_size] -> logits [K]."""

    def __init__(self, layout: FlatLayout, hidden: int, weights: Weights) -> None:
        self._layout, features = layout, layout.num_features
        self._embed = _layer(weights, "actor.state.0", hidden, layout.num_state)
        self._first = _layer(weights, "actor.rows.0", hidden, features + hidden)
        self._second = _layer(weights, "actor.rows.2", hidden, hidden)
        self._logit = _layer(weights, "logit", 1, hidden)
        self._direct = _matrix(weights, "direct.weight", 1, features)

    def __call__(self, flat: Floats) -> Floats:
        at, first = self._layout, self._first
        valid = flat[at.rows_end :] > 0.5
        rows = flat[at.num_state : at.rows_end].reshape(at.num_rows, at.num_features)[valid]
        of_row, of_state = first.weights[:, : at.num_features], first.weights[:, at.num_features :]
        context = of_state @ np.tanh(self._embed(flat[: at.num_state])) + first.bias
        hidden = np.tanh(self._second(np.tanh(rows @ of_row.T + context)))
        logits = np.zeros(at.num_rows, np.float32)
        logits[valid] = (self._logit(hidden) + rows @ self._direct.T)[:, 0]
        return logits


class PlainActor:
    """`PlainNetwork.forward_actor`, in the same way."""

    def __init__(self, layout: FlatLayout, hidden: int, weights: Weights) -> None:
        self._first = _layer(weights, "actor.0", hidden, layout.size)
        self._second = _layer(weights, "actor.2", hidden, hidden)
        self._logits = _layer(weights, "actor.4", layout.num_rows, hidden)

    def __call__(self, flat: Floats) -> Floats:
        return self._logits(np.tanh(self._second(np.tanh(self._first(flat)))))


Actor = CandidateActor | PlainActor


def build_actor(config: NetworkConfig, layout: FlatLayout, weights: Weights) -> Actor:
    """Raises KeyError and ValueError when the weights are of another network."""
    kind = CandidateActor if config.kind == "candidates" else PlainActor
    return kind(layout, config.hidden_size, weights)


class TrainedPolicy:
    """A trained network as a `Policy`: normalise, score, masked softmax."""

    def __init__(
        self,
        spec: ObservationSpec,
        actor: Actor,
        network_config: NetworkConfig,
        normalizer: ObservationNormalizer,
        name: str = "ppo",
    ) -> None:
        self.spec, self.network_config, self.normalizer = spec, network_config, normalizer
        self._actor, self._name = actor, name

    @property
    def name(self) -> str:
        return self._name

    def reset(self) -> None:
        """Nothing to clear: history is part of the observation."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """[K] float64; see `policies.base.Policy`."""
        assert observation.mask.any(), "no legal candidate; keep must always be legal"
        logits = self._actor(self.normalizer.normalise(observation.flat()))
        return masked_softmax(logits.astype(np.float64), observation.mask)


def masked_softmax(logits: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Softmax over the rows where mask is True, exactly zero elsewhere."""
    weights: NDArray[Any] = np.where(mask, np.exp(logits - logits[mask].max()), 0.0)
    share: NDArray[np.float64] = weights / weights.sum()
    return share
