"""Whether a policy has come to serve other conditions than it was trained on. Pure.

Two figures are compared with what they were on the surrogate when the policy was validated: the
error of the forecast, and how far the latency seen is from the planner's estimate. The second tells
a surrogate that no longer predicts what the engine does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from controller.decision import KEEP, PreparedDecision
from engine.errors import InvalidRequestError

FIGURES = ("forecast_error", "log_latency_ratio")


@dataclass(frozen=True, slots=True)
class Expected:
    """One figure on validation traffic: its smoothed value's mean and standard deviation."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.std >= 0):
            raise InvalidRequestError(
                f"what a figure is expected to be needs a finite mean and a std of 0 or more, got "
                f"{self.mean} and {self.std}."
            )


@dataclass(frozen=True, slots=True)
class RetrainingConfig:
    """When another training is advised."""

    memory_ticks: int = 40  # of the smoothed figures
    sigmas: float = 4.0  # from the expected mean that are too far
    least_std: float = 0.05  # in place of a smaller one: nothing is known so exactly
    ticks: int = 40  # in a row that a figure must be too far off


@dataclass(frozen=True, slots=True)
class RetrainingState:
    """`reasons` say which figures are off since how many ticks; empty when nothing is advised."""

    reasons: tuple[str, ...]
    smoothed: Mapping[str, float]

    @property
    def is_advised(self) -> bool:
        return bool(self.reasons)


def figures_of(prepared: PreparedDecision) -> dict[str, float]:
    """The figures that one tick shows; those that are not known are left out."""
    errors, rates = prepared.forecast.relative_error, np.array(prepared.monitor_state.rates[0])
    found: dict[str, float] = {}
    if rates.sum() > 0:
        found["forecast_error"] = float(np.average(errors, weights=rates))
    seen_s, expected_s = prepared.monitor_state.latency_s, prepared.candidates[KEEP].latency_s
    if seen_s > 0 and expected_s > 0 and not prepared.monitor_state.is_stale:
        found["log_latency_ratio"] = math.log(seen_s / expected_s)
    return found


class Smoothing:
    """Exponentially weighted means of figures, each over the ticks that showed it."""

    def __init__(self, memory_ticks: int) -> None:
        self._keep = 1.0 - 1.0 / memory_ticks
        self.values: dict[str, float] = {}

    def observe(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            before = self.values.get(name, value)
            self.values[name] = self._keep * before + (1.0 - self._keep) * value


class RetrainingTrigger:
    """One life of a controller under one policy. `observe` each tick's figures once."""

    def __init__(
        self, expected: Mapping[str, Expected], config: RetrainingConfig | None = None
    ) -> None:
        self.expected, self._config = dict(expected), config or RetrainingConfig()
        self._smoothing = Smoothing(self._config.memory_ticks)
        self._off = dict.fromkeys(self.expected, 0)

    def observe(self, figures: Mapping[str, float]) -> RetrainingState:
        self._smoothing.observe(figures)
        for name, expected in self.expected.items():
            if name in figures:
                self._off[name] = self._off[name] + 1 if self._is_off(name, expected) else 0
        return self.state

    def _is_off(self, name: str, expected: Expected) -> bool:
        """The forecast's error only when it is larger; the latency either way."""
        distance = self._smoothing.values[name] - expected.mean
        if name != "forecast_error":
            distance = abs(distance)
        return distance > self._config.sigmas * max(expected.std, self._config.least_std)

    @property
    def state(self) -> RetrainingState:
        values = self._smoothing.values
        reasons = tuple(
            f"{name} is {values[name]:.3f}, on validation traffic it was "
            f"{self.expected[name].mean:.3f} +- {self.expected[name].std:.3f}"
            for name, ticks in self._off.items()
            if ticks >= self._config.ticks
        )
        return RetrainingState(reasons, dict(values))


def expected_from(facts: Mapping[str, Any]) -> dict[str, Expected]:
    """What a checkpoint's manifest says; nothing where it says nothing.

    Raises InvalidRequestError.
    """
    return {
        name: Expected(float(value["mean"]), float(value["std"]))
        for name, value in dict(facts.get("expected", {})).items()
        if name in FIGURES
    }
