"""Rules that need no training: keep, static, OServe's myopic rule, break-even hysteresis.

They read candidate features by name; `controller.observation` defines names and units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec

KEEP_ROW = 0


def _one_hot(observation: Observation, row: int) -> NDArray[np.float64]:
    """All probability on `row`, or on keep when `row` is masked."""
    chosen = row if observation.mask[row] else KEEP_ROW
    assert observation.mask[chosen], "keep must always be legal"
    probabilities = np.zeros(len(observation.mask), np.float64)
    probabilities[chosen] = 1.0
    return probabilities


def feature_column(spec: ObservationSpec, name: str) -> int:
    """Column of a candidate feature. Raises InvalidRequestError naming those that exist."""
    if name not in spec.candidate_features:
        raise InvalidRequestError(
            f"the observation has no candidate feature {name!r}, only "
            f"{', '.join(spec.candidate_features)}; this baseline cannot run on it."
        )
    return spec.candidate_features.index(name)


class KeepPolicy:
    """Never switches: the initial deployment serves throughout."""

    name = "keep"

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return _one_hot(observation, KEEP_ROW)


class StaticPolicy:
    """Goes to the deployment `key` as soon as it is a legal candidate, and stays."""

    def __init__(self, key: str) -> None:
        self.key, self.name = key, f"static {key}"

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        keys = observation.keys
        return _one_hot(observation, keys.index(self.key) if self.key in keys else KEEP_ROW)


class MyopicPolicy:
    """OServe's rule (arXiv 2602.12151, section 4): at each interval take the planner's optimum for
    the forecast, and switch whenever it differs from the present deployment, whatever it costs."""

    name = "myopic"

    def __init__(self, spec: ObservationSpec) -> None:
        self._optimum = feature_column(spec, "is_optimum")

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        marked = observation.candidates[: len(observation.keys), self._optimum] > 0.5
        return _one_hot(observation, int(np.argmax(marked)) if marked.any() else KEEP_ROW)


@dataclass(frozen=True, slots=True)
class HysteresisConfig:
    """When a gain counts as real."""

    horizon_s: float = 300.0  # how long the new deployment is expected to stay
    num_ticks: int = 2  # consecutive decisions at which the same candidate must pay off
    margin: float = 1.0  # times the cost that the gain must exceed


class HysteresisPolicy:
    """Break-even rule: switch when the gain over a dwell horizon exceeds the cost, m ticks running.

    With arrival rate r and mean latencies L_keep, L_new (so r * L_keep requests in flight), a
    dwell of H seconds saves r * H * (L_keep - L_new) request-seconds. A stop of s seconds delays
    the r * L_keep requests in flight by s and the r * s that arrive by s / 2 on average. Divided
    by r * L_keep:  H * (1 - L_new / L_keep) > margin * s * (1 + s / (2 * L_keep)).
    """

    name = "hysteresis"

    def __init__(self, spec: ObservationSpec, config: HysteresisConfig | None = None) -> None:
        self._config = config or HysteresisConfig()
        self._latency = feature_column(spec, "log_latency")
        self._switch = feature_column(spec, "switch_s")
        self._pending, self._streak = "", 0

    def reset(self) -> None:
        self._pending, self._streak = "", 0

    def _advantage_s(self, observation: Observation) -> NDArray[np.float64]:
        """Gain minus cost of each filled row in seconds; keep is zero, masked rows -inf."""
        rows = observation.candidates[: len(observation.keys)].astype(np.float64)
        latency_s, stop_s = np.exp(rows[:, self._latency]), rows[:, self._switch]
        gain_s = self._config.horizon_s * (1.0 - latency_s / latency_s[KEEP_ROW])
        cost_s = stop_s * (1.0 + stop_s / (2.0 * latency_s[KEEP_ROW]))
        advantage_s = gain_s - self._config.margin * cost_s
        advantage_s[KEEP_ROW] = 0.0
        return np.where(observation.mask[: len(rows)], advantage_s, -np.inf)

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        row = int(np.argmax(self._advantage_s(observation)))
        if row == KEEP_ROW:
            self.reset()
            return _one_hot(observation, KEEP_ROW)
        key = observation.keys[row]
        self._streak = self._streak + 1 if key == self._pending else 1
        self._pending = key
        return _one_hot(observation, row if self._streak >= self._config.num_ticks else KEEP_ROW)
