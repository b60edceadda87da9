"""A small profiled cluster with plausible numbers: four devices, weights that crowd the KV cache
of one device but not of several."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.cluster import (
    ClusterSpec,
    ModelSpec,
    ParallelConfig,
    TensorSpec,
    WorkloadType,
    WorkloadTyping,
)
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel

LAYERS, HIDDEN, VOCAB = 8, 256, 1024


def _tensors() -> tuple[TensorSpec, ...]:
    layers = [
        TensorSpec(f"layers.{i}.{name}", (4 * HIDDEN, HIDDEN), "layer", i, 0)
        for i in range(LAYERS)
        for name in ("attn", "mlp")
    ]
    embed = TensorSpec("embed", (VOCAB, HIDDEN), "embed")
    norm = TensorSpec("norm", (HIDDEN,), "norm")
    return (embed, *layers, norm, TensorSpec("head", (VOCAB, HIDDEN), "head"))


def _step_model(tp: int, pp: int) -> StepTimeModel:
    """Compute shrinks with tp, each all-reduce and stage hop adds to the base."""
    return StepTimeModel(
        ParallelConfig(tp, pp),
        base_s=0.002 + 0.008 / tp + 0.0003 * (tp - 1) + 0.002 * (pp - 1),
        per_token_s=2e-4 / tp**0.8,
        per_seq_s=1e-4 / tp**0.5,
        per_context_token_s=1e-6 / tp,
        stage_share=1.0 if pp == 1 else 1.15 / pp,
    )


def build_cluster(num_devices: int, max_devices_per_replica: int) -> ProfiledCluster:
    model = ModelSpec("toy", LAYERS, 8, 4, 32, HIDDEN, VOCAB, 2048, 4, _tensors())
    spec = ClusterSpec(
        num_devices=num_devices,
        devices_per_node=8,
        device_memory_bytes=44 * 2**20,
        link_bytes_per_s=2e8,
        block_size=16,
        model=model,
        max_num_seqs=64,
        max_num_batched_tokens=512,
    )
    steps = tuple(
        _step_model(tp, pp)
        for tp in (1, 2, 4)
        for pp in (1, 2, 3, 4)
        if tp * pp <= max_devices_per_replica
    )
    profile = ServingProfile("toy", "synthetic", steps, 2e8, 0.3, 0.05)
    return ProfiledCluster(spec, profile)


@pytest.fixture(scope="session")
def synthetic_cluster() -> ProfiledCluster:
    return build_cluster(4, 4)


@pytest.fixture(scope="session")
def make_cluster() -> Callable[[int, int], ProfiledCluster]:
    """make_cluster(devices, most devices of a replica)."""
    return build_cluster


@pytest.fixture(scope="session")
def four_types() -> WorkloadTyping:
    return WorkloadTyping(
        (
            WorkloadType("type0", 40.0, 20.0),
            WorkloadType("type1", 60.0, 250.0),
            WorkloadType("type2", 400.0, 40.0),
            WorkloadType("type3", 900.0, 300.0),
        ),
        (0.4, 0.25, 0.25, 0.1),
    )
