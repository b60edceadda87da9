"""When another training is advised, by hand and on the surrogate."""

from __future__ import annotations

import math

import pytest

from controller.retraining import (
    Expected,
    RetrainingConfig,
    RetrainingTrigger,
    Smoothing,
    expected_from,
    figures_of,
)
from engine.errors import InvalidRequestError
from envs.registered import make_surrogate

CONFIG = RetrainingConfig(memory_ticks=1, sigmas=3.0, least_std=0.01, ticks=3)
EXPECTED = {"forecast_error": Expected(0.2, 0.05), "log_latency_ratio": Expected(0.0, 0.1)}


def states(values: list[dict[str, float]]) -> list[bool]:
    trigger = RetrainingTrigger(EXPECTED, CONFIG)
    return [trigger.observe(v).is_advised for v in values]


def test_fires_after_enough_ticks_in_a_row() -> None:
    off, fine = {"log_latency_ratio": 0.31}, {"log_latency_ratio": 0.29}
    assert states([off, off, off]) == [False, False, True]
    assert states([off, off, fine, off, off]) == [False] * 5
    assert states([off, off, off, fine]) == [False, False, True, False]


def test_latency_may_be_off_either_way_and_the_forecast_only_be_worse() -> None:
    assert states([{"log_latency_ratio": -0.31}] * 3)[-1]
    assert not states([{"forecast_error": 0.0}] * 3)[-1]
    assert states([{"forecast_error": 0.36}] * 3)[-1]


def test_a_tick_that_does_not_know_a_figure_says_nothing_of_it() -> None:
    off: dict[str, float] = {"log_latency_ratio": 1.0}
    assert states([off, off, {}, off]) == [False, False, False, True]


def test_reasons_name_the_figure_and_what_was_expected() -> None:
    trigger = RetrainingTrigger(EXPECTED, CONFIG)
    for _ in range(3):
        state = trigger.observe({"log_latency_ratio": 1.0})
    assert state.reasons == (
        "log_latency_ratio is 1.000, on validation traffic it was 0.000 +- 0.100",
    )


def test_smoothing_by_hand() -> None:
    smoothing = Smoothing(4)
    for value in (1.0, 2.0, 4.0):
        smoothing.observe({"a": value})
    assert smoothing.values["a"] == pytest.approx(0.75 * (0.75 * 1.0 + 0.25 * 2.0) + 0.25 * 4.0)


def test_figures_of_a_tick_on_the_surrogate() -> None:
    env = make_surrogate()
    env.reset(seed=0)
    for _ in range(20):
        env.step(0)
    prepared = env.prepared
    assert prepared is not None
    found = figures_of(prepared)
    ratio = prepared.monitor_state.latency_s / prepared.candidates[0].latency_s
    assert found["log_latency_ratio"] == pytest.approx(math.log(ratio))
    assert 0.0 < found["forecast_error"] < 2.0
    env.close()


def test_manifests_are_read_and_checked() -> None:
    assert expected_from({}) == {}
    facts = {"expected": {"forecast_error": {"mean": 0.2, "std": 0.1}, "other": {}}}
    assert expected_from(facts) == {"forecast_error": Expected(0.2, 0.1)}
    with pytest.raises(InvalidRequestError, match="finite mean"):
        Expected(math.nan, 0.1)
