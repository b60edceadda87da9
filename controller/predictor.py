"""Forecasts of per-type arrival rates with quantiles, and the forecasters that learn nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from controller.forecast_errors import Drift, ErrorTracker, Floats, Forecast
from engine.errors import InvalidRequestError

__all__ = [
    "Drift",
    "EwmaPredictor",
    "Forecast",
    "MovingAveragePredictor",
    "NaivePredictor",
    "Predictor",
    "SeasonalNaivePredictor",
    "TrackedPredictor",
]


class Predictor(Protocol):
    """Sees the rates of each grid interval once, in order; forecasts intervals to come."""

    @property
    def name(self) -> str: ...

    @property
    def horizons(self) -> tuple[int, ...]:
        """The intervals ahead that it can forecast; 1, the next, is always among them."""
        ...

    def reset(self) -> None: ...

    def observe(self, rates: Floats) -> None:
        """rates[J] of the interval that just ended, in requests per second."""
        ...

    def forecast(self, ahead: int = 1) -> Forecast:
        """Raises InvalidRequestError for a horizon that is not among `horizons`."""
        ...


class TrackedPredictor(ABC):
    """A `Predictor` from point forecasts: quantiles, relative error and drift come from its own
    recent errors, horizon by horizon. Subclasses learn and say the mean."""

    name: str

    def __init__(self, num_types: int, interval_s: float, horizons: Sequence[int]) -> None:
        self._num_types, self._interval_s = num_types, interval_s
        self._errors = ErrorTracker(num_types, interval_s, horizons)

    @property
    def horizons(self) -> tuple[int, ...]:
        return self._errors.horizons

    def reset(self) -> None:
        self._errors.reset()
        self._forget()

    def observe(self, rates: Floats) -> None:
        actual = np.array(rates, np.float64)
        assert actual.shape == (self._num_types,), actual.shape
        self._errors.observe(actual)
        self._learn(actual)
        for ahead in self._errors.horizons:
            own = self._quantiles(ahead)
            self._errors.expect(ahead, self._mean(ahead), own and own[1])

    def forecast(self, ahead: int = 1) -> Forecast:
        self._errors.check(ahead)
        mean, own = self._mean(ahead), self._quantiles(ahead)
        if own is None:
            return self._errors.around(ahead, mean)
        return self._errors.with_quantiles(ahead, mean, *own)

    def _quantiles(self, ahead: int) -> tuple[Floats, Floats] | None:
        """q50[J] and q90[J] of forecasters that know better than their recent errors."""
        return None

    @abstractmethod
    def _forget(self) -> None: ...

    @abstractmethod
    def _learn(self, actual: Floats) -> None: ...

    @abstractmethod
    def _mean(self, ahead: int) -> Floats:
        """[J] rates; zeros before anything was seen."""


class EwmaPredictor(TrackedPredictor):
    """Exponentially weighted mean of past intervals; `halflife_intervals` 0 is the last value.

    Corrected for its start: the weights of the intervals seen so far sum to one.
    """

    def __init__(
        self,
        num_types: int,
        halflife_intervals: float = 4.0,
        interval_s: float = 15.0,
        horizons: Sequence[int] = (1,),
    ) -> None:
        if not halflife_intervals >= 0:
            raise InvalidRequestError(
                f"an EWMA needs halflife_intervals >= 0, got {halflife_intervals}."
            )
        super().__init__(num_types, interval_s, horizons)
        self.name = f"ewma{halflife_intervals:g}"
        self._keep = 0.5 ** (1.0 / halflife_intervals) if halflife_intervals else 0.0
        self._forget()

    def _forget(self) -> None:
        self._sum, self._weight = np.zeros(self._num_types), 0.0

    def _learn(self, actual: Floats) -> None:
        self._sum = self._keep * self._sum + (1.0 - self._keep) * actual
        self._weight = self._keep * self._weight + (1.0 - self._keep)

    def _mean(self, ahead: int) -> Floats:
        return np.asarray(self._sum / self._weight if self._weight else self._sum)


class NaivePredictor(EwmaPredictor):
    """Every interval to come will be as the last."""

    def __init__(
        self, num_types: int, interval_s: float = 15.0, horizons: Sequence[int] = (1,)
    ) -> None:
        super().__init__(num_types, 0.0, interval_s, horizons)
        self.name = "naive"


class _PastPredictor(TrackedPredictor):
    """Keeps the last `memory_intervals` intervals."""

    def __init__(
        self,
        num_types: int,
        memory_intervals: int,
        interval_s: float,
        horizons: Sequence[int],
    ) -> None:
        if memory_intervals < 1:
            raise InvalidRequestError(
                f"{type(self).__name__} needs at least 1 interval of memory, got "
                f"{memory_intervals}."
            )
        super().__init__(num_types, interval_s, horizons)
        self._past: deque[Floats] = deque(maxlen=memory_intervals)

    def _forget(self) -> None:
        self._past.clear()

    def _learn(self, actual: Floats) -> None:
        self._past.append(actual)


class SeasonalNaivePredictor(_PastPredictor):
    """Every interval will be as the one a period before it; as the last until one is known."""

    def __init__(
        self,
        num_types: int,
        period_intervals: int,
        interval_s: float = 15.0,
        horizons: Sequence[int] = (1,),
    ) -> None:
        super().__init__(num_types, period_intervals, interval_s, horizons)
        self.name = f"seasonal{period_intervals}"
        self._period = period_intervals

    def _mean(self, ahead: int) -> Floats:
        if not self._past:
            return np.zeros(self._num_types)
        if len(self._past) < self._period:
            return self._past[-1]
        return self._past[(ahead - 1) % self._period]


class MovingAveragePredictor(_PastPredictor):
    """Every interval to come will be as the mean of the last `window_intervals`."""

    def __init__(
        self,
        num_types: int,
        window_intervals: int = 50,
        interval_s: float = 15.0,
        horizons: Sequence[int] = (1,),
    ) -> None:
        super().__init__(num_types, window_intervals, interval_s, horizons)
        self.name = f"mean{window_intervals}"

    def _mean(self, ahead: int) -> Floats:
        if not self._past:
            return np.zeros(self._num_types)
        return np.asarray(np.mean(self._past, axis=0))
