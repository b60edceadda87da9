"""Verdicts of gates: which files they are of, which counts, and what they do not let through."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, UngatedPolicyError
from policies.verdicts import policy_digest, require_passed, sealed

ARTIFACTS = Path(__file__).parents[2] / "policies" / "artifacts"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    shutil.copytree(ARTIFACTS / "demo" / "seed0", tmp_path / "demo")
    (tmp_path / "verdicts").mkdir()
    return tmp_path / "demo"


def put(policy: Path, file: str, passed: bool, made_at: str = "2026-01-01", **changes: Any) -> Path:
    reason = {"rule": "margin", "passed": passed, "text": f"of {file}"}
    told = {"digest": policy_digest(policy), "passed": passed, "reasons": [reason]}
    path = policy.parent / "verdicts" / f"{file}.gate.json"
    path.write_text(json.dumps(sealed(told | {"made_at": made_at} | changes)))
    return path


def ask(policy: Path) -> str:
    return require_passed(policy.parent / "verdicts", policy)


def refusal(policy: Path) -> str:
    with pytest.raises(UngatedPolicyError) as error:
        ask(policy)
    assert "run `python evaluate.py ope LOG --policy" in str(error.value)
    return str(error.value)


def test_a_digest_by_hand(policy: Path) -> None:
    """Names and SHA-256 of the two files that decide, and no others."""
    files = ("manifest.json", "policy.safetensors")
    hashes = [[f, hashlib.sha256((policy / f).read_bytes()).hexdigest()] for f in files]
    expected = hashlib.sha256(json.dumps(["", hashes]).encode()).hexdigest()
    assert policy_digest(policy) == expected
    (policy / "optimizer.safetensors").write_bytes(b"not one of them")
    assert policy_digest(policy) == expected
    (policy / "policy.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        policy_digest(policy)


def test_policies_of_an_artifact_are_told_apart() -> None:
    pool = ARTIFACTS / "h100-16"
    default = json.loads((pool / "artifact.json").read_text())["default"]
    assert policy_digest(pool) == policy_digest(pool, default)
    assert len({policy_digest(pool, n) for n in ("guarded", "hysteresis", "seed0", "seed1")}) == 4
    with pytest.raises(CheckpointError, match="no policy 'seed9'"):
        policy_digest(pool, "seed9")


def test_a_passed_verdict_lets_through(policy: Path) -> None:
    put(policy, "a", passed=True)
    assert ask(policy) == policy_digest(policy)


def test_the_last_verdict_counts(policy: Path) -> None:
    put(policy, "b", passed=True, made_at="2026-01-01")
    put(policy, "a", passed=False, made_at="2026-01-02")
    assert "its last verdict, a.gate.json, did not pass: of a" in refusal(policy)
    put(policy, "c", passed=True, made_at="2026-01-03")
    ask(policy)


def test_what_does_not_let_through(policy: Path) -> None:
    assert "0 verdicts" in refusal(policy)
    put(policy, "a", passed=True, digest="0" * 64)
    assert "1 verdicts" in refusal(policy)
    put(policy, "a", passed=True)
    manifest = policy / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "are of other files" in refusal(policy)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told | {"passed": True},
        lambda told: told | {"schema": 2},
        lambda told: {k: v for k, v in told.items() if k != "seal"},
        lambda told: [told],
    ],
)
def test_a_verdict_that_was_changed_is_none(policy: Path, change: Any) -> None:
    path = put(policy, "a", passed=False)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert "a.gate.json cannot be trusted as read" in refusal(policy)
