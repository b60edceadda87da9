"""Training of the LSTM forecasters on series of which the best forecast is known."""

from __future__ import annotations

import numpy as np
import pytest

from controller.lstm_predictor import LstmModel, LstmPredictor
from controller.predictor import NaivePredictor, Predictor
from engine.errors import InvalidRequestError
from envs.lstm_training import TrainingConfig, train_per_type, train_pooled

CONFIG = TrainingConfig(hidden=12, steps=500, batch=16)


def square_wave(rng: np.random.Generator, length: int) -> np.ndarray:
    """counts[T, 2] that jump every 12 intervals, Poisson around two levels."""
    high = (np.arange(length) // 12) % 2 == 1
    return rng.poisson(np.where(high[:, None], [90.0, 40.0], [30.0, 10.0])).astype(float)


def errors_of(predictor: Predictor, counts: np.ndarray) -> tuple[float, float]:
    """RRMSE of the mean and coverage of q90, after a warm-up of 60 intervals."""
    said = []
    for row in counts:
        predictor.observe(row / 60.0)
        forecast = predictor.forecast()
        said.append((forecast.mean, forecast.q90))
    mean, q90 = 60.0 * np.array(said)[59:-1].transpose(1, 0, 2)
    actual = counts[60:]
    return float(np.sqrt(np.mean((mean - actual) ** 2) / np.mean(actual**2))), float(
        np.mean(actual <= q90 + 1e-9)
    )


@pytest.mark.parametrize("train", [train_per_type, train_pooled])
def test_a_period_is_learnt(train: object) -> None:
    """The last value misses every jump; one who counts to 12 does not."""
    rng = np.random.default_rng(0)
    model: LstmModel = train(square_wave(rng, 2000), 60.0, (1, 3), CONFIG)  # type: ignore[operator]
    test = square_wave(rng, 600)
    rrmse, coverage = errors_of(LstmPredictor(model, 2, 60.0), test)
    naive, _ = errors_of(NaivePredictor(2, 60.0), test)
    assert rrmse < 0.8 * naive
    assert 0.8 <= coverage <= 0.97


def test_training_is_deterministic_in_its_seed() -> None:
    counts = square_wave(np.random.default_rng(1), 300)
    config = TrainingConfig(hidden=4, steps=5)
    one, same = (train_pooled(counts, 60.0, (1,), config) for _ in range(2))
    other = train_pooled(counts, 60.0, (1,), TrainingConfig(hidden=4, steps=5, seed=1))
    assert np.array_equal(one.weights.input, same.weights.input)
    assert not np.array_equal(one.weights.input, other.weights.input)


def test_too_short_a_series_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least 54 intervals, got shape"):
        train_pooled(np.ones((50, 2)), 60.0, (1, 3), CONFIG)
