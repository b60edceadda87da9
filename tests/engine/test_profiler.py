"""The profiler on a real engine of two workers, and what leaders report of their steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from engine.build import build_runtime
from engine.cluster import ParallelConfig
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.messages import StepReport
from engine.profile import StepTimeModel
from engine.profiler import Observed, Profiler, cpu_seconds, crowd, fit, step_rows


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


def model(key: tuple[int, int], busy_cores: float, stage_share: float = 1.0) -> StepTimeModel:
    parallel = ParallelConfig(*key)
    return StepTimeModel(
        parallel, 1.0, 0.0, 0.0, 0.0, busy_cores=busy_cores, stage_share=stage_share
    )


def test_crowding_is_what_steps_show() -> None:
    """Replicas of one device, one processor busy each: 2 of them are 1.2 times as slow, 3 are 2.1
    and 4 are 3 times. Two pipelines are 2.1 times as slow as one, which keeps b busy: together
    1.8 b - 0.6 times as slow, one 0.8 + 0.2 b, so b = 2.28 / 1.38 for 2 steps at work. Two tp pairs
    are 1.2 times as slow as one, like 2 processors and 1; one that was alone keeps what processor
    time tells."""
    models = [model((1, 2), 1.1, 0.5), model((2, 1), 1.3), model((1, 1), 1.0), model((4, 1), 0.7)]
    observed = [
        Observed([], slowdowns=(1.0, 2.1)),
        Observed([], slowdowns=(1.0, 1.2)),
        Observed([], slowdowns=(1.0, 1.2, 2.1, 3.0)),
        Observed([]),
    ]
    found, crowding = crowd(models, observed)
    assert crowding == ((1.0, 1.0), (2.0, 1.2), (3.0, 2.1), (4.0, 3.0))
    busy = {m.parallel.key: m.busy_cores for m in found}
    expected = {"tp1pp1": 1.0, "tp1pp2": 1.14 / 1.38, "tp2pp1": 1.0, "tp4pp1": 0.7}
    assert busy == pytest.approx(expected, abs=0.003)
    bases_s = {m.parallel.key: m.base_s for m in found}
    freed = {"tp1pp1": 1.0, "tp1pp2": 1 / (0.8 + 0.2 * 2.28 / 1.38), "tp2pp1": 1.0, "tp4pp1": 1.0}
    assert bases_s == pytest.approx(freed, abs=0.003)
    found, _ = crowd(models, [Observed([], slowdowns=(1.0, 0.9)), *observed[1:]])
    assert found[0].busy_cores == pytest.approx(0.25, abs=0.003), "two are not slower: at most half"


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
