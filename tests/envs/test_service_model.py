"""The planner's service model against the simulated replicas that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controller.build import load_profiled_cluster
from controller.service_model import (
    HELD_UP,
    SPREAD2,
    _Pipeline,
    build_service_model,
    feasible_configs,
    mean_latency_s,
)
from engine.cluster import ParallelConfig, dense_deployment
from envs.surrogate.cluster import SurrogateCluster

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "h100-llama-2-70b.json"
LENGTHS = np.array([[200.0, 200.0], [1500.0, 100.0]])  # of types, half of the requests each
DURATION_S = 900.0


def _simulated(parallel: ParallelConfig, rate: float) -> tuple[float, float]:
    """(mean latency, requests ended per second) of Poisson arrivals with log-normal lengths."""
    cluster, rng = load_profiled_cluster(PROFILE), np.random.default_rng(0)
    number = rng.poisson(rate * DURATION_S)
    spread = np.exp(0.6 * rng.standard_normal((number, 2)) - 0.18)
    lengths = np.maximum(LENGTHS[rng.integers(0, 2, number)] * spread, 1.0).astype(np.int64)
    lengths = np.minimum(lengths, (3000, 1000))
    surrogate = SurrogateCluster(cluster, dense_deployment([parallel]), columns=True)
    surrogate.submit_columns(np.sort(rng.uniform(0.0, DURATION_S, number)), *lengths.T)
    surrogate.advance(DURATION_S)
    ended = surrogate.take_columns()
    latency_s = float((ended.finish_s - ended.ended_arrival_s).mean())
    return latency_s, len(ended.finish_s) / DURATION_S


@pytest.mark.parametrize(("tp", "pp"), [(8, 1), (4, 1), (4, 2), (2, 2), (2, 4), (1, 4)])
def test_latency_and_capacity_are_those_of_a_simulated_replica(tp: int, pp: int) -> None:
    """Within a third, at a third and two thirds of what it sustains, and in that itself: the
    prompts of a pipeline hold up its other batches, without which deep ones seem twice as good."""
    parallel = ParallelConfig(tp, pp)
    model = build_service_model(load_profiled_cluster(PROFILE), [parallel], LENGTHS)
    capacity = 1.0 / (0.5 / model.rates[0]).sum()
    _, sustained = _simulated(parallel, 1.3 * capacity)
    assert capacity == pytest.approx(sustained, rel=0.34)
    for load in (0.33, 0.67):
        flow = np.full(2, 0.5 * load * sustained)
        found = mean_latency_s(model, np.array([[0]]), np.ones((1, 1)), flow[None, None])[0]
        assert found == pytest.approx(_simulated(parallel, load * sustained)[0], rel=0.34), load


def test_compiled_terms_are_those_of_the_formulas() -> None:
    """The module's formulas, in numpy."""
    cluster = load_profiled_cluster(PROFILE)
    configs, spec = feasible_configs(cluster), cluster.spec
    limit = spec.max_num_batched_tokens
    lengths = np.exp(np.random.default_rng(0).normal(5.5, 2.0, (6, 2)))
    prompt, output = np.maximum(lengths, 1.0).T
    model = build_service_model(cluster, configs, lengths)
    linear = [cluster.profile.step_model(c).linear(limit) for c in configs]
    a, b, d, e, f = (
        np.array([[getattr(m, name)] for m in linear])
        for name in (
            *("base_s", "per_token_s", "per_seq_s"),
            *("per_context_token_s", "per_pair_s"),
        )
    )
    share, pp = model.share[:, None], model.pp[:, None]
    steps, total = output - 1.0 + np.maximum(1.0, prompt / limit), prompt + output - 1.0
    added_s = b * total / steps + d + e * (prompt + output / 2.0)
    added_s = added_s + f * total * (total + 1.0) / (2.0 * steps)
    held_up_s = share * b * np.minimum(SPREAD2 * prompt, limit)
    held_s2 = (pp - 1.0) / pp * b * held_up_s * prompt / steps
    places = np.minimum(
        model.kv_tokens[:, None] / (prompt + output), pp * limit / np.maximum(total / steps, 1.0)
    )
    running = np.clip(places, 1.0, spec.max_num_seqs)
    pipeline = _Pipeline(a, share, pp, added_s, held_s2, held_up_s / HELD_UP)
    rates = running / (steps * pipeline.full_s(running))
    for found, expected in (
        (model.steps, steps),
        (model.added_s, added_s),
        (model.held_s2, held_s2),
        (model.prompt_s, held_up_s / HELD_UP),
        (model.max_running, running),
        (model.rates, rates),
    ):
        assert found == pytest.approx(expected, rel=1e-12)
