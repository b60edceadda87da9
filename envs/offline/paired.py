"""Two policies on the same traffic: the gain of one over the other, with an interval.

Rewards of an interval are paired by window and time, so what the traffic did to both cancels out.
Blocks of a window are drawn together, since what lasts over minutes makes neighbours alike: the
moving-block bootstrap over each window, and over windows where there are enough of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from envs.offline.course import WorstBlock, worst_block
from policies.ope_data import Floats
from policies.ope_interval import draw_blocks

FEW_WINDOWS = 6  # from which on windows are drawn too


@dataclass(frozen=True, slots=True, eq=False)
class Rewards:
    """Of one policy in one window, [T] per interval, and the requests that arrived in each."""

    reward: Floats
    arrived: Floats


@dataclass(frozen=True, slots=True)
class Gain:
    """J of one policy over another; `interval` None: too little traffic for one."""

    gain_j: float
    interval: tuple[float, float] | None
    worst: WorstBlock | None
    worst_window: int


def value_j(windows: Sequence[Rewards], scale: float) -> float:
    """Mean utility of a request."""
    arrived = sum(float(w.arrived.sum()) for w in windows)
    return scale * sum(float(w.reward.sum()) for w in windows) / max(arrived, 1e-9)


def paired_gain(
    ours: Sequence[Rewards],
    theirs: Sequence[Rewards],
    scale: float,
    grid_s: float,
    block_s: float = 1200.0,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Gain:
    """`scale`: requests that a reward of 1 stands for."""
    differences = [scale * (a.reward - b.reward) for a, b in zip(ours, theirs, strict=True)]
    arrived = [w.arrived for w in theirs]
    total = max(sum(float(a.sum()) for a in arrived), 1e-9)
    worsts = [
        (found, number)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if (found := worst_block(a.reward, b.reward, b.arrived, grid_s, scale))
    ]
    worst, number = min(worsts, key=lambda w: w[0].ratio, default=(None, 0))
    return Gain(
        sum(float(d.sum()) for d in differences) / total,
        _interval(differences, arrived, max(1, round(block_s / grid_s)), level, draws, seed),
        worst,
        number,
    )


def _interval(
    differences: Sequence[Floats],
    arrived: Sequence[Floats],
    block: int,
    level: float,
    draws: int,
    seed: int,
) -> tuple[float, float] | None:
    """Percentiles, widened for the few blocks that there are; None with fewer than 4 blocks."""
    blocks = sum(len(d) / block for d in differences)
    if blocks < 4:
        return None
    rng, found = np.random.default_rng(seed), np.zeros(draws)
    number = len(differences)
    for draw in range(draws):
        chosen = rng.integers(number, size=number) if number >= FEW_WINDOWS else range(number)
        gains = requests = 0.0
        for window in chosen:
            index = draw_blocks(len(differences[window]), block, rng)
            gains += float(differences[window][index].sum())
            requests += float(arrived[window][index].sum())
        found[draw] = gains / max(requests, 1e-9)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    middle, widen = float(np.mean(found)), float(np.sqrt(blocks / (blocks - 1)))
    return middle + widen * (low - middle), middle + widen * (high - middle)
