"""Exponential smoothing chosen automatically, by statsforecast: optional, `pip install
'tidewright[ets]'`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from controller.forecast_errors import Floats
from controller.predictor import TrackedPredictor
from engine.errors import InvalidRequestError

LEAST_INTERVALS = 10  # before the first fit; until then the last value


class AutoEtsPredictor(TrackedPredictor):
    """For each type the error, trend and season model with the least AICc on the last
    `memory_intervals`, fitted every `refit_intervals` and carried forward in between.

    Quantiles are the model's own: the ends of its central 80 % interval and its mean.
    Raises InvalidRequestError when statsforecast is not installed.
    """

    name = "autoets"

    def __init__(
        self,
        num_types: int,
        memory_intervals: int = 240,
        refit_intervals: int = 20,
        interval_s: float = 15.0,
        horizons: Sequence[int] = (1,),
    ) -> None:
        super().__init__(num_types, interval_s, horizons)
        try:
            self._auto_ets: Any = import_module("statsforecast.models").AutoETS
        except ImportError as error:
            raise InvalidRequestError(
                "predictor 'autoets' needs statsforecast, which is not installed; run "
                "`pip install 'tidewright[ets]'` or choose another predictor."
            ) from error
        self._past: deque[Floats] = deque(maxlen=memory_intervals)
        self._refit = refit_intervals
        self._forget()

    def _forget(self) -> None:
        self._past.clear()
        self._models: list[Any] = []
        self._age = 0
        self._said = np.zeros((2, max(self.horizons), self._num_types))

    def _learn(self, actual: Floats) -> None:
        self._past.append(actual)
        self._said = np.broadcast_to(actual, self._said.shape)
        if len(self._past) < LEAST_INTERVALS:
            return
        past, steps = np.array(self._past), max(self.horizons)
        if not self._models or self._age >= self._refit:
            self._models = [self._auto_ets(season_length=1).fit(column) for column in past.T]
            self._age = 0
        self._age += 1
        said = [
            model.forward(column, h=steps, level=[80])
            for model, column in zip(self._models, past.T, strict=True)
        ]
        rows = [[s["mean"] for s in said], [s["hi-80"] for s in said]]
        self._said = np.maximum(np.array(rows, np.float64).transpose(0, 2, 1), 0.0)

    def _mean(self, ahead: int) -> Floats:
        return np.asarray(self._said[0, ahead - 1])

    def _quantiles(self, ahead: int) -> tuple[Floats, Floats] | None:
        mean, q90 = self._said[:, ahead - 1]
        return (mean, q90) if self._models else None
