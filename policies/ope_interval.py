"""Estimates with intervals from one long, non-stationary log: moving-block bootstrap over time.

Decisions near one another share traffic and effects, so whole blocks of them are drawn, longer
than the effect window (Kuensch 1989). Blocks are laid over the log as a circle, so that every
decision is drawn equally often (Politis and Romano 1992).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Ints], Floats]
"""Indices of decisions, [T] with repetitions -> (target, target - behaviour), [2]."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean reward per decision of a target policy, and how much more that is than the log's.

    Intervals are None where there are too few blocks; all numbers where it was refused.
    """

    estimator: str
    value: float | None
    gain: float | None  # over the policy that ran
    value_interval: tuple[float, float] | None = None
    gain_interval: tuple[float, float] | None = None
    refusal: str = ""  # why there is no number, and what data is missing
    note: str = ""  # what a reader must know of the number

    @property
    def is_refused(self) -> bool:
        return self.value is None


def t_quantile(p: float, degrees: float) -> float:
    """Of Student's distribution, by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5);
    within 1 % for 4 degrees of freedom or more at p up to 0.975."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def draw_blocks(num_decisions: int, block: int, rng: np.random.Generator) -> Ints:
    """[T] indices: blocks that begin anywhere, end to end, around the log as a circle."""
    number = -(-num_decisions // block)
    starts = rng.integers(0, num_decisions, number)
    index = (starts[:, None] + np.arange(block)).ravel()[:num_decisions]
    return np.asarray(index % num_decisions, np.int64)


def standard_errors(
    statistic: Statistic, num_decisions: int, block: int, draws: int, rng: np.random.Generator
) -> Floats:
    """[2] over bootstrap samples, scaled up for the mean that blocks share: with n of them the
    spread of their resampled means falls short by (n - 1) / n."""
    found = np.array(
        [statistic(draw_blocks(num_decisions, block, rng)) for _ in range(draws)], np.float64
    )
    number = num_decisions / block
    return np.asarray(found.std(axis=0, ddof=1) * np.sqrt(number / max(number - 1, 1)))


def interval(
    middle: float, error: float, num_blocks: float, level: float = 0.95
) -> tuple[float, float]:
    """Student's, with as many degrees of freedom as there are blocks, less one."""
    half = t_quantile(0.5 + level / 2, max(num_blocks - 1, 1.0)) * error
    return middle - half, middle + half
