"""Verdicts: what a gate of `evaluate.py` said of a policy, bound to the policy's files by a digest.

A verdict is a JSON file, NAME.gate.json, with the policy's digest, the rule, the reasons, the exact
command and versions, and a seal over all of it. The seal shows changes by mistake; it is no
signature: whoever may write the folder of verdicts says which policies pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, UngatedPolicyError
from policies.artifact import FILE, is_artifact, names_of, read_artifact
from policies.manifest import MANIFEST, WEIGHTS

SUFFIX, SCHEMA = ".gate.json", 1


def policy_digest(folder: Path, name: str = "") -> str:
    """SHA-256 over all that decides: manifests, weights and, of an artifact, which of its policies
    is meant (`name`; its default unless given). Raises CheckpointError."""
    checkpoints: tuple[str, ...] = ("",)
    told = []
    if is_artifact(folder):
        artifact = read_artifact(folder)
        checkpoints, name = artifact.members, name or artifact.default
        if name not in names_of(folder):
            raise CheckpointError(f"artifact {folder} has no policy {name!r}.")
        told.append(FILE)
    told += [str(Path(c) / file) for c in checkpoints for file in (MANIFEST, WEIGHTS)]
    try:
        hashes = [[path, hashlib.sha256((folder / path).read_bytes()).hexdigest()] for path in told]
    except OSError as error:
        raise CheckpointError(f"{folder} is incomplete ({error}); copy it again.") from error
    return hashlib.sha256(json.dumps([name, hashes]).encode()).hexdigest()


def sealed(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """With schema and seal."""
    told = {"schema": SCHEMA} | dict(verdict)
    return told | {"seal": _seal(told)}


def _seal(told: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in told.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Verdict:
    file: str
    digest: str
    made_at: str  # UTC, ISO 8601
    passed: bool
    failures: tuple[str, ...]


def _read(path: Path) -> _Verdict:
    """Raises ValueError, KeyError, TypeError, AttributeError, OSError."""
    told = json.loads(path.read_text())
    if told["schema"] != SCHEMA or told["seal"] != _seal(told):
        raise ValueError("changed after it was written")
    failures = tuple(str(r["text"]) for r in told["reasons"] if not r["passed"])
    is_passed = told["passed"] is True and not failures
    return _Verdict(path.name, str(told["digest"]), str(told["made_at"]), is_passed, failures)


def require_passed(verdicts: Path, folder: Path, name: str = "") -> str:
    """The policy's digest, when the last verdict of these very files passed.

    Raises UngatedPolicyError, and CheckpointError for files that cannot be read.
    """
    digest, found, broken = policy_digest(folder, name), [], []
    for path in sorted(verdicts.glob("*" + SUFFIX)):
        try:
            found.append(_read(path))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            broken.append(path.name)
    ours = sorted((v for v in found if v.digest == digest), key=lambda v: (v.made_at, v.file))
    if ours and ours[-1].passed:
        return digest
    policy = f"{folder}:{name}" if name else str(folder)
    if ours:
        why = f"its last verdict, {ours[-1].file}, did not pass: {'; '.join(ours[-1].failures)}"
    else:
        why = f"{len(found)} verdicts in {verdicts} are of other files"
        why += f", and {', '.join(broken)} cannot be trusted as read" if broken else ""
    raise UngatedPolicyError(
        f"policy {policy} may not decide: {why}; with --require-gate it needs a passed verdict of "
        f"exactly its files (digest {digest[:16]}): run `python evaluate.py ope LOG --policy "
        f"{policy} --gate RULE.yaml --json {verdicts}/{folder.name}.json`, or load another."
    )
