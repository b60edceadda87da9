"""What several rooms test on: the embedded tiny model, a four-worker engine, a profiled cluster.

Heavy imports are inside the fixtures, so that tests without an engine do not pay for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.cluster import (
    ClusterSpec,
    ModelSpec,
    ParallelConfig,
    TensorSpec,
    dense_deployment,
    parse_deployment_key,
)
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel

MAX_MODEL_LEN = 256
LAYERS, HIDDEN, VOCAB = 4, 128, 256
ROOMS_OF_RANKS = ("engine", "contract")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `ranks` what starts an engine; a test that does it another way marks itself."""
    for item in items:
        uses_model = "tiny_model_dir" in getattr(item, "fixturenames", ())
        if uses_model or item.path.parent.name in ROOMS_OF_RANKS:
            item.add_marker(pytest.mark.ranks)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_spec(tiny_model_dir: Path) -> ClusterSpec:
    from engine.weights import read_model_spec

    model = replace(read_model_spec(tiny_model_dir, "float32"), max_model_len=MAX_MODEL_LEN)
    return ClusterSpec(4, 4, 40_000_000, 1e9, 16, model, 32, 128)


@pytest.fixture(scope="session")
def open_engine(tiny_model_dir: Path, tiny_spec: ClusterSpec) -> Callable[..., Any]:
    """open_engine(key): a context manager that gives an `EngineCluster` of four workers. Options
    are an executor, a ChannelConfig, devices per node, a RecoveryConfig, and fields of
    WorkerConfig by name."""
    from engine.channel import ChannelConfig
    from engine.executor import LocalExecutor, WorkerConfig
    from engine.facade import EngineCluster
    from engine.runtime import EngineRuntime, make_run_dir
    from engine.worker_pool import RecoveryConfig

    def build(
        key: str,
        executor: Any,
        channel: ChannelConfig,
        per_node: int,
        recovery: RecoveryConfig,
        fields: Any,
    ) -> EngineRuntime:
        run_dir, spec = make_run_dir(), replace(tiny_spec, devices_per_node=per_node)
        workers = [
            WorkerConfig(
                device=device,
                run_dir=str(run_dir),
                model_dir=str(tiny_model_dir),
                dtype="float32",
                block_size=spec.block_size,
                max_model_len=spec.model.max_model_len,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                eos_token_ids=(),
                host=channel.host,
                keys=channel.keys,
                **{"torch_device": "cpu", **fields},
            )
            for device in range(spec.num_devices)
        ]
        initial = dense_deployment(parse_deployment_key(key))
        return EngineRuntime(
            spec,
            initial,
            executor,
            workers,
            run_dir,
            max_queue=100,
            channel_config=channel,
            recovery=recovery,
        )

    @contextmanager
    def opened(
        key: str = "4xtp1pp1",
        executor: Any = None,
        channel: ChannelConfig | None = None,
        devices_per_node: int = 4,
        recovery: RecoveryConfig | None = None,
        **fields: Any,
    ) -> Iterator[EngineCluster]:
        executor, channel = executor or LocalExecutor(), channel or ChannelConfig()
        recovery = recovery or RecoveryConfig()
        build_it = partial(build, key, executor, channel, devices_per_node, recovery, fields)
        with EngineCluster(build_it) as cluster:
            yield cluster

    return opened


def _step_model(tp: int, pp: int) -> StepTimeModel:
    """Compute shrinks with tp, each all-reduce and stage hop adds to the base."""
    return StepTimeModel(
        ParallelConfig(tp, pp),
        base_s=0.002 + 0.004 / tp + 0.0005 * (tp - 1) + 0.001 * (pp - 1),
        per_token_s=6e-5 / tp**0.8,
        per_seq_s=4e-4 / tp**0.5,
        per_context_token_s=1e-6 / tp,
        stage_share=1.0 if pp == 1 else 1.1 / pp,
        leader_computes=tp > 1,
    )


@pytest.fixture(scope="session")
def small_cluster() -> ProfiledCluster:
    """Four devices whose KV cache is tight: preemption happens under load."""
    tensors = (
        TensorSpec("embed", (VOCAB, HIDDEN), "embed"),
        *(TensorSpec(f"layers.{i}", (8 * HIDDEN, HIDDEN), "layer", i, 0) for i in range(LAYERS)),
        TensorSpec("norm", (HIDDEN,), "norm"),
        TensorSpec("head", (VOCAB, HIDDEN), "head"),
    )
    model = ModelSpec("small", LAYERS, 4, 4, 32, HIDDEN, VOCAB, MAX_MODEL_LEN, 4, tensors)
    spec = ClusterSpec(4, 4, 5_000_000, 2e8, 16, model, 16, 64)
    degrees = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1))
    steps = tuple(_step_model(tp, pp) for tp, pp in degrees)
    return ProfiledCluster(spec, ServingProfile("small", "synthetic", steps, 2e8, 0.2, 0.03))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A `browsing.Browser`; tests without a Chromium to drive skip themselves."""
    from browsing import Browser

    with closing(Browser()) as found:
        yield found
