"""Model-predictive control: tries every legal candidate in a simulator before it switches.

At each decision that is due, every legal row is rolled out over the horizon: the switch at once,
nothing after it. The row that keeps requests in the system for the shortest time is taken, if it
gains a margin over keep. With drawn futures that is a controller one could ship; with the true
future it shows what better forecasts would be worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError, TidewrightError
from policies.base import Future, Observation, Outlook, request_seconds
from policies.baselines import KEEP_ROW, one_hot


@dataclass(frozen=True, slots=True)
class MpcConfig:
    """How far and how often it looks ahead."""

    horizon_s: float = 300.0
    decisions: int = 4  # it looks at each n-th decision
    num_futures: int = 2  # drawn; of the true future there is one
    margin: float = 0.01  # share of keep's request-seconds that a switch must save

    def __post_init__(self) -> None:
        if self.horizon_s <= 0 or self.decisions < 1 or self.num_futures < 1:
            raise InvalidRequestError(
                f"looking ahead needs horizon_s > 0, decisions >= 1 and num_futures >= 1, got "
                f"{self.horizon_s}, {self.decisions} and {self.num_futures}."
            )


class MpcPolicy:
    """One outlook, hence one episode at a time; `name` says whose future it sees."""

    def __init__(self, outlook: Outlook, config: MpcConfig, name: str = "mpc") -> None:
        self.outlook, self._config, self.name = outlook, config, name
        self._count = 0

    def reset(self) -> None:
        self._count = 0

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        due, self._count = self._count % self._config.decisions == 0, self._count + 1
        if not due or observation.mask.sum() < 2:
            return one_hot(observation, KEEP_ROW)
        return one_hot(observation, int(np.argmin(self.relative_costs(observation))))

    def relative_costs(self, observation: Observation) -> NDArray[np.float64]:
        """[K] cost of each legal row as a share of keep's, whose own is 1 - margin: the least is
        what the rule takes; inf elsewhere."""
        futures = self.outlook.futures(self._config.horizon_s, self._config.num_futures)
        costs = np.full(len(observation.mask), np.inf)
        for row in np.flatnonzero(observation.mask):
            costs[row] = self._cost_s(int(row), futures)
        if costs[KEEP_ROW] == 0.0:  # nobody is there and nobody comes
            costs += 1.0
        elif np.isfinite(costs[KEEP_ROW]):
            costs /= costs[KEEP_ROW]
        costs[KEEP_ROW] *= 1.0 - self._config.margin
        return costs

    def _cost_s(self, row: int, futures: Sequence[Future]) -> float:
        """Mean request-seconds over the futures; inf where the switch cannot be made. What is
        still there at the end is charged once more for the time that requests took in the mean."""
        plan = self.outlook.plan(row)
        if row != KEEP_ROW and plan is None:
            return np.inf
        total_s = 0.0
        for future in futures:
            simulator = self.outlook.simulator()
            before = simulator.snapshot()
            try:
                after = simulator.rollout(before.now_s + self._config.horizon_s, future, plan)
            except TidewrightError:
                return np.inf
            spent_s, end = request_seconds(before, after), after.snapshot
            left = end.num_arrived - end.num_finished - end.num_rejected
            total_s += spent_s + left * spent_s / max(len(after.traffic.arrival_s), 1)
        return total_s / len(futures)
