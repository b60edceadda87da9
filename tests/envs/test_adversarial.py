"""Misleading traffic, counted."""

from __future__ import annotations

import numpy as np
import pytest

from controller.workload import assign
from engine.cluster import WorkloadType, WorkloadTyping
from engine.errors import InvalidRequestError
from envs.adversarial import LOW, Adversary
from envs.workload import Trace

TYPING = WorkloadTyping(
    (WorkloadType("short", 20.0, 20.0), WorkloadType("long", 1000.0, 200.0)), (0.7, 0.3)
)


@pytest.fixture
def window() -> Trace:
    rng = np.random.default_rng(0)
    is_long = rng.random(6000) < 0.3
    prompt, output = np.where(is_long, 1000, 20), np.where(is_long, 200, 20)
    return Trace(np.sort(rng.uniform(0.0, 600.0, 6000)), prompt, output, 600.0)


def shares(trace: Trace, period_s: float, edge: float) -> tuple[float, float]:
    """Requests per second before and after the edge of each period."""
    before = (trace.arrival_s % period_s) / period_s < edge
    seconds = trace.duration_s
    return before.sum() / (edge * seconds), (~before).sum() / ((1 - edge) * seconds)


def test_square_wave(window: Trace) -> None:
    found = Adversary("square", 60.0).shape(window, TYPING, np.random.default_rng(1))
    high, low = shares(found, 60.0, 0.5)
    assert high == pytest.approx(10.0, rel=0.05)
    assert low == pytest.approx(LOW * 10.0, rel=0.1)
    assert found.duration_s == 600.0


def test_a_type_vanishes_and_returns(window: Trace) -> None:
    found = Adversary("vanishing", 120.0).shape(window, TYPING, np.random.default_rng(1))
    types = assign(TYPING, found.prompt_tokens, found.output_tokens)
    later = found.arrival_s % 120.0 >= 60.0
    assert not (types[later] == 0).any()
    assert (types[~later] == 0).sum() > 1500
    assert (types == 1).sum() == (window.prompt_tokens == 1000).sum()


def test_bursts_triple_the_traffic(window: Trace) -> None:
    found = Adversary("bursts", 100.0).shape(window, TYPING, np.random.default_rng(1))
    high, low = shares(found, 100.0, 0.11)
    assert high > 2.5 * low
    assert (np.diff(found.arrival_s) >= 0).all()
    assert len(found) > len(window)


def test_stale_spans_cover_half_of_each_period(window: Trace) -> None:
    spans = Adversary("stale", 100.0).disturbances(600.0).stale
    assert [(s.start_s, s.stop_s) for s in spans] == [(100.0 * i, 100.0 * i + 50) for i in range(6)]
    assert not Adversary("square", 100.0).disturbances(600.0).stale


def test_refuses_a_period_of_nothing() -> None:
    with pytest.raises(InvalidRequestError, match="longer than 0 s"):
        Adversary("square", 0.0)
