"""The profiler on a real engine of two workers, and what leaders report of their steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine import step_fit
from engine.build import build_runtime
from engine.cluster import ParallelConfig
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.messages import StepReport
from engine.profile import Crowding, StepTimeModel
from engine.profiler import (
    Observed,
    Profiler,
    cpu_seconds,
    crowd,
    crowding_exponent,
    fit,
    step_rows,
)


@pytest.fixture(autouse=True)
def noisy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps scatter more beside other tests than a profile may be fitted to."""
    monkeypatch.setattr(step_fit, "MAX_RESIDUAL_P50", 1.0)


@pytest.fixture(scope="module")
def cluster(tiny_model_dir: Path) -> Iterator[EngineCluster]:
    config = EngineConfig(
        model=str(tiny_model_dir),
        num_workers=2,
        deployment="2xtp1pp1",
        max_model_len=256,
        enable_prefix_caching=False,
    )
    with EngineCluster(lambda: build_runtime(config)) as running:
        yield running


def report(started_s: float, ended_s: float, tokens: int = 1, others: int = 0) -> StepReport:
    return StepReport(started_s, ended_s, tokens, tokens, tokens, 9, 9.0, others, others)


def test_cpu_seconds_are_those_of_the_process() -> None:
    before, since = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < since + 0.3:
        pass
    assert cpu_seconds(os.getpid()) - before == pytest.approx(0.3, abs=0.1)


def test_rows_tell_how_long_after_the_step_before() -> None:
    steps = [report(0.0, 4.0), report(4.0, 9.0), report(5.0, 11.0, others=1), report(20.0, 21.0)]
    assert [row[-2:] for row in step_rows(steps)] == [
        (4.0, math.inf),
        (5.0, math.inf),  # none was in flight when it started
        (6.0, 2.0),
        (1.0, math.inf),
    ]


def half_of_memory(busy_cores: float, slowdowns: tuple[float, ...]) -> tuple[Any, Observed]:
    """A step of four tokens takes 4 s of memory and 4 s of arithmetic."""
    model = StepTimeModel(ParallelConfig(1, 1), 4.0, 1.0, 0.0, 0.0, busy_cores=busy_cores)
    rows = [(4.0, 0.0, 1.0, 4.0, 10.0, 8.0, math.inf)] * 2
    return model, Observed(rows, busy_cores, slowdowns)


def test_crowding_is_what_steps_show() -> None:
    """On two processors, three replicas of one have 2/3 each. What they are slower besides, 1, 1.25
    and 4/3 times, memory makes up for with twice as much, since it has half of the time."""
    crowding = crowd(*half_of_memory(1.0, (1.0, 1.25, 2.0)), processors=2)
    assert crowding.processors == ((1.0, 1.0), (2.0, 1.0), (3.0, 1.5))
    assert [busy for busy, _ in crowding.memory] == [1.0, 2.0, 3.0]
    assert [slower for _, slower in crowding.memory] == pytest.approx([1.0, 1.5, 5 / 3])
    alone = crowd(*half_of_memory(2.0, (1.0, 2.5)), processors=1)
    assert alone.processors == ((2.0, 1.0), (4.0, 2.0)), "one alone has too few already"
    assert alone.memory == ((2.0, 1.0), (4.0, 1.5))
    crowding = crowd(*half_of_memory(1.0, (1.0, 0.9)), processors=2)
    assert crowding.memory == ((1.0, 1.0), (2.0, 1.0)), "nothing is faster beside others"


def test_the_exponent_is_what_replicas_are_slower_together() -> None:
    """Two keep 4 of 2 processors busy and have half each."""
    shared = Crowding(processors=((2.0, 1.0), (4.0, 2.0)))
    with_memory = replace(shared, memory=((2.0, 1.0), (4.0, 1.5)))  # 1.25 of all
    for slowdown, crowding, expected in (
        (2.0, shared, 1.0),
        (4.0, shared, 2.0),
        (2.5, with_memory, 1.0),
        (5.0, with_memory, 2.0),
        (0.9, shared, 0.5),
        (99.0, shared, 3.0),
    ):
        found = crowding_exponent(*half_of_memory(2.0, (1.0, slowdown)), crowding)
        assert found == pytest.approx(expected), (slowdown, crowding)
    assert crowding_exponent(*half_of_memory(2.0, (1.0,)), shared) == 1.0, "nothing to compare"


def test_leaders_report_their_steps(cluster: EngineCluster) -> None:
    seen = Profiler(cluster.runtime, isolated=True)
    cluster.run(seen._switch_to(ParallelConfig(1, 1)), timeout_s=60.0)
    cluster.on_loop(seen._take_reports)
    started_s = time.perf_counter()
    cluster.run(seen._request(128, 9), timeout_s=30.0)
    measured_s = time.perf_counter() - started_s
    (steps,) = cluster.on_loop(seen._take_reports)
    assert [s.tokens for s in steps] == [128] + 8 * [1]
    assert [s.decoding for s in steps] == [0] + 8 * [1]
    assert [s.context_tokens for s in steps] == list(range(128, 137))
    assert steps[0].pairs == 128 * 129 / 2
    assert all(b.started_s == a.ended_s for a, b in pairwise(steps)), "nothing between two steps"
    assert 0.3 * measured_s < steps[-1].ended_s - steps[0].started_s < measured_s


def test_one_replica_alone_and_two_together(cluster: EngineCluster) -> None:
    """What was measured is a step: a request takes what the fit tells."""
    seen = Profiler(cluster.runtime, isolated=True)
    observed = cluster.run(seen.observe(ParallelConfig(1, 1)), timeout_s=60.0)
    assert cluster.snapshot().deployment.key == "2xtp1pp1"
    assert len(observed.slowdowns) == 2
    assert 0.4 < observed.slowdowns[1] < 4.0
    assert 0.1 < observed.busy_cores < 1.6
    fitted = fit(ParallelConfig(1, 1), observed)
    cluster.on_loop(seen._take_reports)
    cluster.run(seen._request(128, 9), timeout_s=30.0)
    (steps,) = cluster.on_loop(seen._take_reports)
    predicted_s = fitted.step_s(128, 1, 128, 128 * 129 / 2)
    predicted_s += sum(fitted.step_s(1, 1, 129 + i, 129 + i) for i in range(8))
    assert predicted_s == pytest.approx(steps[-1].ended_s - steps[0].started_s, rel=0.8)
    assert fitted.step_s(200, 1, 200, 200 * 201 / 2) > 1.5 * fitted.step_s(1, 1, 200, 200)


def test_a_pipeline(cluster: EngineCluster) -> None:
    seen = Profiler(cluster.runtime, isolated=True)
    fitted = fit(ParallelConfig(1, 2), cluster.run(seen.observe(ParallelConfig(1, 2)), 60.0))
    assert 0.5 <= fitted.stage_share <= 1.0
    assert 0.1 < fitted.busy_cores < 2.2
    assert fitted.base_s > 0
