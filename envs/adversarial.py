"""Traffic made to mislead: what a policy that switches meets at its worst. Pure.

Each shape takes a window of a trace as it is and keeps, drops or repeats its requests, so that
lengths and order stay real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from controller.workload import assign
from engine.cluster import WorkloadTyping
from engine.errors import InvalidRequestError
from envs.scenarios import Disturbances, Span
from envs.workload import Trace

Kind = Literal["square", "vanishing", "bursts", "stale"]
LOW = 0.3  # of the traffic that a square wave keeps in the second half of each period
BURST_SHARE, BURST_FACTOR = 0.1, 3  # of each period, and how many times the traffic it has then
STALE_SHARE = 0.5  # of each period


@dataclass(frozen=True, slots=True)
class Adversary:
    """One way to mislead.

    square: the load drops in the second half of each period; vanishing: the most frequent type
    sends nothing in the second half of each; bursts: a tenth of each period has three times the
    traffic; stale: snapshots do not change in the first half of each period of a square wave.
    """

    kind: Kind
    period_s: float

    def __post_init__(self) -> None:
        if self.period_s <= 0:
            raise InvalidRequestError(f"a period must be longer than 0 s, got {self.period_s}.")

    def shape(self, window: Trace, typing: WorkloadTyping, rng: np.random.Generator) -> Trace:
        """The window, misleading."""
        phase = window.arrival_s % self.period_s / self.period_s
        match self.kind:
            case "square" | "stale":
                return _thin(window, np.where(phase < 0.5, 1.0, LOW), rng)
            case "vanishing":
                types = assign(typing, window.prompt_tokens, window.output_tokens)
                rules = types == np.bincount(types, minlength=1).argmax()
                return _thin(window, np.where(rules & (phase >= 0.5), 0.0, 1.0), rng)
            case "bursts":
                return _repeat(window, phase < BURST_SHARE, self.period_s * BURST_SHARE, rng)

    def disturbances(self, duration_s: float) -> Disturbances:
        """What happens besides traffic."""
        if self.kind != "stale":
            return Disturbances()
        starts_s = np.arange(0.0, duration_s, self.period_s).tolist()
        return Disturbances(stale=tuple(Span(s, s + STALE_SHARE * self.period_s) for s in starts_s))


def _thin(window: Trace, kept: NDArray[np.float64], rng: np.random.Generator) -> Trace:
    """Each request with its own probability [N]."""
    return _select(window, np.flatnonzero(rng.random(len(window)) < kept), None)


def _repeat(
    window: Trace, within: NDArray[np.bool_], width_s: float, rng: np.random.Generator
) -> Trace:
    """Requests `within` bursts [N] come again BURST_FACTOR - 1 times, a little later."""
    again = np.repeat(np.flatnonzero(within), BURST_FACTOR - 1)
    chosen = np.concatenate([np.arange(len(window)), again])
    arrival_s = window.arrival_s[chosen]
    arrival_s[len(window) :] += rng.uniform(0.0, 0.1 * width_s, len(again))
    return _select(window, chosen, np.minimum(arrival_s, window.duration_s))


def _select(window: Trace, chosen: NDArray[np.int64], at_s: NDArray[np.float64] | None) -> Trace:
    arrival_s = window.arrival_s[chosen] if at_s is None else at_s
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        arrival_s[order],
        window.prompt_tokens[chosen][order],
        window.output_tokens[chosen][order],
        window.duration_s,
    )
