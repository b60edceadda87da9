"""Scenarios: draws inside their ranges, blackouts, failures and stale metrics as they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from controller.build import build_pipeline
from controller.decision import DecisionConfig
from engine.cluster import WorkloadType, WorkloadTyping, dense_deployment, parse_deployment_key
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.build import surrogate_parts
from envs.experiment import build_env, build_experiment
from envs.experiment_config import read_config
from envs.scenarios import (
    DeviceFailure,
    Disturbances,
    ScenarioConfig,
    Span,
    draw,
    draw_disturbances,
    draw_spans,
    draw_workload,
)
from envs.serving_env import ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import RequestType, Trace, WorkloadConfig, generate

ROOT = Path(__file__).parents[2]
TYPES = (RequestType("short", 12, 20), RequestType("long", 120, 40))
TYPING = WorkloadTyping(
    (WorkloadType("short", 12.0, 20.0), WorkloadType("long", 120.0, 40.0)), (0.6, 0.4)
)
FLAT = WorkloadConfig(
    types=(RequestType("a", 10, 10, 0.01, 0.01), RequestType("b", 1000, 10, 0.01, 0.01)),
    mean_rate_per_s=20.0,
    cycle_amplitude=0.0,
    level_sigma=0.0,
    burst_factor=1.0,
    mix_concentration=1e6,  # half and half
)


def drawn_workloads(scenario: ScenarioConfig, number: int = 200) -> list[WorkloadConfig]:
    rng = np.random.default_rng(0)
    return [draw_workload(scenario, WorkloadConfig(), rng) for _ in range(number)]


# ---------------------------------------------------------------- ranges


def test_values_stay_in_their_ranges_and_fill_them() -> None:
    scenario = ScenarioConfig(blackout_gap_s=(100.0, 10_000.0))
    drawn = drawn_workloads(scenario)
    shared = {f.name for f in fields(scenario)} & {f.name for f in fields(WorkloadConfig)}
    assert len(shared) == 10
    for name in shared:
        low, high = getattr(scenario, name)
        values = [getattr(config, name) for config in drawn]
        assert low <= min(values) <= max(values) <= high, name
        assert max(values) - min(values) > 0.8 * (high - low), name
    medians = np.log([config.types[0].prompt_tokens / 90 for config in drawn])
    # a normal times a sigma uniform in [0, 0.2]: variance 0.04 / 3; sd of a variance < 3 / sqrt(n)
    assert medians.std() == pytest.approx(np.sqrt(0.04 / 3), rel=5 * 1.5 / np.sqrt(200))


def test_ranges_are_uniform_in_the_logarithm() -> None:
    rng = np.random.default_rng(1)
    values = np.log([draw((10.0, 1000.0), rng) for _ in range(4000)])
    middle, sd = np.log(100.0), np.log(100.0) / np.sqrt(12)
    assert values.mean() == pytest.approx(middle, abs=5 * sd / np.sqrt(4000))
    assert values.std() == pytest.approx(sd, rel=0.05)
    assert {draw((0.0, 0.0), rng) for _ in range(3)} == {0.0}


@pytest.mark.parametrize("wrong", [(2.0, 1.0), (-1.0, 1.0), (1.0, float("inf"))])
def test_impossible_ranges_are_named(wrong: tuple[float, float]) -> None:
    with pytest.raises(InvalidRequestError, match="scenario range burst_s is"):
        ScenarioConfig(burst_s=wrong)


# ---------------------------------------------------------------- traffic


def test_blackouts_silence_one_type_and_no_other() -> None:
    """With blackouts as long as the gaps each of two types is silent for about a quarter of the
    time, and while one is silent the other sends as before."""
    config = replace(FLAT, blackout_gap_s=100.0, blackout_s=100.0)
    trace = generate(config, 40_000.0, np.random.default_rng(2))
    long = trace.prompt_tokens > 100
    second = trace.arrival_s.astype(int)
    per_s = np.stack([np.bincount(second[k], minlength=40_000) for k in (~long, long)])
    window = per_s.reshape(2, -1, 20).sum(axis=2)  # of 20 s: Poisson 200 when both send
    silent = window == 0  # P(0 of Poisson(200)) is nothing
    assert not silent.all(axis=0).any()
    for one, other in ((0, 1), (1, 0)):
        assert 0.1 < silent[one].mean() < 0.4
        alone = window[other][silent[one]]
        assert alone.mean() == pytest.approx(200.0, abs=5 * np.sqrt(200 / len(alone)))
    plain = generate(FLAT, 1000.0, np.random.default_rng(2))
    again = generate(replace(FLAT, blackout_s=5.0), 1000.0, np.random.default_rng(2))
    assert plain.requests() == again.requests()  # no gap: no blackouts, same draws


def test_a_mix_is_composed_as_asked() -> None:
    """Half and half: binomial, sd sqrt(n) / 2."""
    trace = generate(FLAT, 3000.0, np.random.default_rng(3))
    long = int((trace.prompt_tokens > 100).sum())
    assert abs(long - len(trace) / 2) < 5 * np.sqrt(len(trace)) / 2
    assert abs(len(trace) - 60_000) < 5 * np.sqrt(60_000)


# ---------------------------------------------------------------- disturbances


def test_spans_have_the_means_asked_for() -> None:
    """Exponential: the sd of a mean of n is the mean over sqrt(n)."""
    rng = np.random.default_rng(4)
    spans = draw_spans((50.0, 50.0), (10.0, 10.0), 600_000.0, rng)
    lengths = np.array([s.stop_s - s.start_s for s in spans])
    stops = [0.0, *(s.stop_s for s in spans[:-1])]
    gaps = np.array([s.start_s - stop for s, stop in zip(spans, stops, strict=True)])
    assert (gaps >= 0).all()
    assert lengths.mean() == pytest.approx(10.0, abs=5 * 10 / np.sqrt(len(spans)))
    assert gaps.mean() == pytest.approx(50.0, abs=5 * 50 / np.sqrt(len(spans)))
    assert draw_spans((0.0, 0.0), (10.0, 10.0), 1e6, rng) == ()


def test_failures_are_one_at_a_time_and_by_seed() -> None:
    scenario = ScenarioConfig(failure_gap_s=(50.0, 50.0), stale_gap_s=(80.0, 80.0))

    def drawn(seed: int) -> Disturbances:
        return draw_disturbances(scenario, 4, 10_000.0, np.random.default_rng(seed))

    found = drawn(0)
    assert found == drawn(0) != drawn(1)
    assert {f.device for f in found.failures} == {0, 1, 2, 3}
    for failure, following in zip(found.failures, found.failures[1:], strict=False):
        assert failure.at_s < failure.back_at_s <= following.at_s
    assert len(found.stale) > 10


def make_env(cluster: ProfiledCluster, disturbances: Disturbances) -> ServingEnv:
    decision = DecisionConfig(grid_s=5.0, min_dwell_s=5.0, stale_after_s=4.0)
    config = WorkloadConfig(types=TYPES, mean_rate_per_s=20.0, max_tokens=250)

    def traffic(rng: np.random.Generator) -> Trace:
        return generate(config, 60.0, rng)

    parts = surrogate_parts(build_pipeline(cluster, TYPING, decision), traffic, "4xtp1pp1")
    return ServingEnv(replace(parts, make_disturbances=lambda rng, duration_s: disturbances))


def test_stale_metrics_are_seen_as_such_and_pass(small_cluster: ProfiledCluster) -> None:
    """From 12 s to 31 s nothing measured after 10 s is seen; only keep is legal then."""
    env = make_env(small_cluster, Disturbances(stale=(Span(12.0, 31.0),)))
    env.reset(seed=0)
    measured, stale = [], []
    for _ in range(12):
        env.step(0)
        assert env.prepared is not None
        assert env.cluster is not None
        snapshot = env.prepared.snapshot
        assert snapshot.now_s == env.cluster.snapshot().now_s
        measured.append(snapshot.replicas[0].measured_at_s)
        stale.append(env.prepared.monitor_state.is_stale)
        if stale[-1]:
            assert env.action_masks().tolist()[1:] == [False] * (len(env.action_masks()) - 1)
            assert "stale_metrics" in env.prepared.mask_reasons
    assert measured == [5.0, 10.0, 10.0, 10.0, 10.0, 10.0, *range(35, 61, 5)]
    assert stale == [False] * 2 + [True] * 4 + [False] * 6


def test_failures_are_handed_to_clusters_that_take_them(small_cluster: ProfiledCluster) -> None:
    schedule = (DeviceFailure(7.0, 2, 20.0),)
    taken: list[DeviceFailure] = []

    class Losing(SurrogateCluster):
        def schedule_failures(self, failures: Sequence[DeviceFailure]) -> None:
            taken.extend(failures)

    env = make_env(small_cluster, Disturbances(failures=schedule))
    initial = dense_deployment(parse_deployment_key("4xtp1pp1"))
    parts = replace(env.parts, make_cluster=lambda rng: Losing(small_cluster, initial))
    ServingEnv(parts).reset(seed=0)
    assert tuple(taken) == schedule


# ---------------------------------------------------------------- the published ranges


def test_every_range_is_in_the_config_and_episodes_follow_it() -> None:
    path = ROOT / "configs" / "scenarios.yaml"
    text = path.read_text()
    for field in fields(ScenarioConfig):
        assert f"  {field.name}: [" in text, field.name
    config = read_config(path, {"env.episode_s": 300.0, "scenario.stale_gap_s": [20.0, 20.0]})
    env = build_env(build_experiment(config))

    def run(seed: int) -> tuple[list[int], list[bool]]:
        env.reset(seed=seed)
        arrived, stale, over = [], [], False
        while not over:
            _, _, _, over, info = env.step(0)
            assert env.prepared is not None
            arrived.append(info["arrived"])
            stale.append(env.prepared.monitor_state.is_stale)
        return arrived, stale

    found = run(1)
    assert found == run(1)
    assert found[0] != run(2)[0]
    assert any(found[1] + run(2)[1] + run(3)[1])


def test_unknown_ranges_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("scenario: {burst_lenght: [1.0, 2.0]}\n")
    with pytest.raises(InvalidRequestError, match=r"unknown key 'scenario\.burst_lenght'"):
        read_config(path, {})
    path.write_text("scenario: {burst_s: [3.0, 2.0]}\n")
    with pytest.raises(InvalidRequestError, match="the smaller first"):
        read_config(path, {})
