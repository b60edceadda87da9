"""LSTM forecasters in numpy against torch, and as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from controller.build import build_predictor
from controller.lstm_files import load_lstm, save_lstm
from controller.lstm_predictor import (
    BASE,
    HALFLIVES,
    OUTPUTS,
    SEASON_LEAD,
    SEASONAL,
    WINDOW,
    LstmModel,
    LstmPredictor,
    LstmWeights,
    PoissonLevels,
)
from engine.errors import InvalidRequestError

HIDDEN, SEASON, HORIZONS = 5, 60, (1, 4)


def random_model(rng: np.random.Generator, types: int, pooled: bool) -> LstmModel:
    groups, features = (1, len(HALFLIVES) + 2 + len(HORIZONS)) if pooled else (types, 1)
    outputs = len(HORIZONS) * (OUTPUTS if pooled else 1)
    shapes = [(4 * HIDDEN, features), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (outputs, HIDDEN)]
    arrays = [rng.normal(size=(groups, *s)).astype(np.float32) for s in (*shapes, (outputs,))]
    scale = ((), ()) if pooled else ((30.0,) * types, (5.0,) * types)
    return LstmModel(LstmWeights(*arrays), 60.0, HORIZONS, SEASON if pooled else 0, *scale)


@pytest.mark.parametrize("pooled", [True, False])
def test_numpy_computes_what_torch_does(pooled: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    model = random_model(rng, 3, pooled).weights
    window = rng.normal(size=(WINDOW, 3, model.input.shape[2]))
    found = model.outputs(window)
    for j in range(3):
        group = 0 if pooled else j
        lstm = torch.nn.LSTM(model.input.shape[2], HIDDEN, batch_first=True)
        with torch.no_grad():
            lstm.weight_ih_l0.copy_(torch.tensor(model.input[group]))
            lstm.weight_hh_l0.copy_(torch.tensor(model.recurrent[group]))
            lstm.bias_ih_l0.copy_(torch.tensor(model.bias[group]))
            lstm.bias_hh_l0.zero_()
            states = lstm(torch.tensor(window[None, :, j], dtype=torch.float32))[0][0, -1]
        expected = model.head[group] @ states.numpy() + model.head_bias[group]
        assert found[j] == pytest.approx(expected, abs=1e-4)


def test_levels_by_hand() -> None:
    encoder = PoissonLevels(1, SEASON, HORIZONS)
    counts = np.random.default_rng(1).poisson(40.0, SEASON + 30).astype(float)
    for number, count in enumerate(counts, start=1):
        encoded = encoder.step(np.array([count]))
        levels = []
        for halflife in HALFLIVES:
            weights = 0.5 ** (np.arange(number)[::-1] / halflife)
            levels.append(float(weights @ counts[:number] / weights.sum()))
        base, unit = levels[BASE], np.sqrt(levels[BASE] + 1.0)
        assert (encoded.base[0], encoded.unit[0]) == pytest.approx((base, unit))
        rows = (count, *levels[:BASE], *levels[BASE + 1 :])
        expected = np.arcsinh([(v - base) / unit for v in rows])
        assert encoded.features[0, : len(expected)] == pytest.approx(expected)
        assert encoded.features[0, -1] == pytest.approx(np.log1p(base) / 3.0)
        ago = number - 1 - SEASON + SEASON_LEAD  # of the interval a season before, led
        season = []
        for ahead in (0, *HORIZONS):
            past = counts[: ago + ahead + 1]
            weights = 0.5 ** (np.arange(len(past))[::-1] / HALFLIVES[SEASONAL])
            known = number > SEASON
            level = float(weights @ past / weights.sum()) if known else levels[SEASONAL]
            season.append(np.arcsinh((level - base) / unit))
        assert encoded.features[0, len(expected) : -1] == pytest.approx(season)


@pytest.mark.parametrize("pooled", [True, False])
def test_forecasts_follow_from_the_last_window(pooled: bool) -> None:
    """All of them finite, not below zero, quantiles in order; per type, what is older than the
    window is forgotten."""
    rng = np.random.default_rng(2)
    predictor = LstmPredictor(random_model(rng, 2, pooled), 2, 60.0)
    assert predictor.forecast(4).mean == (0.0, 0.0)
    series = rng.poisson([20.0, 60.0], (WINDOW + 25, 2)) / 60.0
    for rates in series:
        predictor.observe(rates)
        for ahead in HORIZONS:
            forecast = predictor.forecast(ahead)
            rows = np.array([forecast.mean, forecast.q50, forecast.q90])
            assert np.isfinite(rows).all()
            assert (rows >= 0).all()
            assert (rows[2] >= rows[1]).all()
    late = LstmPredictor(random_model(np.random.default_rng(2), 2, pooled), 2, 60.0)
    for rates in series[-WINDOW:]:
        late.observe(rates)
    same = late.forecast().mean == pytest.approx(predictor.forecast().mean)
    assert same is not pooled  # its levels remember further back
    with pytest.raises(InvalidRequestError, match="looks 1, 4 intervals ahead, not 2"):
        predictor.forecast(2)
    predictor.reset()
    for rates in series[-WINDOW:]:
        predictor.observe(rates)
    assert predictor.forecast() == late.forecast()


@pytest.mark.parametrize("pooled", [True, False])
def test_files_keep_a_model(tmp_path: Path, pooled: bool) -> None:
    model, path = random_model(np.random.default_rng(3), 2, pooled), tmp_path / "f.safetensors"
    save_lstm(path, model)
    loaded = load_lstm(path)
    before, after = dataclasses.asdict(model), dataclasses.asdict(loaded)
    arrays, loaded_arrays = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(np.array_equal(arrays[name], loaded_arrays[name]) for name in arrays)
    assert build_predictor(f"lstm:{path}", 2, 60.0).horizons == HORIZONS
    with pytest.raises(InvalidRequestError, match=r"intervals of 60 s and cannot forecast .* 15 s"):
        build_predictor(f"lstm:{path}", 2, 15.0)
    if not pooled:
        with pytest.raises(InvalidRequestError, match="trained for 2 types, got 3"):
            build_predictor(f"lstm:{path}", 3, 60.0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "not.safetensors"
    path.write_text("nonsense")
    for file in (path, tmp_path / "nowhere"):
        with pytest.raises(InvalidRequestError, match="is no LSTM forecaster"):
            build_predictor(f"lstm:{file}", 2, 60.0)
