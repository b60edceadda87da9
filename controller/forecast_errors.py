"""What forecasts turn out to be worth: recent errors, quantiles from them, and whether they drift.

Errors are in units of the square root of the forecast: counts of arrivals scatter like Poisson
counts, so an error of that unit means the same by day and by night.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
MEMORY_INTERVALS = 40
# Quantiles of a standard normal at 1/18, 3/18, ... 17/18: errors assumed before any is seen.
NORMAL_ERRORS = (-1.593, -0.967, -0.589, -0.282, 0.0, 0.282, 0.589, 0.967, 1.593)
DRIFT_INTERVALS = 12  # the errors that are compared with those before them
DRIFT_FACTOR = 2.0  # an error this many times the usual one is large
USUAL_INTERVALS = 100  # memory of the usual error
# Step of the correction of a forecaster's own q90, in standard deviations of Poisson counts.
CORRECTION_STEP = 0.1


compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


def _unit(forecast: Any, interval_s: float) -> Any:
    """Of errors of that rate, or of each of those rates."""
    return np.sqrt(forecast + 1.0 / interval_s)


_compiled_unit = compiled(_unit)


@compiled
def _score(actual: Any, forecast: Any, interval_s: float, error: Any, relative: Any) -> None:
    """Fills error[J], in units, and moves relative[J] towards what it was this time."""
    for j in range(len(actual)):
        off = actual[j] - forecast[j]
        error[j] = off / _compiled_unit(forecast[j], interval_s)
        found = abs(off) / max(actual[j], 1.0 / interval_s)
        relative[j] += 0.1 * (min(found, 10.0) - relative[j])


@compiled
def _around(mean: Any, interval_s: float, errors: Any) -> Any:
    """Median and q90, [J] each, from errors[N, J] in ascending order."""
    last, q50, q90 = len(errors) - 1, np.empty(len(mean)), np.empty(len(mean))
    for j in range(len(mean)):
        unit = _compiled_unit(mean[j], interval_s)
        q50[j] = mean[j] + errors[last // 2, j] * unit
        q90[j] = mean[j] + errors[math.ceil(0.9 * last), j] * unit
    return q50, q90


@compiled
def _most_large(squares: Any, usual: Any, least: float) -> int:
    """Of squares[N, J], how many of one type at most are far above usual[J], or `least`."""
    most = 0
    for j in range(len(usual)):
        limit, number = DRIFT_FACTOR**2 * max(usual[j], least), 0
        for square in squares[:, j]:
            number += square > limit
        most = max(most, number)
    return most


def _own(values: Floats) -> Floats:
    """As the compiled functions take them, whatever a forecaster has made."""
    return np.array(values, np.float64)


@lru_cache(maxsize=1)
def _warm_up() -> None:
    """Compiles everything, or loads it, so that no forecast waits for it."""
    one, square = np.ones(1), np.ones((1, 1))
    _score(one, one, 1.0, one, one)
    _around(one, 1.0, square)
    _most_large(square, one, 1.0)


class Drift(StrEnum):
    """Whether forecasts of the next interval have lately been far worse than they usually are."""

    STABLE = "stable"
    DRIFTING = "drifting"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second of each type in one interval to come; tuples of length J."""

    mean: tuple[float, ...]
    q50: tuple[float, ...]
    q90: tuple[float, ...]
    relative_error: tuple[float, ...]  # running mean of |actual - mean| / actual
    ahead: int = 1  # 1: the next interval
    drift: Drift = Drift.STABLE


class HorizonErrors:
    """Recent errors of forecasts `ahead` intervals ahead, for J types.

    A forecaster's own q90 is corrected as it is found too low or too high, so that in the long run
    it covers 0.9 (adaptive conformal inference: Gibbs and Candès, arXiv 2106.00170, on the quantile
    instead of its level).
    """

    def __init__(self, num_types: int, interval_s: float, ahead: int) -> None:
        self._num_types, self._interval_s, self._ahead = num_types, interval_s, ahead
        self.reset()

    def reset(self) -> None:
        scale = 1.0 / np.sqrt(self._interval_s)
        seeds = np.array(NORMAL_ERRORS)[:, None] * scale
        self._errors = np.empty((MEMORY_INTERVALS, self._num_types))  # the newest take turns
        self._errors[: len(seeds)], self._num_errors = seeds, len(seeds)
        self._relative = np.zeros(self._num_types)
        self._correction = np.zeros(self._num_types)  # of q90, in units
        self._pending: deque[tuple[Floats, Floats | None]] = deque()

    def expect(self, mean: Floats, q90: Floats | None) -> None:
        self._pending.append((mean, q90))

    def score(self, actual: Floats) -> Floats | None:
        """[J] errors, in units, of the forecast for this interval; None if there was none."""
        if len(self._pending) < self._ahead:
            return None
        forecast, q90 = self._pending.popleft()
        error: Floats = self._errors[self._num_errors % MEMORY_INTERVALS]
        _score(_own(actual), _own(forecast), self._interval_s, error, self._relative)
        if q90 is not None:
            missed = actual > q90 + self._correction * _unit(forecast, self._interval_s)
            step = CORRECTION_STEP / np.sqrt(self._interval_s)
            self._correction += step * np.where(missed, 0.9, -0.1)
        self._num_errors += 1
        return error

    def around(self, mean: Floats, drift: Drift) -> Forecast:
        """The forecast `mean`[J] with its quantiles, never below zero and never crossing."""
        errors = np.sort(self._errors[: self._num_errors], axis=0)
        q50, q90 = _around(_own(mean), self._interval_s, errors)
        return self._forecast(mean, q50, q90, drift)

    def corrected(self, mean: Floats, q50: Floats, q90: Floats, drift: Drift) -> Forecast:
        """The forecaster's own quantiles, q90 as corrected by now."""
        corrected = q90 + self._correction * _unit(mean, self._interval_s)
        return self._forecast(mean, q50, corrected, drift)

    def _forecast(self, mean: Floats, q50: Floats, q90: Floats, drift: Drift) -> Forecast:
        q50s = [max(rate, 0.0) for rate in q50.tolist()]
        q90s = map(max, q90.tolist(), q50s)
        means, relative = tuple(mean.tolist()), tuple(self._relative.tolist())
        return Forecast(means, tuple(q50s), tuple(q90s), relative, self._ahead, drift)


