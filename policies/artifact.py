"""A shipped policy: checkpoints of several seeds, the rule that guards them, and which of the two
decides by default.

The folder holds one checkpoint a seed, `artifact.json` and a card for people. Hysteresis is the
default wherever the trained policies were not shown to be better than it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, InvalidRequestError
from policies.base import Policy
from policies.baselines import HysteresisConfig, HysteresisPolicy
from policies.guarded import GuardedConfig, GuardedPolicy
from policies.manifest import MANIFEST, check_hash, load_manifest, spec_from_json
from policies.trained import load_trained

FILE, SCHEMA = "artifact.json", 1
GUARDED, HYSTERESIS = "guarded", "hysteresis"


@dataclass(frozen=True, slots=True)
class Artifact:
    """What `artifact.json` says."""

    default: str  # GUARDED or HYSTERESIS
    members: tuple[str, ...]  # folders of checkpoints
    hysteresis: HysteresisConfig
    guarded: GuardedConfig

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self)


def is_artifact(folder: Path) -> bool:
    """Whether the folder is a shipped policy, not a single checkpoint."""
    return (folder / FILE).is_file()


def is_policy(folder: Path) -> bool:
    """Whether the folder is an artifact or a checkpoint."""
    return is_artifact(folder) or (folder / MANIFEST).is_file()


def names_of(folder: Path) -> tuple[str, ...]:
    """What `load_shipped` knows the policies of an artifact by. Raises CheckpointError."""
    return (GUARDED, HYSTERESIS, *read_artifact(folder).members)


def read_artifact(folder: Path) -> Artifact:
    """Raises CheckpointError in one sentence."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        if found.pop("schema") != SCHEMA:
            raise ValueError(f"this version reads schema {SCHEMA}")
        artifact = Artifact(
            str(found.pop("default")),
            tuple(map(str, found.pop("members"))),
            HysteresisConfig(**found.pop("hysteresis")),
            GuardedConfig(**found.pop("guarded")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequestError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again.") from error
    if found or artifact.default not in (GUARDED, HYSTERESIS) or not artifact.members:
        raise CheckpointError(
            f"{path} needs a default of {GUARDED} or {HYSTERESIS} and at least one member, and has "
            f"default {artifact.default!r}, {len(artifact.members)} members and "
            f"{', '.join(found) or 'nothing'} that is not known; copy it again."
        )
    return artifact


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Beside the checkpoints."""
    part = folder / (FILE + ".part")
    part.write_text(json.dumps(artifact.to_json(), indent=1) + "\n")
    part.replace(folder / FILE)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Of a checkpoint, or of an artifact's first member. Raises CheckpointError."""
    if is_artifact(folder):
        folder = folder / read_artifact(folder).members[0]
    return load_manifest(folder)


def load_shipped(folder: Path, expected_spec_hash: str | None = None, name: str = "") -> Policy:
    """The policy of a checkpoint, or of an artifact the one that `name` says (GUARDED, HYSTERESIS
    or a member), its default unless given.

    Raises CheckpointError.
    """
    if not is_artifact(folder):
        if name:
            raise CheckpointError(
                f"{folder} is a single checkpoint ({MANIFEST}), it has no {name!r}; leave it out."
            )
        return load_trained(folder, expected_spec_hash)
    artifact = read_artifact(folder)
    chosen = name or artifact.default
    if chosen in artifact.members:
        return load_trained(folder / chosen, expected_spec_hash)
    if chosen not in (GUARDED, HYSTERESIS):
        known = ", ".join(names_of(folder))
        raise CheckpointError(f"artifact {folder} has no policy {chosen!r}; it has {known}.")
    spec = spec_from_json(load_manifest(folder / artifact.members[0])["observation"])
    rule = HysteresisPolicy(spec, artifact.hysteresis)
    if chosen == HYSTERESIS:
        check_hash(folder, spec.hash, expected_spec_hash or spec.hash, "this controller")
        return rule
    members = [load_trained(folder / m, expected_spec_hash) for m in artifact.members]
    return GuardedPolicy(members, rule, artifact.guarded)
