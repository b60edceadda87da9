"""Types are guesses at arrival: what the posterior mixes, and what the planner makes of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from controller.planner import Planner
from controller.service_model import build_service_model, mean_latency_s, mixed_rates
from controller.workload import PromptPosterior, assign
from engine.cluster import ParallelConfig, WorkloadType, WorkloadTyping
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
CONFIGS = [ParallelConfig(1, 1), ParallelConfig(2, 2), ParallelConfig(4, 1)]
LENGTHS = np.array([[40.0, 20.0], [60.0, 250.0], [400.0, 40.0], [900.0, 300.0]])


def _learnt(typing: WorkloadTyping, prompts: np.ndarray, outputs: np.ndarray) -> PromptPosterior:
    posterior = PromptPosterior(typing, smoothing=1e-6)
    posterior.observe(prompts.tolist(), assign(typing, prompts, outputs))
    return posterior


def test_prompts_that_tell_the_type_mix_nothing() -> None:
    typing = WorkloadTyping((WorkloadType("a", 10.0, 50.0), WorkloadType("b", 1000.0, 50.0)))
    prompts = np.array([10] * 30 + [1000] * 70)
    mixing = _learnt(typing, prompts, np.full(100, 50)).mixing
    assert mixing == pytest.approx(np.eye(2), abs=1e-6)


def test_equal_prompts_mix_types_as_they_come() -> None:
    """Three in four are of the second type; whatever a request is taken for, it is that often."""
    typing = WorkloadTyping((WorkloadType("a", 100.0, 10.0), WorkloadType("b", 100.0, 500.0)))
    outputs = np.array([10] * 25 + [500] * 75)
    posterior = _learnt(typing, np.full(100, 100), outputs)
    assert posterior.mixing == pytest.approx(np.array([[0.25, 0.75]] * 2), abs=1e-6)


def test_a_guess_is_served_as_the_types_it_mixes(make_cluster: MakeCluster) -> None:
    """Against the model of the true types: the same requests, split over types by hand."""
    rng = np.random.default_rng(0)
    model = build_service_model(make_cluster(8, 4), CONFIGS, LENGTHS)
    mixing = rng.dirichlet(np.full(4, 0.5), 4)
    guessed = model.mixed(mixing)
    one = np.ones((1, 1))
    for c in range(len(CONFIGS)):
        flow = rng.dirichlet(np.ones(4)) * 0.5 * model.rates[c].min()
        rows = np.array([[c]])
        by_guess = mean_latency_s(guessed, rows, one, flow[None, None])
        by_type = mean_latency_s(model, rows, one, (flow @ mixing)[None, None])
        assert by_guess == pytest.approx(by_type, rel=1e-9)
        busy = (flow / guessed.rates[c]).sum()
        assert busy == pytest.approx(((flow @ mixing) / model.rates[c]).sum())


def test_rates_of_guesses_by_hand() -> None:
    rates = np.array([[2.0, 4.0], [0.0, 4.0]])
    mixing = np.array([[0.5, 0.5], [0.0, 1.0]])
    assert mixed_rates(rates, mixing) == pytest.approx(np.array([[8.0 / 3.0, 4.0], [0.0, 4.0]]))


def test_unequal_replicas_gain_nothing_where_types_cannot_be_told(
    make_cluster: MakeCluster, four_types: WorkloadTyping
) -> None:
    """With types known the best of unequal deployments has more headroom than the best equal one;
    with guesses that tell nothing, routing by type cannot help, and any deployment's headroom is
    the sum of what its replicas serve of the whole mix."""
    planner = Planner(make_cluster(8, 4), four_types)
    rates = np.array([4.0, 2.5, 2.5, 1.0])
    blind = np.tile(rates / rates.sum(), (4, 1))
    configs = planner.optimum(rates, mixing=blind)
    found = planner.estimate(configs, rates, mixing=blind).headroom
    each = planner.service_rates()
    index = {c: i for i, c in enumerate(planner.configs)}
    shares = np.round(blind[0] / 0.05)
    shares = shares / shares.sum()
    by_hand = sum(0.9 / (shares / each[index[c]]).sum() for c in configs) / rates.sum()
    assert found == pytest.approx(by_hand, rel=0.02)  # rates are rounded in ln by 0.02
    known = planner.estimate(planner.optimum(rates), rates).headroom
    assert known > 1.005 * found
