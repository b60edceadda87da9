"""Days, load and windows of traffic; capacity against a search by hand."""

import numpy as np
import pytest

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig
from controller.planner import Planner
from controller.workload import fit_typing
from engine.cluster import WorkloadTyping, parse_deployment_key
from engine.errors import InvalidRequestError
from envs.build import DEFAULT_PROFILE
from envs.reward import RewardConfig
from envs.traffic import (
    DAY_S,
    Shaping,
    cut_days,
    draw_window,
    evaluation_windows,
    fastest_key,
    generator_source,
    homogeneous_keys,
    mean_mix,
    measure_capacity,
    measure_stretch,
    pool_traces,
    shape_trace,
    static_keys,
)
from envs.workload import Trace, WorkloadConfig


def trace(days: int = 3, number: int = 9000) -> Trace:
    rng = np.random.default_rng(1)
    arrival_s = np.sort(rng.uniform(0, days * DAY_S, number))
    lengths = rng.integers(1, 400, (2, number))
    return Trace(arrival_s, lengths[0], lengths[1], days * DAY_S)


@pytest.fixture(scope="module")
def planned() -> tuple[Planner, WorkloadTyping]:
    source = trace()
    typing = fit_typing(source.prompt_tokens, source.output_tokens, 3, seed=0)
    cluster = load_profiled_cluster(DEFAULT_PROFILE)
    return build_pipeline(cluster, typing, DecisionConfig()).planner, typing


def test_days_count_from_one_and_include_both_ends() -> None:
    whole = trace()
    cut = cut_days(whole, (2, 3))
    assert cut.duration_s == 2 * DAY_S
    assert len(cut) == int((whole.arrival_s >= DAY_S).sum())
    assert cut_days(whole, None) is whole
    for days in ((0, 1), (3, 2), (3, 4)):
        with pytest.raises(InvalidRequestError, match="are not in the trace, which has 3"):
            cut_days(whole, days)


def test_shaping_scales_lengths_and_leaves_time() -> None:
    shaped = shape_trace(trace(), Shaping((1, 1), length_factor=0.5), 256).trace
    assert shaped.duration_s == DAY_S
    assert (shaped.prompt_tokens + shaped.output_tokens).max() <= 256
    assert shaped.prompt_tokens.mean() == pytest.approx(100, rel=0.1)


def test_capacity_is_the_best_of_all_deployments(planned: tuple[Planner, WorkloadTyping]) -> None:
    planner, typing = planned
    source = trace()
    shares, lengths = mean_mix(source, typing)
    assert shares.sum() == pytest.approx(1.0)
    total = (shares[:, None] * lengths).sum(0)
    assert total == pytest.approx([source.prompt_tokens.mean(), source.output_tokens.mean()])
    found = measure_capacity(planner, source, typing)
    rates = {}
    for key in static_keys(planner):
        configs = parse_deployment_key(key)
        assert sum(c.num_devices for c in configs) == 4
        rates[key] = planner.estimate(configs, shares, lengths).headroom
    assert found.rate_per_s == max(rates.values())
    assert rates[found.key] == found.rate_per_s
    assert "4xtp1pp1" in rates
    loaded = planner.estimate(parse_deployment_key(found.key), shares * found.rate_per_s, lengths)
    assert loaded.headroom == pytest.approx(1.0, rel=0.03)  # rates are rounded by the planner
    assert fastest_key(planner, found, 0.5) in rates


def test_windows_have_the_wanted_mean_rate_and_repeat() -> None:
    source = shape_trace(trace(), Shaping(), 1024)
    windows = evaluation_windows(source, 2.0, 3, 3600.0, [4, 5])
    assert len(windows) == 6
    assert sum(map(len, windows[:3])) == pytest.approx(3 * 3600 * 2.0, rel=0.05)
    again = evaluation_windows(source, 2.0, 3, 3600.0, [4, 5])
    for one, two in zip(windows, again, strict=True):
        np.testing.assert_array_equal(one.arrival_s, two.arrival_s)
    assert (
        len(windows[0]) != len(windows[3]) or (windows[0].arrival_s != windows[3].arrival_s).any()
    )
    with pytest.raises(InvalidRequestError, match="do not fit"):
        evaluation_windows(source, 2.0, 3, 2 * DAY_S, [0])


def test_training_windows_follow_the_source_s_shape() -> None:
    """Half of the day carries three times the traffic; the draw keeps that ratio."""
    rng = np.random.default_rng(2)
    busy = rng.uniform(0, DAY_S / 2, 30_000)
    calm = rng.uniform(DAY_S / 2, DAY_S, 10_000)
    arrival_s = np.sort(np.concatenate([busy, calm]))
    ones = np.full(len(arrival_s), 20)
    source = shape_trace(Trace(arrival_s, ones, ones, DAY_S), Shaping(), 1024)
    numbers = [len(draw_window(source, 4.0, 600.0, rng)) / 600.0 for _ in range(200)]
    assert np.mean(numbers) == pytest.approx(4.0, rel=0.15)
    assert np.percentile(numbers, 80) == pytest.approx(6.0, rel=0.1)
    assert np.percentile(numbers, 20) == pytest.approx(2.0, rel=0.1)


def test_generated_windows_take_their_rate_from_the_load() -> None:
    rng = np.random.default_rng(3)
    source = generator_source(WorkloadConfig(), Shaping(length_factor=0.25), 512, rng)
    drawn = [draw_window(source, 5.0, 3600.0, rng) for _ in range(12)]
    assert np.mean([w.mean_rate_per_s for w in drawn]) == pytest.approx(5.0, rel=0.25)
    assert max(int((w.prompt_tokens + w.output_tokens).max()) for w in drawn) <= 512


def test_stretch_starts_at_one_and_rises(planned: tuple[Planner, WorkloadTyping]) -> None:
    """By hand at one rate: the least latency of equal replicas over that of an idle pool."""
    planner, typing = planned
    capacity = measure_capacity(planner, trace(), typing)
    lone = RewardConfig(0.1, 0.001, 0.02)
    stretch = measure_stretch(planner, capacity, lone)
    assert stretch.factors[0] == 1.0
    assert list(stretch.factors) == sorted(stretch.factors)
    means = zip(capacity.shares, capacity.lengths, strict=True)
    work_s = sum(share * lone.reference_s(*lengths) for share, lengths in means)
    assert stretch.loads[-1] == pytest.approx(0.95 * capacity.rate_per_s * work_s)
    keys = homogeneous_keys(planner)
    assert {"4xtp1pp1", "2xtp2pp1"} <= set(keys)

    def least_s(rate_per_s: float) -> float:
        rates, lengths = np.array(capacity.shares) * rate_per_s, np.array(capacity.lengths)
        configs = [parse_deployment_key(key) for key in keys]
        return min(planner.estimate(c, rates, lengths).latency_s for c in configs)

    assert stretch.factors[9] == pytest.approx(
        least_s(stretch.loads[9] / work_s) / least_s(1e-6 * capacity.rate_per_s), rel=1e-3
    )


def test_pooled_traces_count_alike() -> None:
    few, many = trace(1, 300), trace(3, 9000)
    many = Trace(many.arrival_s, many.prompt_tokens + 1000, many.output_tokens, many.duration_s)
    pooled = pool_traces([few, many])
    assert len(pooled) == 600
    assert (pooled.prompt_tokens >= 1000).sum() == 300
    assert set(pooled.prompt_tokens[:300]) == set(few.prompt_tokens)
    assert pool_traces([few]) is few
