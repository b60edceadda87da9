"""LSTM forecasters in numpy: OServe's, one per type, and one pooled over all types with quantiles.

Trained by `envs.lstm_training`, in torch; what runs in the controller needs none. The encoders are
the same in training and here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from controller.forecast_errors import Floats
from controller.predictor import TrackedPredictor
from engine.errors import InvalidRequestError

Weights = NDArray[np.float32]
WINDOW = 50  # intervals that an LSTM reads (OServe, arXiv 2602.12151, workload predictor)
HALFLIVES = (1.0, 4.0, 16.0, 64.0)  # intervals, of the levels that the pooled LSTM reads
BASE, SEASONAL = 0, 1  # the level that its forecasts are differences from; the one a season ago
OUTPUTS = 3  # of the pooled LSTM per horizon: mean, q50, q90
SEASON_LEAD = 6  # intervals: the mean age of what level SEASONAL averages


class Encoded(NamedTuple):
    """One interval as an LSTM sees it; its outputs are in `unit`s above `base`, as counts."""

    features: Floats  # [J, F]
    base: Floats  # [J]
    unit: Floats  # [J]


class Encoder(Protocol):
    num_features: int

    def reset(self) -> None: ...

    def step(self, counts: Floats) -> Encoded:
        """counts[J] of the interval that just ended."""
        ...


class StandardCounts:
    """The count itself, standardised by the mean and spread of each type in training."""

    num_features = 1

    def __init__(self, centre: Floats, spread: Floats) -> None:
        self._centre, self._spread = centre, spread

    def reset(self) -> None:
        """Nothing is remembered."""

    def step(self, counts: Floats) -> Encoded:
        features = (counts - self._centre) / self._spread
        return Encoded(features[:, None], self._centre, self._spread)


class PoissonLevels:
    """Levels of each type over several memories, as differences in units of Poisson noise.

    Free of the type's scale and of the hour, so that one network serves all types and a controller
    may start at any time: what the day brings is read from the level a season ago.
    """

    def __init__(self, num_types: int, season_intervals: int, horizons: Sequence[int]) -> None:
        self._num_types, self._season, self._horizons = num_types, season_intervals, horizons
        self._keep = 0.5 ** (1.0 / np.array(HALFLIVES))[:, None]
        self.num_features = len(HALFLIVES) + 2 + len(horizons)
        self.reset()

    def reset(self) -> None:
        self._sums = np.zeros((len(HALFLIVES), self._num_types))
        self._weights = np.zeros((len(HALFLIVES), 1))
        self._levels: deque[Floats] = deque(maxlen=self._season)

    def step(self, counts: Floats) -> Encoded:
        self._sums = self._keep * self._sums + (1.0 - self._keep) * counts
        self._weights = self._keep * self._weights + (1.0 - self._keep)
        levels = self._sums / self._weights
        base = levels[BASE]
        unit = np.sqrt(base + 1.0)
        rows = [counts, *(level for i, level in enumerate(levels) if i != BASE)]
        rows += self._season_ago(levels[SEASONAL])
        self._levels.append(levels[SEASONAL])
        features = [*(np.arcsinh((row - base) / unit) for row in rows), np.log1p(base) / 3.0]
        return Encoded(np.array(features).T, base, unit)

    def _season_ago(self, present: Floats) -> list[Floats]:
        """The level a season before now and before each horizon; the present one if unknown."""
        if len(self._levels) < self._season:
            return [present] * (1 + len(self._horizons))
        last = self._season - 1
        return [self._levels[min(ahead + SEASON_LEAD, last)] for ahead in (0, *self._horizons)]


@dataclass(frozen=True, slots=True, eq=False)
class LstmWeights:
    """An LSTM layer with a linear head, for G groups of types: each its own, or 1 for all.

    Gates are in torch's order (input, forget, cell, output); H hidden units, O outputs per type.
    """

    input: Weights  # [G, 4H, F]
    recurrent: Weights  # [G, 4H, H]
    bias: Weights  # [G, 4H]
    head: Weights  # [G, O, H]
    head_bias: Weights  # [G, O]

    def outputs(self, window: Floats) -> Floats:
        """[J, O] after the features window[T, J, F], from a state of zeros."""
        hidden = self.recurrent.shape[2]
        series = window.transpose(1, 0, 2).astype(np.float32)
        gates = series @ self.input.transpose(0, 2, 1) + self.bias[:, None]
        recurrent = self.recurrent.transpose(0, 2, 1)
        state: Any = np.zeros((len(series), 1, hidden), np.float32)
        cell = np.zeros_like(state)
        for t in range(series.shape[1]):
            gate = gates[:, t : t + 1] + state @ recurrent
            sigmoid = 1.0 / (1.0 + np.exp(-gate))
            fresh = np.tanh(gate[..., 2 * hidden : 3 * hidden])
            cell = sigmoid[..., hidden : 2 * hidden] * cell + sigmoid[..., :hidden] * fresh
            state = sigmoid[..., 3 * hidden :] * np.tanh(cell)
        found = state @ self.head.transpose(0, 2, 1) + self.head_bias[:, None]
        return np.asarray(found[:, 0], np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LstmModel:
    """A trained LSTM, and how counts become what it reads."""

    weights: LstmWeights
    interval_s: float
    horizons: tuple[int, ...]
    season_intervals: int = 0  # of the pooled one
    centre: tuple[float, ...] = ()  # of each type, where each has its own
    spread: tuple[float, ...] = ()

    @property
    def is_pooled(self) -> bool:
        return not self.centre

    def encoder(self, num_types: int) -> Encoder:
        if self.is_pooled:
            return PoissonLevels(num_types, self.season_intervals, self.horizons)
        return StandardCounts(np.array(self.centre), np.array(self.spread))


class LstmPredictor(TrackedPredictor):
    """Forecasts of a trained model from the last WINDOW intervals, all horizons in one pass.

    The pooled model says its own quantiles; of the others they come from recent errors.
    """

    def __init__(self, model: LstmModel, num_types: int, interval_s: float) -> None:
        if interval_s != model.interval_s:
            raise InvalidRequestError(
                f"the LSTM was trained on intervals of {model.interval_s:g} s and cannot forecast "
                f"intervals of {interval_s:g} s; train it on those."
            )
        if not model.is_pooled and len(model.centre) != num_types:
            raise InvalidRequestError(
                f"the LSTMs were trained for {len(model.centre)} types, got {num_types}; train "
                "them on this typing."
            )
        super().__init__(num_types, interval_s, model.horizons)
        self.name = "lstm_pooled" if model.is_pooled else "lstm"
        self._model, self._encoder = model, model.encoder(num_types)
        self._window: deque[Floats] = deque(maxlen=WINDOW)
        self._forget()

    def _forget(self) -> None:
        self._encoder.reset()
        self._window.clear()
        self._said = np.zeros((OUTPUTS, len(self._model.horizons), self._num_types))

    def _learn(self, actual: Floats) -> None:
        encoded = self._encoder.step(actual * self._interval_s)
        self._window.append(encoded.features)
        outputs = self._model.weights.outputs(np.array(self._window))
        shaped = outputs.T.reshape(-1, len(self._model.horizons), self._num_types)
        said = encoded.base + encoded.unit * shaped
        self._said = np.maximum(said, 0.0) / self._interval_s

    def _row(self, ahead: int) -> int:
        return self._model.horizons.index(ahead)

    def _mean(self, ahead: int) -> Floats:
        return np.asarray(self._said[0, self._row(ahead)])

    def _quantiles(self, ahead: int) -> tuple[Floats, Floats] | None:
        if not self._model.is_pooled or not self._window:
            return None
        _, q50, q90 = self._said[:, self._row(ahead)]
        return q50, q90
