"""The rules on observations small enough to decide by hand."""

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec
from policies.baselines import (
    HysteresisConfig,
    HysteresisPolicy,
    KeepPolicy,
    MyopicPolicy,
    StaticPolicy,
)

SPEC = ObservationSpec(("x",), ("is_keep", "is_optimum", "log_latency", "switch_s"), 4, 15.0)
KEYS = ("4xtp1pp1", "1xtp4pp1", "2xtp2pp1")


def observation(
    latency_s: tuple[float, ...] = (10.0, 9.0, 5.0),
    stop_s: tuple[float, ...] = (0.0, 1.0, 20.0),
    optimum: int = 2,
    legal: tuple[int, ...] = (0, 1, 2),
) -> Observation:
    rows = np.zeros((4, 4), np.float32)
    rows[0, 0], rows[optimum, 1] = 1.0, 1.0
    rows[:3, 2], rows[:3, 3] = np.log(latency_s), stop_s
    mask = np.isin(np.arange(4), legal)
    return Observation(np.zeros(1, np.float32), rows, mask, KEYS)


def test_keep_and_static() -> None:
    assert KeepPolicy().probabilities(observation()).tolist() == [1, 0, 0, 0]
    static = StaticPolicy("1xtp4pp1")
    assert static.probabilities(observation()).tolist() == [0, 1, 0, 0]
    assert static.probabilities(observation(legal=(0, 2))).tolist() == [1, 0, 0, 0]
    assert StaticPolicy("1xtp2pp2").probabilities(observation()).tolist() == [1, 0, 0, 0]


def test_myopic_takes_the_optimum_whatever_it_costs() -> None:
    myopic = MyopicPolicy(SPEC)
    assert myopic.probabilities(observation()).argmax() == 2
    assert myopic.probabilities(observation(stop_s=(0, 1, 1e6))).argmax() == 2
    assert myopic.probabilities(observation(optimum=0)).argmax() == 0
    assert myopic.probabilities(observation(legal=(0, 1))).argmax() == 0


def test_hysteresis_breaks_even_by_hand() -> None:
    """Row 2 halves 10 s: gain 0.5 H. A stop of 20 s costs 20 (1 + 20/20) = 40: H = 80 breaks even.
    Row 1 saves a tenth: 0.1 H = 8 against 1 (1 + 1/20) = 1.05 at H = 80."""
    below = HysteresisPolicy(SPEC, HysteresisConfig(horizon_s=8.0, num_ticks=1))
    assert below.probabilities(observation()).argmax() == 0  # 0.8 < 1.05, 4 < 40
    middle = HysteresisPolicy(SPEC, HysteresisConfig(horizon_s=80.0, num_ticks=1))
    assert middle.probabilities(observation()).argmax() == 1  # 6.95 against 0
    above = HysteresisPolicy(SPEC, HysteresisConfig(horizon_s=200.0, num_ticks=1))
    assert above.probabilities(observation()).argmax() == 2  # 60 against 18.95
    dearer = HysteresisPolicy(SPEC, HysteresisConfig(200.0, num_ticks=1, margin=2.5))
    assert dearer.probabilities(observation()).argmax() == 1  # 0 against 17.4


def test_hysteresis_waits_for_consecutive_ticks() -> None:
    rule = HysteresisPolicy(SPEC, HysteresisConfig(horizon_s=200.0, num_ticks=3))
    good, bad = observation(), observation(latency_s=(10, 10, 10))
    seen = [int(rule.probabilities(o).argmax()) for o in (good, good, bad, good, good, good)]
    assert seen == [0, 0, 0, 0, 0, 2]
    rule.reset()
    assert rule.probabilities(good).argmax() == 0
    other = observation(legal=(0, 1))  # another candidate starts a streak of its own
    seen = [int(rule.probabilities(o).argmax()) for o in (good, other, other, other)]
    assert seen == [0, 0, 0, 1]


def test_hysteresis_on_masked_rows() -> None:
    rule = HysteresisPolicy(SPEC, HysteresisConfig(horizon_s=200.0, num_ticks=1))
    assert rule.probabilities(observation(legal=(0,))).tolist() == [1, 0, 0, 0]


def test_a_missing_feature_is_named() -> None:
    poor = ObservationSpec(("x",), ("is_keep",), 4, 15.0)
    with pytest.raises(
        InvalidRequestError, match="no candidate feature 'is_optimum', only is_keep"
    ):
        MyopicPolicy(poor)
