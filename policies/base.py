"""What a policy sees and gives: `Observation`, `ObservationSpec`, the `Policy` protocol.

Pure numpy. The same values are built in training and in production by `controller.observation`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ObservationSpec:
    """Names and order of features. Its hash is stored in every checkpoint and checked on load."""

    state_features: tuple[str, ...]
    candidate_features: tuple[str, ...]
    max_candidates: int  # rows, keep included
    grid_s: float
    version: int = 1

    @property
    def flat_size(self) -> int:
        """state, then candidate rows, then the validity (1/0) of each row."""
        return len(self.state_features) + self.max_candidates * (len(self.candidate_features) + 1)

    @property
    def hash(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Observation:
    """One decision's input. Rows past the last candidate are zero and masked."""

    state: Floats  # [S]
    candidates: Floats  # [K, C]; row 0 is keep
    mask: Mask  # [K]; True = legal
    keys: tuple[str, ...]  # Candidate.key of each filled row

    def flat(self) -> Floats:
        """[flat_size]: state, candidate rows, row validity. The mask is passed apart."""
        valid = np.zeros(len(self.candidates), np.float32)
        valid[: len(self.keys)] = 1.0
        return np.concatenate([self.state, self.candidates.ravel(), valid]).astype(np.float32)


class Policy(Protocol):
    """Maps an observation to a distribution over its rows. Stateless between calls but for what
    `reset` clears, so that the same observation sequence gives the same distributions."""

    @property
    def name(self) -> str: ...

    def reset(self) -> None: ...

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """[K] float64, sums to 1, zero wherever the mask is False."""
        ...


def choose(
    probabilities: NDArray[np.float64], rng: np.random.Generator, deterministic: bool
) -> int:
    """Index of the action: the most probable one, or drawn."""
    if deterministic:
        return int(np.argmax(probabilities))
    return int(rng.choice(len(probabilities), p=probabilities))
