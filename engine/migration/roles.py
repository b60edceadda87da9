"""Pure: what every rank of some configurations holds, as few numbers as symmetry allows.

A role is a rank of a configuration: devices with the same role hold the same bytes. Tensors of
one kind between the same stage borders are cut alike, so they form one tensor class. Planning
works on roles and tensor classes; its size grows neither with the pool nor with the layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Deployment, ModelSpec, ParallelConfig, TensorSpec
from engine.shards import Shard, rank_shard, rank_shards

Role = tuple[ParallelConfig, int]  # configuration, rank
Held = dict[str, Shard]  # what a device holds, by tensor
Ints = NDArray[np.int64]
IDLE = 0  # index of the role of a device that holds nothing


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors that every role holds the same interval of; `row_bytes` of one of them."""

    tensors: tuple[TensorSpec, ...]
    dim: int | None
    num_rows: int
    row_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class RoleTable:
    """Who holds what. Role 0 is `IDLE`; [starts, stops) are rows, empty where nothing is held."""

    index: dict[Role, int]
    classes: tuple[TensorClass, ...]
    layers: tuple[Ints, ...]  # by class, of its tensors; outside the layers: 0
    starts: Ints  # [roles, tensor classes]
    stops: Ints
    missing: Ints  # [needed role, held role] bytes

    def first_role(self, parallel: ParallelConfig) -> int:
        """Index of rank 0; its other ranks follow."""
        return self.index[parallel, 0]


def held_shards(model: ModelSpec, deployment: Deployment) -> dict[int, Held]:
    """Device -> what it holds while `deployment` serves. Idle devices hold nothing."""
    return {
        device: shards_by_tensor(model, replica.parallel, rank)
        for replica in deployment.replicas
        for rank, device in enumerate(replica.placement.devices)
    }


@lru_cache(maxsize=4096)
def shards_by_tensor(model: ModelSpec, parallel: ParallelConfig, rank: int) -> Held:
    return {s.tensor: s for s in rank_shards(model, parallel, rank)}


def role_table(model: ModelSpec, configs: Iterable[ParallelConfig]) -> RoleTable:
    """The roles of these configurations; cached."""
    return _role_table(model, tuple(sorted(set(configs))))


@lru_cache(maxsize=1024)
def _role_table(model: ModelSpec, configs: tuple[ParallelConfig, ...]) -> RoleTable:
    roles = [(parallel, rank) for parallel in configs for rank in range(parallel.num_devices)]
    classes = _tensor_classes(model, configs)
    starts = np.zeros((len(roles) + 1, len(classes)), dtype=np.int64)
    stops = np.zeros_like(starts)
    for r, (parallel, rank) in enumerate(roles, start=1):
        for c, kind in enumerate(classes):
            shard = rank_shard(kind.tensors[0], model, parallel, rank)
            if shard is not None:
                starts[r, c], stops[r, c] = shard.start, shard.stop
    nbytes = np.array([len(c.tensors) * c.row_bytes for c in classes], dtype=np.int64)
    index = {role: r for r, role in enumerate(roles, start=1)}
    layers = tuple(np.array([t.layer or 0 for t in c.tensors], dtype=np.int64) for c in classes)
    missing = _missing_bytes(starts, stops, nbytes)
    return RoleTable(index, classes, layers, starts, stops, missing)


def _tensor_classes(
    model: ModelSpec, configs: tuple[ParallelConfig, ...]
) -> tuple[TensorClass, ...]:
    borders = sorted(
        {c.layer_range(stage, model.num_layers)[0] for c in configs for stage in range(c.pp)}
    )
    kinds: dict[tuple[object, ...], list[TensorSpec]] = {}
    for tensor in model.tensors:
        between = None
        if tensor.layer is not None:
            between = sum(border <= tensor.layer for border in borders)
        kind = (between, tensor.role, tensor.shape, tensor.tp_dim)
        kinds.setdefault(kind, []).append(tensor)
    return tuple(_tensor_class(tuple(tensors), model.dtype_bytes) for tensors in kinds.values())


def _tensor_class(tensors: tuple[TensorSpec, ...], dtype_bytes: int) -> TensorClass:
    shape, dim = tensors[0].shape, tensors[0].tp_dim
    num_rows = shape[dim or 0]
    return TensorClass(tensors, dim, num_rows, prod(shape) * dtype_bytes // num_rows)


def _missing_bytes(starts: Ints, stops: Ints, nbytes: Ints) -> Ints:
    """[needed, held] bytes of the needed role that the held one lacks."""
    both = np.minimum(stops[:, None], stops) - np.maximum(starts[:, None], starts)
    missing: Ints = ((stops - starts) @ nbytes)[:, None] - np.maximum(both, 0) @ nbytes
    return missing
