"""The profiler on a real engine of two workers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engine.build import build_runtime
from engine.cluster import ParallelConfig
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.profiler import Profiler, cpu_seconds


def test_cpu_seconds_are_those_of_the_process() -> None:
    before, since = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < since + 0.3:
        pass
    assert cpu_seconds(os.getpid()) - before == pytest.approx(0.3, abs=0.1)


def test_one_replica_alone(tiny_model_dir: Path) -> None:
    """Two workers, one replica of one device: the other idles. What was measured is a step."""
    config = EngineConfig(
        model=str(tiny_model_dir),
        num_workers=2,
        deployment="2xtp1pp1",
        max_model_len=256,
        enable_prefix_caching=False,
    )
    with EngineCluster(lambda: build_runtime(config)) as cluster:
        profiler = Profiler(cluster.runtime, isolated=True)
        model = cluster.run(profiler.measure(ParallelConfig(1, 1)), timeout_s=60.0)
        assert cluster.snapshot().deployment.key == "1xtp1pp1"
        started_s = time.perf_counter()
        times = cluster.run(profiler._burst(1, 128, 9), timeout_s=30.0)
        measured_s = time.perf_counter() - started_s
    assert times.shape == (1, 10)
    assert 0.1 < model.busy_cores < 1.2
    predicted_s = model.step_s(128, 1, 128, 128 * 129 / 2)
    predicted_s += sum(model.step_s(1, 1, 129 + i, 129 + i) for i in range(8))
    assert predicted_s == pytest.approx(measured_s, rel=0.8)
    assert model.step_s(200, 1, 200, 200 * 201 / 2) > 1.5 * model.step_s(1, 1, 200, 200)
