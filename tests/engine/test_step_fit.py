"""Fits of step times to synthetic steps whose coefficients are known."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import StepTimeModel, attention_pairs
from engine.step_fit import REGIMES, MeasuredSteps, Residual, fit_pipeline, fit_step_times

TWO = ParallelConfig(2, 1)
KNOTS = (8, 64, 256)
STRAIGHT = StepTimeModel(TWO, 5e-3, 2e-4, 3e-4, 1e-6, per_pair_s=2e-7)
CURVED = StepTimeModel(
    TWO, 5e-3, 3e-4, 3e-4, 1e-6, 2e-7, token_knots=KNOTS, token_s=(0.0, 4e-3, 4e-3 + 192 * 3e-4)
)
COEFFICIENTS = ("base_s", "per_token_s", "per_seq_s", "per_context_token_s", "per_pair_s")


def steps_of(model: StepTimeModel, rng: np.random.Generator, count: int = 300) -> MeasuredSteps:
    """Steps of decodes, of one prefill chunk, or of both, without noise."""
    rows = []
    for kind in rng.integers(3, size=count):
        decoding = int(rng.integers(1, 24)) if kind != 0 else 0
        contexts = rng.integers(10, 800, decoding)
        chunk, start = (int(rng.integers(2, 500)), int(rng.integers(300))) if kind != 1 else (0, 0)
        tokens, sequences = decoding + chunk, decoding + (chunk > 0)
        context = int(contexts.sum()) + (start + chunk if chunk else 0)
        pairs = float(contexts.sum()) + attention_pairs(start, chunk)
        step_s = model.step_s(tokens, sequences, context, pairs)
        rows.append((tokens, decoding, sequences, context, pairs, step_s))
    return MeasuredSteps.of(rows)


def with_times(steps: MeasuredSteps, factors: np.ndarray) -> MeasuredSteps:
    columns = (steps.tokens, steps.decoding, steps.sequences, steps.context_tokens, steps.pairs)
    return MeasuredSteps(*columns, steps.step_s * factors, steps.memory)


@pytest.mark.parametrize(("model", "knots"), [(STRAIGHT, ()), (CURVED, KNOTS)])
def test_known_coefficients_are_found(model: StepTimeModel, knots: tuple[int, ...]) -> None:
    found = fit_step_times(TWO, steps_of(model, np.random.default_rng(1)), knots)
    for name in COEFFICIENTS:
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=1e-3), name
    assert found.token_knots == knots
    assert found.token_s == pytest.approx(model.token_s, rel=1e-3)
    assert found.residual_p50 < 1e-4


@pytest.mark.parametrize("outlier", [0.2, 8.0])
def test_a_tenth_of_wild_steps_changes_little(outlier: float) -> None:
    """Steps of noise 3 %; wild ones take a fifth or eight times as long as they should."""
    rng = np.random.default_rng(2)
    steps = steps_of(STRAIGHT, rng)
    noise = rng.lognormal(0.0, 0.03, len(steps.step_s))
    wild = rng.random(len(noise)) < 0.1
    found = fit_step_times(TWO, with_times(steps, np.where(wild, outlier, noise)))
    clean = fit_step_times(TWO, with_times(steps, noise))
    for model in (clean, found):
        error = Residual.of(steps.predicted(model), steps.step_s)
        assert error.p90 < 0.02
        assert abs(error.bias) < 0.01


def test_a_cost_that_would_be_negative_is_nought() -> None:
    steps = steps_of(STRAIGHT, np.random.default_rng(3))
    falling = with_times(steps, 1.0 - 4e-4 * steps.sequences / steps.step_s)
    found = fit_step_times(TWO, falling)
    assert found.per_seq_s == 0.0
    assert min(getattr(found, name) for name in COEFFICIENTS) >= 0.0


def test_garbage_is_refused_by_name() -> None:
    rng = np.random.default_rng(4)
    steps = steps_of(STRAIGHT, rng)
    garbage = with_times(steps, rng.lognormal(0.0, 1.0, len(steps.step_s)))
    with pytest.raises(InvalidRequestError, match=r"tp2pp1 are no fit.*at most 30 %"):
        fit_step_times(TWO, garbage)
    assert fit_step_times(TWO, garbage, max_residual_p50=1.0).residual_p50 > 0.3
    for factors in (0.0, np.nan):
        with pytest.raises(InvalidRequestError, match="took no time"):
            fit_step_times(TWO, with_times(steps, np.full(len(steps.step_s), factors)))


def test_steps_that_cannot_tell_costs_apart_are_refused() -> None:
    """Nine steps of five coefficients; decodes only; no step as long as the last segment."""
    everything = steps_of(STRAIGHT, np.random.default_rng(5))
    few = steps_of(STRAIGHT, np.random.default_rng(5), count=9)
    decodes = MeasuredSteps.of([(n, n, n, n * c, n * c, 1.0) for n in (1, 4, 9) for c in range(9)])
    for steps, knots in ((few, ()), (decodes, ()), (everything, (8, 4096, 8192))):
        with pytest.raises(InvalidRequestError, match="do not give its"):
            fit_step_times(TWO, steps, knots)
    with pytest.raises(InvalidRequestError, match="two knots or none"):
        fit_step_times(TWO, everything, (64,))


def test_regimes_and_residuals_by_hand() -> None:
    steps = MeasuredSteps.of(
        [(64, 0, 1, 64, 0, 1.0), (3, 3, 3, 30, 0, 1.0), (65, 1, 2, 70, 0, 2.0)]
    )
    chosen = {name: list(np.flatnonzero(where)) for name, where in steps.regimes().items()}
    assert list(chosen) == list(REGIMES)
    assert chosen == {"prefill": [0], "decode": [1], "mixed": [2], "small": [0, 1], "large": [2]}
    error = Residual.of([1.1, 1.0, 0.8, 1.3, 0.9], np.ones(5))
    assert (error.count, error.p50, error.bias) == pytest.approx((5, 0.1, 0.0))
    assert error.p90 == pytest.approx(0.3 * 0.6 + 0.2 * 0.4)
    assert Residual.of([], []).count == 0


def test_steps_that_are_alike_are_averaged() -> None:
    rows = [
        (2.0, 2.0, 2.0, 10.0, 10.0, 1.0),
        (9.0, 0.0, 1.0, 9.0, 45.0, 7.0),
        (2.0, 2.0, 2.0, 12.0, 12.0, 4.0),
        (2.0, 2.0, 2.0, 70.0, 70.0, 2.0),  # far more context
    ]
    averaged = MeasuredSteps.of(rows).averaged()
    names = MeasuredSteps.__slots__[:-1]
    found = zip(*(getattr(averaged, name) for name in names), strict=True)
    assert sorted(found) == [(2.0, 2.0, 2.0, 11.0, 11.0, 2.5), rows[3], rows[1]]


@pytest.mark.parametrize("leader_computes", [False, True])
@pytest.mark.parametrize(("pp", "share"), [(1, 1.0), (2, 0.6), (4, 0.3)])
def test_a_pipeline_is_told_apart_from_its_steps(
    pp: int, share: float, leader_computes: bool
) -> None:
    """Steps of known cost, with so many in flight as there is work for, and 5 % of noise."""
    rng = np.random.default_rng(pp)
    truth = StepTimeModel(ParallelConfig(1, pp), 5e-3, 1e-4, 2e-4, 1e-6, stage_share=share)
    rows, gaps_s, seen_s = [], [], -np.inf
    flight: deque[tuple[tuple[float, ...], float, float, bool]] = deque()
    ready_s = last_end_s = room_s = 0.0

    def take() -> float:
        nonlocal seen_s
        size, start_s, end_s, is_alone = flight.popleft()
        before_s, seen_s = seen_s, max(end_s, ready_s) if leader_computes else end_s
        rows.append((*size, seen_s - start_s))
        gaps_s.append(np.inf if is_alone else seen_s - before_s)
        return seen_s

    for i in range(600):
        decoding, chunk = int(rng.integers(0, 9)), int(rng.integers(0, 2) * rng.integers(2, 200))
        decoding += decoding + chunk == 0
        context = int(rng.integers(10, 300, decoding).sum()) + chunk
        pairs = context + chunk * (chunk - 1) / 2
        size = (decoding + chunk, decoding, decoding + (chunk > 0), context, pairs)
        limit = pp if (i // 50) % 2 else 1  # with or without others
        while len(flight) >= limit or (flight and flight[0][2] <= ready_s):
            room_s = take()
        start_s = max(ready_s, room_s)
        step_s = truth.step_s(size[0], *size[2:]) * rng.lognormal(0.0, 0.05)
        last_end_s = max(start_s + step_s, last_end_s + share * step_s)
        ready_s = start_s + share * step_s
        flight.append((size, start_s, last_end_s, not flight))
    steps = MeasuredSteps.of(rows)
    found = fit_pipeline(truth.parallel, steps, np.array(gaps_s), leader_computes=leader_computes)
    assert found.stage_share == pytest.approx(share, abs=0.08)
    assert found.leader_computes == leader_computes
    assert np.median(np.abs(steps.predicted(found) / steps.predicted(truth) - 1.0)) < 0.03
