"""What may happen in an episode, drawn from stated ranges: how traffic moves, which devices fail
when, when metrics go stale, and how far the surrogate's times are off. Pure.

A range is (low, high). Values are drawn uniformly in the logarithm, or uniformly when low is 0.
Mean gaps are those of exponential stays; a gap drawn as 0 means never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np

from engine.errors import InvalidRequestError
from envs.workload import WorkloadConfig

Range = tuple[float, float]
NEVER: Range = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ScenarioConfig:
    """Ranges that every episode draws its own values from; seconds unless said otherwise."""

    cycle_s: Range = (1800.0, 14_400.0)  # one "day"
    cycle_amplitude: Range = (0.0, 0.6)  # of the mean rate
    regime_s: Range = (120.0, 1800.0)  # mean stay in one mix and level
    mix_concentration: Range = (0.4, 2.0)  # Dirichlet parameter; small = one type rules
    level_sigma: Range = (0.1, 0.4)  # spread of ln(rate level) between regimes
    burst_gap_s: Range = (300.0, 3600.0)
    burst_s: Range = (5.0, 60.0)  # mean length
    burst_factor: Range = (1.5, 4.0)  # times the rate
    length_sigma: Range = (0.0, 0.2)  # of ln(median lengths) of each type
    blackout_gap_s: Range = NEVER  # a type that sends nothing
    blackout_s: Range = (60.0, 600.0)
    failure_gap_s: Range = NEVER  # a device that is lost, anywhere in the pool
    failure_s: Range = (60.0, 600.0)  # until it is back
    stale_gap_s: Range = NEVER  # snapshots that do not change
    stale_s: Range = (15.0, 120.0)
    spread: Range = (0.0, 0.1)  # of ln(step times) and ln(switch times): the calibration's error

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = getattr(self, field.name)
            if not 0.0 <= low <= high < np.inf:
                raise InvalidRequestError(
                    f"scenario range {field.name} is [{low}, {high}]; expected two numbers of 0 or "
                    "more, the smaller first."
                )


@dataclass(frozen=True, slots=True)
class DeviceFailure:
    """A device is lost at `at_s` and back, empty, at `back_at_s`."""

    at_s: float
    device: int
    back_at_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """[start_s, stop_s)."""

    start_s: float
    stop_s: float

    def covers(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.stop_s


@dataclass(frozen=True, slots=True)
class Disturbances:
    """Of one episode, in seconds from its start. In a `stale` span the pipeline gets the last
    snapshot from before it, with its old measuring times; events still arrive."""

    failures: tuple[DeviceFailure, ...] = ()
    stale: tuple[Span, ...] = ()


@runtime_checkable
class FailureDrivable(Protocol):
    """A cluster whose devices can be made to fail."""

    def schedule_failures(self, failures: Sequence[DeviceFailure]) -> None:
        """Lose and regain devices at these times of the cluster's clock, none of them past."""
        ...


def draw(bounds: Range, rng: np.random.Generator) -> float:
    """One value of a range."""
    low, high = bounds
    if low <= 0.0:
        return float(rng.uniform(low, high))
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_workload(
    scenario: ScenarioConfig, base: WorkloadConfig, rng: np.random.Generator
) -> WorkloadConfig:
    """`base` with everything that moves drawn anew; its types keep their names and spreads."""
    names = (
        "cycle_s",
        "cycle_amplitude",
        "regime_s",
        "mix_concentration",
        "level_sigma",
        "burst_gap_s",
        "burst_s",
        "burst_factor",
        "blackout_gap_s",
        "blackout_s",
    )
    drawn = {name: draw(getattr(scenario, name), rng) for name in names}
    sigma = draw(scenario.length_sigma, rng)
    types = []
    for kind in base.types:
        prompt, output = np.exp(sigma * rng.standard_normal(2)).tolist()
        types.append(
            replace(
                kind,
                prompt_tokens=kind.prompt_tokens * prompt,
                output_tokens=kind.output_tokens * output,
            )
        )
    return replace(base, types=tuple(types), **drawn)  # type: ignore[arg-type]


def draw_spans(
    gap: Range, length: Range, duration_s: float, rng: np.random.Generator
) -> tuple[Span, ...]:
    """Spans in [0, duration_s) that do not overlap, their means drawn once."""
    gap_s, length_s = draw(gap, rng), draw(length, rng)
    spans: list[Span] = []
    if gap_s <= 0.0:
        return ()
    at_s = rng.exponential(gap_s)
    while at_s < duration_s:
        stop_s = at_s + rng.exponential(length_s)
        spans.append(Span(float(at_s), float(stop_s)))
        at_s = stop_s + rng.exponential(gap_s)
    return tuple(spans)


def draw_disturbances(
    scenario: ScenarioConfig, num_devices: int, duration_s: float, rng: np.random.Generator
) -> Disturbances:
    """Failures one at a time, so that a pool of two devices or more never loses all of them."""
    lost = draw_spans(scenario.failure_gap_s, scenario.failure_s, duration_s, rng)
    failures = tuple(
        DeviceFailure(span.start_s, int(rng.integers(num_devices)), span.stop_s) for span in lost
    )
    stale = draw_spans(scenario.stale_gap_s, scenario.stale_s, duration_s, rng)
    return Disturbances(failures, stale)
