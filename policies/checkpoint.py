"""Policy checkpoints: a folder of safetensors and one manifest.json. Nothing is ever unpickled.

policy.safetensors     weights of the network
optimizer.safetensors  Adam's moments, "<parameter index>.<name>"
manifest.json          schema, digests of both files, observation spec and its hash, normaliser
                       statistics, network and training configuration, and what the caller adds
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from engine.errors import CheckpointError
from policies.manifest import (
    MANIFEST,
    OPTIMIZER,
    SCHEMA,
    WEIGHTS,
    load_manifest,
)
from policies.networks import build_network
from policies.ppo import PpoPolicy
from policies.trained import describe, read_tensors

_LIBRARIES = ("torch", "numpy", "stable-baselines3", "sb3-contrib")


def save_checkpoint(
    folder: Path,
    policy: PpoPolicy,
    optimizer_state: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write a checkpoint whole or not at all; an older one at `folder` is replaced.

    optimizer_state: of torch.optim. facts: what else belongs to the policy and is plain JSON:
    training configuration, workload typing, decision configuration, cluster, seed, git revision.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        save_file(_contiguous(policy.network.state_dict()), staging / WEIGHTS)
        tensors, groups = _flatten_optimizer(optimizer_state)
        save_file(tensors, staging / OPTIMIZER)
        manifest = _manifest(policy, staging) | {"optimizer_groups": groups} | dict(facts)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Into the manifest of a checkpoint that is there. Raises CheckpointError."""
    manifest, part = load_manifest(folder) | dict(facts), folder / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    part.replace(folder / MANIFEST)


def _manifest(policy: PpoPolicy, staging: Path) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": policy.name,
        "observation": asdict(policy.spec),
        "spec_hash": policy.spec.hash,
        "network": asdict(policy.network_config),
        "normalizer": policy.normalizer.to_json(),
        "files": {name: _digest(staging / name) for name in (WEIGHTS, OPTIMIZER)},
        "versions": {library: version(library) for library in _LIBRARIES},
    }


def _replace(staging: Path, folder: Path) -> None:
    """Two renames: a reader sees the old checkpoint, for an instant none, then the new one."""
    retired = staging.with_name(staging.name + ".old")
    if folder.exists():
        os.replace(folder, retired)
    os.replace(staging, folder)
    shutil.rmtree(retired, ignore_errors=True)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """torch.optim state -> tensors by "<parameter>.<name>", and its plain parameter groups."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, [dict(group) for group in state["param_groups"]]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_tensors(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    data = read_tensors(folder, manifest, name)
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} of {folder} cannot be read as safetensors: {error}."
        ) from error
    return tensors


def load_policy(folder: Path, expected_spec_hash: str | None = None) -> PpoPolicy:
    """The policy of a checkpoint, with its network. Sets torch to one thread. To decide by it,
    `policies.trained.load_trained` is enough, and raises the same."""
    torch.set_num_threads(1)
    manifest = load_manifest(folder)
    spec, config, normalizer, name = describe(folder, manifest, expected_spec_hash)
    network = build_network(spec, config)
    try:
        network.load_state_dict(_load_tensors(folder, manifest, WEIGHTS))
    except RuntimeError as error:
        raise CheckpointError(
            f"{WEIGHTS} of {folder} does not fit its manifest: {error}"
        ) from error
    return PpoPolicy(spec, network, config, normalizer, name)


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Adam's state as `torch.optim.Optimizer.load_state_dict` takes it. Raises CheckpointError."""
    manifest = load_manifest(folder)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _load_tensors(folder, manifest, OPTIMIZER).items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = tensor
    ordered = {index: state[index] for index in sorted(state)}
    return {"state": ordered, "param_groups": manifest["optimizer_groups"]}
