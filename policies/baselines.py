"""Rules that need no training: keep, static, myopic, greedy, scaling, hysteresis, work function.

They read candidate features by name; `controller.observation` defines names and units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec

KEEP_ROW = 0
OneOrMany = TypeVar("OneOrMany", float, NDArray[np.float64])


def one_hot(observation: Observation, row: int) -> NDArray[np.float64]:
    """All probability on `row`, or on keep when `row` is masked."""
    chosen = row if observation.mask[row] else KEEP_ROW
    assert observation.mask[chosen], "keep must always be legal"
    probabilities = np.zeros(len(observation.mask), np.float64)
    probabilities[chosen] = 1.0
    return probabilities


def _column(names: tuple[str, ...], name: str, kind: str) -> int:
    if name not in names:
        raise InvalidRequestError(
            f"the observation has no {kind} feature {name!r}, only "
            f"{', '.join(names)}; this baseline cannot run on it."
        )
    return names.index(name)


def state_column(spec: ObservationSpec, name: str) -> int:
    """Index of a state feature. Raises InvalidRequestError naming those that exist."""
    return _column(spec.state_features, name, "state")


def feature_column(spec: ObservationSpec, name: str) -> int:
    """Column of a candidate feature. Raises InvalidRequestError naming those that exist."""
    return _column(spec.candidate_features, name, "candidate")


class KeepPolicy:
    """Never switches: the initial deployment serves throughout."""

    name = "keep"

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return one_hot(observation, KEEP_ROW)


class StaticPolicy:
    """Goes to the deployment `key` as soon as it is a legal candidate, and stays."""

    def __init__(self, key: str) -> None:
        self.key, self.name = key, f"static {key}"

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        keys = observation.keys
        return one_hot(observation, keys.index(self.key) if self.key in keys else KEEP_ROW)


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
        return one_hot(observation, int(np.argmax(marked)) if marked.any() else KEEP_ROW)


class GreedyPolicy:
    """As Nitsum (arXiv 2605.05467) takes parallelism as something to turn every second: always the
    fastest of the deployments that hold the high forecast; where none does, the one that holds
    most of it."""

    name = "greedy"

    def __init__(self, spec: ObservationSpec) -> None:
        self._latency = feature_column(spec, "log_latency")
        self._headroom = feature_column(spec, "headroom_q90")

    def reset(self) -> None:
        """Nothing to clear."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        rows = observation.candidates[: len(observation.keys)].astype(np.float64)
        legal, holds = observation.mask[: len(rows)], rows[:, self._headroom] >= 1.0
        if (legal & holds).any():
            worth = np.where(legal & holds, -rows[:, self._latency], -np.inf)
        else:
            worth = np.where(legal, rows[:, self._headroom], -np.inf)
        return one_hot(observation, int(np.argmax(worth)))


class ScalingPolicy:
    """As Dynamo's planner counts replicas: the fewest devices that hold the high forecast times a
    correction, the latency seen over the latency expected; where none does, the most headroom."""

    name = "scaling"
    LIMITS = (0.8, 2.0)  # of the correction

    def __init__(self, spec: ObservationSpec) -> None:
        self._headroom = feature_column(spec, "headroom_q90")
        self._latency = feature_column(spec, "log_latency")
        self._devices = feature_column(spec, "devices_used")
        self._seen = state_column(spec, "log_latency")
        self._known = state_column(spec, "latency_known")

    def reset(self) -> None:
        """Nothing to clear."""

    def _correction(self, observation: Observation) -> float:
        if observation.state[self._known] < 0.5:
            return 1.0
        seen_s = math.expm1(float(observation.state[self._seen]))
        expected_s = math.exp(float(observation.candidates[KEEP_ROW, self._latency]))
        return float(np.clip(seen_s / expected_s, *self.LIMITS))

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        rows = observation.candidates[: len(observation.keys)].astype(np.float64)
        legal, headroom = observation.mask[: len(rows)], rows[:, self._headroom]
        enough = legal & (headroom >= self._correction(observation))
        if enough.any():
            order = np.lexsort((-headroom, np.where(enough, rows[:, self._devices], np.inf)))
            return one_hot(observation, int(order[0]))
        return one_hot(observation, int(np.argmax(np.where(legal, headroom, -np.inf))))


