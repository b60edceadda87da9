"""Forecasts of per-type arrival rates for the next grid interval, with quantiles.

Quantiles come from recent forecast errors in units of the square root of the forecast: counts of
arrivals scatter like Poisson counts, so an error of that unit means the same by day and by night.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
MEMORY_INTERVALS = 40
# Quantiles of a standard normal at 1/18, 3/18, ... 17/18: errors assumed before any is seen.
NORMAL_ERRORS = (-1.593, -0.967, -0.589, -0.282, 0.0, 0.282, 0.589, 0.967, 1.593)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second of each type in the next interval; tuples of length J."""

    mean: tuple[float, ...]
    q50: tuple[float, ...]
    q90: tuple[float, ...]
    relative_error: tuple[float, ...]  # running mean of |actual - mean| / actual


class Predictor(Protocol):
    """Sees the rates of each grid interval once, in order; forecasts the next."""

    @property
    def name(self) -> str: ...

    def reset(self) -> None: ...

    def observe(self, rates: Floats) -> None:
        """rates[J] of the interval that just ended, in requests per second."""
        ...

    def forecast(self) -> Forecast: ...


class ErrorTracker:
    """Recent forecast errors of J types: quantiles around a forecast, and relative error."""

    def __init__(self, num_types: int, interval_s: float) -> None:
        self._num_types, self._interval_s = num_types, interval_s
        self.reset()

    def reset(self) -> None:
        scale = 1.0 / np.sqrt(self._interval_s)
        seeds = [np.full(self._num_types, e * scale) for e in NORMAL_ERRORS]
        self._errors: deque[Floats] = deque(seeds, maxlen=MEMORY_INTERVALS)
        self._relative = np.zeros(self._num_types)

    def _unit(self, forecast: Floats) -> Floats:
        return np.asarray(np.sqrt(forecast + 1.0 / self._interval_s))

    def record(self, forecast: Floats, actual: Floats) -> None:
        self._errors.append((actual - forecast) / self._unit(forecast))
        floor = 1.0 / self._interval_s
        relative = np.abs(actual - forecast) / np.maximum(actual, floor)
        self._relative += 0.1 * (np.minimum(relative, 10.0) - self._relative)

    def around(self, mean: Floats) -> Forecast:
        """The forecast `mean`[J] with its quantiles, never below zero and never crossing."""
        errors = np.sort(np.array(self._errors), axis=0)
        last = len(errors) - 1
        q50 = mean + errors[last // 2] * self._unit(mean)
        q90 = mean + errors[int(np.ceil(0.9 * last))] * self._unit(mean)
        q50 = np.maximum(q50, 0.0)
        rows = (mean, q50, np.maximum(q90, q50), self._relative)
        return Forecast(*(tuple(row.tolist()) for row in rows))


class EwmaPredictor:
    """Exponentially weighted mean of past intervals; `halflife_intervals` 0 is the last value.

    Corrected for its start: the weights of the intervals seen so far sum to one.
    """

    def __init__(
        self, num_types: int, halflife_intervals: float = 4.0, interval_s: float = 15.0
    ) -> None:
        if halflife_intervals < 0 or interval_s <= 0:
            raise InvalidRequestError(
                f"a forecaster needs halflife_intervals >= 0 and interval_s > 0, got "
                f"{halflife_intervals} and {interval_s}."
            )
        self.name = f"ewma{halflife_intervals:g}"
        self._keep = 0.5 ** (1.0 / halflife_intervals) if halflife_intervals else 0.0
        self._num_types = num_types
        self._errors = ErrorTracker(num_types, interval_s)
        self.reset()

    def reset(self) -> None:
        self._sum, self._weight = np.zeros(self._num_types), 0.0
        self._errors.reset()

    def _mean(self) -> Floats:
        return np.asarray(self._sum / self._weight if self._weight else self._sum)

    def observe(self, rates: Floats) -> None:
        actual = np.asarray(rates, np.float64)
        assert actual.shape == (self._num_types,), actual.shape
        if self._weight:
            self._errors.record(self._mean(), actual)
        self._sum = self._keep * self._sum + (1.0 - self._keep) * actual
        self._weight = self._keep * self._weight + (1.0 - self._keep)

    def forecast(self) -> Forecast:
        return self._errors.around(self._mean())


class NaivePredictor(EwmaPredictor):
    """The next interval will be as the last."""

    def __init__(self, num_types: int, interval_s: float = 15.0) -> None:
        super().__init__(num_types, 0.0, interval_s)
        self.name = "naive"