class DriftDetector:
    """Drifting: of the last DRIFT_INTERVALS errors of a type at least half are larger than
    DRIFT_FACTOR times its usual error, the root mean square of those before.

    So one burst is no drift, and a level that the forecaster has learnt is none any more. The usual
    error is at least that of Poisson counts. No verdict before twice DRIFT_INTERVALS errors.
    """

    def __init__(self, num_types: int, interval_s: float) -> None:
        self._num_types, self._poisson = num_types, 1.0 / interval_s
        self.reset()

    def reset(self) -> None:
        self._recent = np.empty((DRIFT_INTERVALS, self._num_types))  # squares, in turns
        self._usual = np.zeros(self._num_types)  # mean square
        self._num_errors = 0

    def observe(self, error: Floats) -> None:
        place, seen = self._num_errors % DRIFT_INTERVALS, self._num_errors - DRIFT_INTERVALS + 1
        if seen > 0:
            weight = max(1.0 / seen, 1.0 / USUAL_INTERVALS)
            self._usual += weight * (self._recent[place] - self._usual)
        self._recent[place] = error**2
        self._num_errors += 1

    @property
    def state(self) -> Drift:
        if self._num_errors < 2 * DRIFT_INTERVALS:
            return Drift.STABLE
        large = _most_large(self._recent, self._usual, self._poisson)
        return Drift.DRIFTING if 2 * large >= DRIFT_INTERVALS else Drift.STABLE


class ErrorTracker:
    """Errors of the forecasts of J types at several horizons, counted in intervals."""

    def __init__(self, num_types: int, interval_s: float, horizons: Sequence[int] = (1,)) -> None:
        if interval_s <= 0 or 1 not in horizons or min(horizons) < 1:
            raise InvalidRequestError(
                f"a forecaster needs interval_s > 0 and horizons of 1 interval and more, 1 among "
                f"them, got {interval_s} and {tuple(horizons)}."
            )
        _warm_up()
        self._horizons = {h: HorizonErrors(num_types, interval_s, h) for h in sorted(horizons)}
        self._drift = DriftDetector(num_types, interval_s)

    @property
    def horizons(self) -> tuple[int, ...]:
        return tuple(self._horizons)

    def reset(self) -> None:
        for errors in self._horizons.values():
            errors.reset()
        self._drift.reset()

    def observe(self, actual: Floats) -> None:
        """Score the forecasts of the interval that just ended."""
        for ahead, errors in self._horizons.items():
            error = errors.score(actual)
            if ahead == 1 and error is not None:
                self._drift.observe(error)

    def expect(self, ahead: int, mean: Floats, q90: Floats | None = None) -> None:
        """Remember the forecast of the interval `ahead` intervals after the last one observed."""
        self._horizons[ahead].expect(mean, q90)

    def around(self, ahead: int, mean: Floats) -> Forecast:
        """`mean`[J] with quantiles from recent errors."""
        return self._horizons[ahead].around(mean, self._drift.state)

    def with_quantiles(self, ahead: int, mean: Floats, q50: Floats, q90: Floats) -> Forecast:
        """The same with the forecaster's own quantiles, q90 corrected."""
        return self._horizons[ahead].corrected(mean, q50, q90, self._drift.state)

    def check(self, ahead: int) -> None:
        """Raises InvalidRequestError for a horizon that is not looked at."""
        if ahead not in self._horizons:
            raise InvalidRequestError(
                f"this forecaster looks {', '.join(map(str, self._horizons))} intervals ahead, not "
                f"{ahead}; build it with that horizon."
            )
