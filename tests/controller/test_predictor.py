"""Forecasters that learn nothing, their errors, and the drift state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controller.forecast_errors import Drift, ErrorTracker
from controller.predictor import (
    EwmaPredictor,
    MovingAveragePredictor,
    NaivePredictor,
    Predictor,
    SeasonalNaivePredictor,
)
from engine.errors import InvalidRequestError

HORIZONS = (1, 3)
FORECASTERS: dict[str, Callable[[], Predictor]] = {
    "naive": lambda: NaivePredictor(2, 15.0, HORIZONS),
    "ewma": lambda: EwmaPredictor(2, 4.0, 15.0, HORIZONS),
    "seasonal": lambda: SeasonalNaivePredictor(2, 24, 15.0, HORIZONS),
    "mean": lambda: MovingAveragePredictor(2, 20, 15.0, HORIZONS),
}


def test_naive_says_the_last_value() -> None:
    predictor: Predictor = NaivePredictor(2)
    for rates in ([1.0, 2.0], [3.0, 0.5]):
        predictor.observe(np.array(rates))
    assert predictor.forecast().mean == (3.0, 0.5)


def test_ewma_weights_by_hand() -> None:
    predictor = EwmaPredictor(1, halflife_intervals=1.0)
    for rate in (8.0, 4.0, 2.0):
        predictor.observe(np.array([rate]))
    expected = (0.125 * 8 + 0.25 * 4 + 0.5 * 2) / 0.875
    assert predictor.forecast().mean[0] == pytest.approx(expected)


def test_unseen_traffic_is_forecast_as_none() -> None:
    forecast = EwmaPredictor(3).forecast()
    assert forecast.mean == (0.0, 0.0, 0.0)
    assert all(q > 0 for q in forecast.q90)


@pytest.mark.parametrize("name", FORECASTERS)
@pytest.mark.parametrize("ahead", HORIZONS)
def test_q90_covers_nine_tenths_of_poisson_traffic(name: str, ahead: int) -> None:
    rng, predictor = np.random.default_rng(3), FORECASTERS[name]()
    rates = rng.poisson(np.array([3.0, 20.0]) * 15.0, (600, 2)) / 15.0
    above90, above50 = [], []
    for now, actual in enumerate(rates[:-ahead]):
        predictor.observe(actual)
        forecast = predictor.forecast(ahead)
        above90.append(rates[now + ahead] <= forecast.q90)
        above50.append(rates[now + ahead] <= forecast.q50)
    assert np.mean(above90[50:]) == pytest.approx(0.9, abs=0.05)
    assert np.mean(above50[50:]) == pytest.approx(0.5, abs=0.07)


def test_seasonal_naive_by_hand() -> None:
    predictor = SeasonalNaivePredictor(1, 4, horizons=(1, 3, 6))
    for rate in (1.0, 2.0, 3.0):
        predictor.observe(np.array([rate]))
    assert predictor.forecast(3).mean == (3.0,)  # no season yet: the last value
    for rate in (4.0, 5.0):
        predictor.observe(np.array([rate]))
    # last four: 2 3 4 5, the next is as the one four before it
    assert [predictor.forecast(ahead).mean[0] for ahead in (1, 3, 6)] == [2.0, 4.0, 3.0]


def test_moving_average_by_hand() -> None:
    predictor = MovingAveragePredictor(1, 3)
    assert predictor.forecast().mean == (0.0,)
    for rate in (8.0, 1.0, 2.0, 6.0):
        predictor.observe(np.array([rate]))
    assert predictor.forecast().mean == (3.0,)


def test_errors_belong_to_their_horizon() -> None:
    """A ramp of 1 a second per interval: the last value is 1 too low at 1 ahead, 3 at 3 ahead, so
    that is what its quantiles add once the seeded errors are forgotten."""
    predictor = NaivePredictor(1, 15.0, HORIZONS)
    for rate in range(1000, 1060):
        predictor.observe(np.array([float(rate)]))
    for ahead in HORIZONS:
        forecast = predictor.forecast(ahead)
        assert forecast.ahead == ahead
        assert forecast.q90[0] - forecast.mean[0] == pytest.approx(ahead, rel=0.03)
        assert forecast.relative_error[0] == pytest.approx(ahead / 1050, rel=0.05)


@pytest.mark.parametrize("own", [0.0, 3.0])
@pytest.mark.parametrize("ahead", HORIZONS)
def test_own_quantiles_are_corrected_until_they_cover(own: float, ahead: int) -> None:
    """A q90 at the mean covers half of Poisson traffic, one 3 a second above it nearly all."""
    rng, tracker = np.random.default_rng(4), ErrorTracker(1, 15.0, HORIZONS)
    rates = rng.poisson(20.0 * 15.0, (900, 1)) / 15.0
    mean, covered = np.array([20.0]), []
    for actual, later in zip(rates[:-ahead], rates[ahead:], strict=True):
        tracker.observe(actual)
        for horizon in HORIZONS:
            tracker.expect(horizon, mean, mean + own)
        forecast = tracker.with_quantiles(ahead, mean, mean, mean + own)
        covered.append(later[0] <= forecast.q90[0])
    assert abs(np.mean(covered[:20]) - 0.9) > 0.09
    assert np.mean(covered[200:]) == pytest.approx(0.9, abs=0.03)


def test_an_unknown_horizon_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="looks 1, 3 intervals ahead, not 2"):
        NaivePredictor(1, 15.0, HORIZONS).forecast(2)
    with pytest.raises(InvalidRequestError, match=r"1 among them, got 15.0 and \(2,\)"):
        NaivePredictor(1, 15.0, (2,))


def drift_of(predictor: Predictor, rates: np.ndarray) -> list[Drift]:
    states = []
    for actual in rates:
        predictor.observe(actual)
        states.append(predictor.forecast().drift)
    return states


@pytest.mark.parametrize("name", FORECASTERS)
def test_steady_traffic_does_not_drift(name: str) -> None:
    rng = np.random.default_rng(1)
    rates = rng.poisson(np.array([3.0, 20.0]) * 15.0, (2000, 2)) / 15.0
    assert set(drift_of(FORECASTERS[name](), rates)) == {Drift.STABLE}


def test_a_shift_drifts_until_it_is_learnt_and_a_burst_does_not() -> None:
    """One type's rate triples for good at 300; the mean of 20 lags, and by 340 it has learnt."""
    rng = np.random.default_rng(2)
    level = np.full((500, 2), 5.0)
    level[300:, 1] = 15.0
    rates = rng.poisson(level * 15.0) / 15.0
    states = drift_of(FORECASTERS["mean"](), rates)
    drifting = [i for i, state in enumerate(states) if state is Drift.DRIFTING]
    assert 303 <= drifting[0] <= 308  # half of the last 12 errors are large at the earliest
    assert drifting == list(range(drifting[0], drifting[-1] + 1))
    assert drifting[-1] <= 340
    level[300:], level[300] = 5.0, 50.0
    burst = rng.poisson(level * 15.0) / 15.0
    assert set(drift_of(FORECASTERS["naive"](), burst)) == {Drift.STABLE}


def test_reset_forgets_drift() -> None:
    predictor = SeasonalNaivePredictor(1, 100)
    rates = np.concatenate([np.full((200, 1), 2.0), np.full((20, 1), 9.0)])
    assert drift_of(predictor, rates)[-1] is Drift.DRIFTING
    predictor.reset()
    assert drift_of(predictor, rates[:50])[-1] is Drift.STABLE


def test_quantiles_never_cross_and_reset_forgets() -> None:
    predictor = EwmaPredictor(1)
    before = predictor.forecast()
    for rate in (0.0, 5.0, 0.0, 9.0, 0.1):
        predictor.observe(np.array([rate]))
        forecast = predictor.forecast()
        assert 0.0 <= forecast.q50[0] <= forecast.q90[0]
    assert predictor.forecast().relative_error[0] > 0
    predictor.reset()
    assert predictor.forecast() == before


def test_a_wrong_halflife_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="halflife"):
        EwmaPredictor(1, halflife_intervals=-1.0)
