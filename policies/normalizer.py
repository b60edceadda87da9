"""Running mean and variance of observation features; frozen into the checkpoint. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError
from policies.base import Floats, ObservationSpec

CLIP = 10.0  # standard deviations; far outliers would saturate the network anyway
MIN_VARIANCE = 1e-8  # below it a feature counts as constant and is only centred


class RunningMoments:
    """Mean and variance per column, merged batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self, size: int) -> None:
        self.count = 0.0
        self.mean = np.zeros(size, np.float64)
        self.variance = np.ones(size, np.float64)

    def update(self, rows: NDArray[np.floating[Any]]) -> None:
        """rows: [N, size]; N may be 0."""
        if len(rows) == 0:
            return
        batch = np.asarray(rows, np.float64)
        number, mean, variance = float(len(batch)), batch.mean(axis=0), batch.var(axis=0)
        total, delta = self.count + number, mean - self.mean
        squares = self.variance * self.count + variance * number
        squares += delta**2 * self.count * number / total
        self.mean = self.mean + delta * number / total
        self.variance, self.count = squares / total, total

    def normalise(self, rows: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """(rows - mean) / std, clipped to +-CLIP standard deviations."""
        std = np.sqrt(np.where(self.variance < MIN_VARIANCE, 1.0, self.variance))
        scaled: NDArray[np.floating[Any]] = np.clip((rows - self.mean) / std, -CLIP, CLIP)
        return scaled

    def to_json(self) -> dict[str, Any]:
        mean, variance = self.mean.tolist(), self.variance.tolist()
        return {"count": self.count, "mean": mean, "variance": variance}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], size: int) -> RunningMoments:
        moments = cls(size)
        moments.count = float(data["count"])
        moments.mean = np.asarray(data["mean"], np.float64)
        moments.variance = np.asarray(data["variance"], np.float64)
        if moments.mean.shape != (size,) or moments.variance.shape != (size,):
            raise CheckpointError(
                f"normaliser statistics cover {moments.mean.size} features, expected {size}; "
                "the checkpoint belongs to another observation."
            )
        return moments


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where state, candidate rows and row validity lie in a flat observation."""

    num_state: int
    num_rows: int
    num_features: int  # per candidate row

    @classmethod
    def of(cls, spec: ObservationSpec) -> FlatLayout:
        return cls(len(spec.state_features), spec.max_candidates, len(spec.candidate_features))

    @property
    def rows_end(self) -> int:
        return self.num_state + self.num_rows * self.num_features

    @property
    def size(self) -> int:
        return self.rows_end + self.num_rows


class ObservationNormalizer:
    """Per-feature statistics: over all observations for the state, over valid rows for candidates.

    All rows share one set of statistics, so that permuting candidates permutes their values.
    """

    def __init__(self, spec: ObservationSpec) -> None:
        self.layout = FlatLayout.of(spec)
        self.state = RunningMoments(self.layout.num_state)
        self.candidates = RunningMoments(self.layout.num_features)

    def _split(self, flat: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """flat [N, size] -> state [N, S], rows [N, K, C], valid [N, K]."""
        at = self.layout
        rows = flat[:, at.num_state : at.rows_end].reshape(len(flat), at.num_rows, at.num_features)
        return flat[:, : at.num_state], rows, flat[:, at.rows_end :] > 0.5

    def update(self, flat: Floats) -> None:
        """Take in a batch [N, flat_size]."""
        state, rows, valid = self._split(flat)
        self.state.update(state)
        self.candidates.update(rows[valid])

    def normalise(self, flat: Floats) -> Floats:
        """[N, flat_size] or [flat_size] -> the same shape; unused rows stay zero."""
        batch = np.atleast_2d(flat)
        state, rows, valid = self._split(batch)
        scaled = np.where(valid[..., None], self.candidates.normalise(rows), 0.0)
        parts = [self.state.normalise(state), scaled.reshape(len(batch), -1), valid]
        return np.concatenate(parts, axis=1).astype(np.float32).reshape(np.shape(flat))

    def to_json(self) -> dict[str, Any]:
        return {"state": self.state.to_json(), "candidates": self.candidates.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], spec: ObservationSpec) -> ObservationNormalizer:
        """Raises CheckpointError when sizes differ from the spec's."""
        normalizer = cls(spec)
        at = normalizer.layout
        normalizer.state = RunningMoments.from_json(data["state"], at.num_state)
        normalizer.candidates = RunningMoments.from_json(data["candidates"], at.num_features)
        return normalizer
