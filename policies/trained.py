"""Policies from checkpoints, without torch: what decides, not what trains further."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load

from engine.errors import CheckpointError
from policies.base import ObservationSpec
from policies.inference import NetworkConfig, TrainedPolicy, build_actor
from policies.manifest import WEIGHTS, check_hash, load_manifest, spec_from_json
from policies.normalizer import ObservationNormalizer


class Described(NamedTuple):
    """What a manifest says of its policy."""

    spec: ObservationSpec
    network: NetworkConfig
    normalizer: ObservationNormalizer
    name: str


def describe(
    folder: Path, manifest: Mapping[str, Any], expected_spec_hash: str | None = None
) -> Described:
    """Raises CheckpointError for a manifest that makes no sense, or for another observation."""
    try:
        spec = spec_from_json(manifest["observation"])
        config = NetworkConfig(**manifest["network"])
        normalizer = ObservationNormalizer.from_json(manifest["normalizer"], spec)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest of {folder} is malformed: {error}.") from error
    check_hash(folder, spec.hash, manifest["spec_hash"], "its own manifest")
    if expected_spec_hash is not None:
        check_hash(folder, spec.hash, expected_spec_hash, "this controller")
    return Described(spec, config, normalizer, str(manifest.get("name", "ppo")))


def read_tensors(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """A file of the checkpoint, which is as its manifest says. Raises CheckpointError."""
    path = Path(folder) / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} lacks {name}; copy the whole folder again.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["files"].get(name):
        raise CheckpointError(
            f"{path} is truncated or was changed: its SHA-256 is not the manifest's; copy the "
            "checkpoint again."
        )
    return data


def load_trained(folder: Path, expected_spec_hash: str | None = None) -> TrainedPolicy:
    """The policy of a checkpoint.

    Raises CheckpointError in one sentence: missing file, truncated file, another schema, or an
    observation other than `expected_spec_hash` says.
    """
    manifest = load_manifest(folder)
    spec, config, normalizer, name = describe(folder, manifest, expected_spec_hash)
    data = read_tensors(folder, manifest, WEIGHTS)
    try:
        actor = build_actor(config, normalizer.layout, load(data))
    except SafetensorError as error:
        raise CheckpointError(
            f"{WEIGHTS} of {folder} cannot be read as safetensors: {error}."
        ) from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{WEIGHTS} of {folder} does not fit its manifest: {error}"
        ) from error
    return TrainedPolicy(spec, actor, config, normalizer, name)