def switch_cost_s(stop_s: OneOrMany, latency_s: float) -> OneOrMany:
    """What a stop costs, in request-seconds per arrival rate: the requests in flight, latency_s of
    arrivals, wait for all of it, and those that arrive in it half of it on average."""
    return stop_s * (latency_s + stop_s / 2.0)


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

    def _advantage_s(self, observation: Observation) -> list[float]:
        """Gain minus cost of each filled row in seconds; keep is zero, masked rows -inf."""
        rows = observation.candidates[: len(observation.keys)]
        keep_s, *others_s = map(math.exp, rows[:, self._latency].tolist())
        stops_s, found = rows[:, self._switch].tolist(), [0.0]  # few: floats beat arrays
        for latency_s, stop_s in zip(others_s, stops_s[1:], strict=True):
            gain_s = self._config.horizon_s * (1.0 - latency_s / keep_s)
            found.append(gain_s - self._config.margin * (switch_cost_s(stop_s, keep_s) / keep_s))
        legal = observation.mask[: len(rows)].tolist()
        return [a if is_legal else -math.inf for a, is_legal in zip(found, legal, strict=True)]

    def relative_costs(self, observation: Observation) -> NDArray[np.float64]:
        """[K] what each legal row costs over the horizon as a share of what keep does, whatever
        was seen before; inf elsewhere."""
        costs = np.full(len(observation.mask), np.inf)
        advantage_s = self._advantage_s(observation)
        costs[: len(advantage_s)] = [1.0 - a / self._config.horizon_s for a in advantage_s]
        return costs

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        advantage_s = self._advantage_s(observation)
        row = advantage_s.index(max(advantage_s))
        if row == KEEP_ROW:
            self.reset()
            return one_hot(observation, KEEP_ROW)
        key = observation.keys[row]
        self._streak = self._streak + 1 if key == self._pending else 1
        self._pending = key
        return one_hot(observation, row if self._streak >= self._config.num_ticks else KEEP_ROW)


class WorkFunctionPolicy:
    """The work-function algorithm for metrical task systems (Borodin, Linial and Saks 1992).

    w(k) is the least cost of any course of switches that has met the traffic so far and ends in k.
    With the traffic's cost of an interval c(k) = grid * latency(k), per arrival rate,
        w(k) <- min_j (w(j) + c(j) + d(j, k)),
    and the rule goes to the k with the least w(k) + c(k) + d(now, k), before w is renewed.
    A deployment that is no candidate for a while is forgotten; one that comes new is as if reached
    just now. Only switches from the present one are priced in an observation; between two others
    the dearer of them counts.
    """

    name = "work function"

    def __init__(self, spec: ObservationSpec) -> None:
        self._grid_s = spec.grid_s
        self._latency = feature_column(spec, "log_latency")
        self._switch = feature_column(spec, "switch_s")
        self._work: dict[str, float] = {}

    def reset(self) -> None:
        self._work = {}

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        keys = observation.keys
        rows = observation.candidates[: len(keys)].astype(np.float64)
        latency_s = np.exp(rows[:, self._latency])
        price = switch_cost_s(rows[:, self._switch], latency_s[KEEP_ROW])
        between = np.maximum(price[:, None], price[None, :])  # [j, k]
        np.fill_diagonal(between, 0.0)
        known = self._work.get(keys[KEEP_ROW], 0.0)
        work = np.array([self._work.get(k, known + p) for k, p in zip(keys, price, strict=True)])
        work += self._grid_s * latency_s
        total = np.where(observation.mask[: len(keys)], work + price, np.inf)
        work = (work[:, None] + between).min(axis=0)
        self._work = dict(zip(keys, (work - work.min()).tolist(), strict=True))
        return one_hot(observation, int(np.argmin(total)))
