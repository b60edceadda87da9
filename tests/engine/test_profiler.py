"""The profiler on a real engine of two workers, and what leaders report of their steps."""

from __future__ import annotations

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
from engine.profiler import Profiler, cpu_seconds, full_steps, step_rows


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


def test_rows_are_of_steps_alone_and_of_full_pipelines() -> None:
    steps = [
        report(0.0, 4.0),  # alone
        report(4.0, 9.0, others=1),  # the first that shares the pipeline
        report(5.0, 11.0, others=1),
        report(9.0, 13.0, others=1),
        report(11.0, 15.0, tokens=2, others=1),  # another size
    ]
    found = [(s.started_s, gap_s) for s, gap_s in full_steps(steps, pp=2)]
    assert found == [(5.0, 2.0), (9.0, 2.0)]
    rows = step_rows(steps, 2, share=0.4)
    assert [(r[0], r[-1]) for r in rows] == [(1, 4.0), (1, 5.0), (1, 5.0)]
    assert [(r[0], r[-1]) for r in step_rows(steps[:1], 1, share=1.0)] == [(1, 4.0)]


def test_one_replica_alone(cluster: EngineCluster) -> None:
    """Two workers, one replica of one device: the other idles. What was measured is a step."""
    profiler = Profiler(cluster.runtime, isolated=True)
    model = cluster.run(profiler.measure(ParallelConfig(1, 1)), timeout_s=60.0)
    assert cluster.snapshot().deployment.key == "1xtp1pp1"
    cluster.on_loop(profiler._take_reports)
    started_s = time.perf_counter()
    cluster.run(profiler._burst(1, 128, 9), timeout_s=30.0)
    measured_s = time.perf_counter() - started_s
    (steps,) = cluster.on_loop(profiler._take_reports)
    assert [s.tokens for s in steps] == [128] + 8 * [1]
    assert [s.decoding for s in steps] == [0] + 8 * [1]
    assert [s.context_tokens for s in steps] == list(range(128, 137))
    assert steps[0].pairs == 128 * 129 / 2
    assert all(b.started_s == a.ended_s for a, b in pairwise(steps)), "nothing between two steps"
    spent_s = steps[-1].ended_s - steps[0].started_s
    assert 0.3 * measured_s < spent_s < measured_s
    assert 0.1 < model.busy_cores < 1.6
    predicted_s = model.step_s(128, 1, 128, 128 * 129 / 2)
    predicted_s += sum(model.step_s(1, 1, 129 + i, 129 + i) for i in range(8))
    assert predicted_s == pytest.approx(spent_s, rel=0.8)
    assert model.step_s(200, 1, 200, 200 * 201 / 2) > 1.5 * model.step_s(1, 1, 200, 200)


def test_a_pipeline_alone(cluster: EngineCluster) -> None:
    profiler = Profiler(cluster.runtime, isolated=True)
    model = cluster.run(profiler.measure(ParallelConfig(1, 2)), timeout_s=60.0)
    assert 0.5 <= model.stage_share <= 1.0
    assert 0.1 < model.busy_cores < 2.2
    assert model.base_s > 0
