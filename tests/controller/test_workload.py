from __future__ import annotations

import numpy as np
import pytest

from controller.workload import PromptPosterior, assign, centres, fit_typing, prompt_edges
from engine.cluster import WorkloadTyping
from engine.errors import InvalidRequestError


def _clustered(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Three well separated clouds: short/long, medium/short, long/long."""
    middle = np.array([(30, 400), (300, 20), (3000, 800)])[rng.integers(0, 3, size)]
    lengths = np.rint(middle * np.exp(rng.normal(0, 0.15, (size, 2)))).astype(int)
    return lengths[:, 0], lengths[:, 1]


def test_fit_finds_the_clouds_in_order_of_prompt_length() -> None:
    prompts, outputs = _clustered(np.random.default_rng(1), 600)
    typing = fit_typing(prompts, outputs, 3, seed=0)
    assert centres(typing) == pytest.approx(np.array([(30, 400), (300, 20), (3000, 800)]), rel=0.1)
    assert sum(typing.prior) == pytest.approx(1.0)
    assert typing == fit_typing(prompts, outputs, 3, seed=0)


def test_assign_takes_the_nearest_centre_in_log_lengths(four_types: WorkloadTyping) -> None:
    middle = centres(four_types)
    assert assign(four_types, middle[:, 0], middle[:, 1]).tolist() == [0, 1, 2, 3]
    # ln distance: (40, 70) lies above the geometric middle sqrt(20 * 250) = 70.7 minus a little
    assert assign(four_types, [40, 40], [60, 240]).tolist() == [0, 1]


def test_too_few_distinct_lengths_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="k=3"):
        fit_typing([5, 5, 5], [7, 7, 8], 3, seed=0)


def test_edges_rise_and_span_the_centres(four_types: WorkloadTyping) -> None:
    edges = prompt_edges(four_types)
    assert list(edges) == sorted(set(edges))
    assert edges[0] < 40
    assert edges[-1] > 900


def test_posterior_learns_from_finished_requests(four_types: WorkloadTyping) -> None:
    posterior = PromptPosterior(four_types)
    before = posterior.rows([50])[0]
    posterior.observe([50] * 300, np.full(300, 1))
    after = posterior.rows([50])[0]
    assert before[1] < 0.7 < 0.9 < after[1]
    assert np.allclose(np.sum(posterior.table, axis=1), 1.0)
    posterior.reset()
    assert np.array_equal(posterior.rows([50])[0], before)


def test_posterior_buckets_are_the_routers(four_types: WorkloadTyping) -> None:
    """Bucket b holds edges[b-1] < prompt <= edges[b], as `bisect_left` has it."""
    posterior = PromptPosterior(four_types)
    edge = posterior.edges[5]
    table = np.array(posterior.table)
    assert np.array_equal(posterior.rows([edge, edge + 1]), table[[5, 6]])
    assert np.array_equal(posterior.rows([10**6])[0], table[-1])


def test_old_counts_fade(four_types: WorkloadTyping) -> None:
    posterior = PromptPosterior(four_types, memory_requests=50.0)
    posterior.observe([50] * 200, np.zeros(200, np.int64))
    posterior.observe([50] * 200, np.ones(200, np.int64))
    assert posterior.rows([50])[0][1] > 0.85
