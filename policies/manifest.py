"""The manifest of a policy checkpoint: what is known of a policy without loading it, nor torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from policies.base import ObservationSpec

SCHEMA = 1
MANIFEST, WEIGHTS, OPTIMIZER = "manifest.json", "policy.safetensors", "optimizer.safetensors"
_REQUIRED = ("observation", "spec_hash", "network", "normalizer", "files")


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked for schema and completeness. Raises CheckpointError."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"no policy checkpoint at {folder}: {MANIFEST} is missing; give the folder that "
            "train.py wrote."
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); train or copy it again."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise CheckpointError(
            f"{path} has schema {found!r}, this version reads schema {SCHEMA}; "
            "train the policy again."
        )
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; train or copy it again.")
    return manifest


def spec_from_json(data: Mapping[str, Any]) -> ObservationSpec:
    names = {key: tuple(data[key]) for key in ("state_features", "candidate_features")}
    return ObservationSpec(**(dict(data) | names))


def check_hash(folder: Path, found: str, expected: str, whose: str) -> None:
    """Raises CheckpointError when a policy sees other features than `whose`."""
    if found != expected:
        raise CheckpointError(
            f"checkpoint {folder} was trained on observation {found}, {whose} has {expected}; "
            "use a policy trained with the same features and grid, or train again."
        )
