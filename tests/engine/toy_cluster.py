"""A small model, clusters of it, and random deployments: what tests of switch plans share."""

from __future__ import annotations

from hypothesis import strategies as st

from engine.cluster import ClusterSpec, KvCostParams, ModelSpec, ParallelConfig, TensorSpec

KV = KvCostParams(1e9, 1000.0, 0.01)
SHAPES = [ParallelConfig(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 4) if tp * pp <= 4]


def model(num_layers: int = 4, heads: int = 8, hidden: int = 8) -> ModelSpec:
    tensors = [
        TensorSpec("embed", (16, hidden), "embed"),
        TensorSpec("head", (16, hidden), "head"),
    ]
    for layer in range(num_layers):
        tensors += [
            TensorSpec(f"{layer}.qkv", (hidden, hidden), "layer", layer, 0),
            TensorSpec(f"{layer}.o", (hidden, hidden), "layer", layer, 1),
            TensorSpec(f"{layer}.norm", (hidden,), "layer", layer),
        ]
    return ModelSpec("toy", num_layers, heads, heads, 1, hidden, 16, 32, 4, tuple(tensors))


def cluster(num_devices: int, devices_per_node: int = 0, **of_model: int) -> ClusterSpec:
    per_node = devices_per_node or num_devices
    return ClusterSpec(num_devices, per_node, 10**9, 1e9, 4, model(**of_model), 8, 64)


def deployments(num_devices: int) -> st.SearchStrategy[tuple[ParallelConfig, ...]]:
    def fit(shapes: list[ParallelConfig]) -> tuple[ParallelConfig, ...]:
        kept: list[ParallelConfig] = []
        left = num_devices
        for shape in shapes:
            if shape.num_devices <= left:
                kept.append(shape)
                left -= shape.num_devices
        return tuple(kept)

    shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=num_devices).map(fit)
    return shapes.filter(bool)
