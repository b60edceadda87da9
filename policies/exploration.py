"""Exploration that costs little: now and then a row that nearly ties with the chosen one.

Off-line evaluation can only speak of what was sometimes tried (`policies.ope`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec

Floats = NDArray[np.float64]
LATENCY, HEADROOM = "log_latency", "headroom"  # candidate features


@dataclass(frozen=True, slots=True)
class ExplorationConfig:
    """How often, and among what."""

    epsilon: float = 0.0  # probability that is shared evenly by the chosen row and its near ties
    tie: float = 0.1  # ln of how many times the chosen row's estimated latency a near tie may have

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1 or self.tie < 0:
            raise InvalidRequestError(
                "exploration needs an epsilon in [0, 1) and a tie of at least 0, got "
                f"{self.epsilon} and {self.tie}."
            )


class Exploration:
    """Mixes the most probable row with its near ties: legal rows that are estimated to be about as
    fast, or faster, and that hold the load, or hold more of it."""

    def __init__(self, spec: ObservationSpec, config: ExplorationConfig) -> None:
        self.config = config
        names = spec.candidate_features
        self._latency, self._headroom = names.index(LATENCY), names.index(HEADROOM)

    def mix(self, probabilities: Floats, observation: Observation) -> Floats:
        """[K] -> [K]; what is then drawn from has to be logged."""
        top, rows = int(np.argmax(probabilities)), observation.candidates
        latency, headroom = rows[:, self._latency], rows[:, self._headroom]
        near = observation.mask & (latency <= latency[top] + self.config.tie)
        near &= headroom >= min(headroom[top], 1.0)
        near[top] = True
        mixed: Floats = self.config.epsilon * near / near.sum()
        mixed[top] += 1.0 - self.config.epsilon
        return mixed
