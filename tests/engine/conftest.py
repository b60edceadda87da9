"""A four-worker engine on the embedded tiny model, and references made by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cluster import ClusterSpec, dense_deployment, parse_deployment_key
from engine.executor import LocalExecutor, WorkerConfig
from engine.facade import EngineCluster
from engine.runtime import EngineRuntime, make_run_dir
from engine.tiny_model import write_tiny_model
from engine.weights import read_model_spec

MAX_MODEL_LEN = 256


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_spec(tiny_model_dir: Path) -> ClusterSpec:
    model = replace(read_model_spec(tiny_model_dir, "float32"), max_model_len=MAX_MODEL_LEN)
    return ClusterSpec(4, 4, 40_000_000, 1e9, 16, model, 32, 128)


@pytest.fixture(scope="session")
def open_engine(
    tiny_model_dir: Path, tiny_spec: ClusterSpec
) -> Callable[..., contextmanager[EngineCluster]]:
    def build(key: str) -> EngineRuntime:
        run_dir, spec = make_run_dir(), tiny_spec
        workers = [
            WorkerConfig(
                device=device,
                run_dir=str(run_dir),
                model_dir=str(tiny_model_dir),
                dtype="float32",
                torch_device="cpu",
                block_size=spec.block_size,
                max_model_len=spec.model.max_model_len,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                eos_token_ids=(),
            )
            for device in range(spec.num_devices)
        ]
        initial = dense_deployment(parse_deployment_key(key))
        return EngineRuntime(spec, initial, LocalExecutor(), workers, run_dir, max_queue=100)

    @contextmanager
    def opened(key: str = "4xtp1pp1") -> Iterator[EngineCluster]:
        with EngineCluster(lambda: build(key)) as cluster:
            yield cluster

    return opened
