from __future__ import annotations

import numpy as np
import pytest

from controller.predictor import EwmaPredictor, NaivePredictor, Predictor
from engine.errors import InvalidRequestError


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


@pytest.mark.parametrize("make", [NaivePredictor, EwmaPredictor])
def test_q90_covers_nine_tenths_of_poisson_traffic(make: type[EwmaPredictor]) -> None:
    rng, predictor = np.random.default_rng(3), make(2)
    rates = rng.poisson(np.array([3.0, 20.0]) * 15.0, (600, 2)) / 15.0
    above90, above50 = [], []
    for actual in rates:
        forecast = predictor.forecast()
        above90.append(actual <= forecast.q90)
        above50.append(actual <= forecast.q50)
        predictor.observe(actual)
    assert np.mean(above90[50:]) == pytest.approx(0.9, abs=0.05)
    assert np.mean(above50[50:]) == pytest.approx(0.5, abs=0.07)


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
