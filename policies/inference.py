"""The actor's forward pass in numpy, for one observation: torch takes longer to begin than to add.

Probabilities are those of torch to 1e-6; the order of sums differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import nn

from policies.base import Floats
from policies.networks import CandidateNetwork, Network, PlainNetwork
from policies.normalizer import FlatLayout


@dataclass(frozen=True, slots=True)
class Layer:
    """weights[O, I] and bias[O]: views of a network's own on the CPU, so they follow its training.
    Copies of them do not."""

    weights: Floats
    bias: Floats

    @classmethod
    def of(cls, part: nn.Linear) -> Self:
        return cls(part.weight.detach().numpy(), part.bias.detach().numpy())

    def __call__(self, values: Floats) -> Floats:
        return np.asarray(values @ self.weights.T + self.bias)


def _layers(parts: nn.Sequential) -> list[Layer]:
    return [Layer.of(part) for part in parts if isinstance(part, nn.Linear)]


class CandidateActor:
    """`CandidateNetwork.forward_actor` of one flat observation [flat_size] -> logits [K]."""

    def __init__(self, network: CandidateNetwork) -> None:
        self._layout: FlatLayout = network.layout
        (self._embed,), (self._first, self._second) = (
            _layers(network.actor.state),
            _layers(network.actor.rows),
        )
        self._logit, self._direct = Layer.of(network.logit), network.direct.weight.detach().numpy()

    def __call__(self, flat: Floats) -> Floats:
        at, first = self._layout, self._first
        rows = flat[at.num_state : at.rows_end].reshape(at.num_rows, at.num_features)
        of_row, of_state = first.weights[:, : at.num_features], first.weights[:, at.num_features :]
        context = of_state @ np.tanh(self._embed(flat[: at.num_state])) + first.bias
        hidden = np.tanh(self._second(np.tanh(rows @ of_row.T + context)))
        return np.asarray((self._logit(hidden) + rows @ self._direct.T)[:, 0])


class PlainActor:
    """`PlainNetwork.forward_actor`, in the same way."""

    def __init__(self, network: PlainNetwork) -> None:
        self._first, self._second, self._logits = _layers(network.actor)

    def __call__(self, flat: Floats) -> Floats:
        return self._logits(np.tanh(self._second(np.tanh(self._first(flat)))))


def actor_of(network: Network) -> CandidateActor | PlainActor:
    """For a network on the CPU."""
    if isinstance(network, CandidateNetwork):
        return CandidateActor(network)
    return PlainActor(network)
