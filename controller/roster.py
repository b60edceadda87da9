"""The policies that a controller may decide by: rules, and what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controller.decision import DecisionPipeline
from controller.retraining import Expected, expected_from
from engine.errors import (
    CheckpointError,
    InvalidRequestError,
    NotFoundError,
    TidewrightError,
    UngatedPolicyError,
)
from policies.artifact import is_policy, load_shipped, manifest_of
from policies.base import Policy
from policies.baselines import HysteresisPolicy, KeepPolicy, MyopicPolicy
from policies.manifest import WEIGHTS
from policies.verdicts import require_passed

RULES = ("keep", "myopic", "hysteresis")


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """What is known of a policy without loading it."""

    name: str
    kind: str  # "rule" or "checkpoint"
    digest: str = ""  # of the weights
    is_compatible: bool = True
    problem: str = ""  # why not, or what else differs


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    info: PolicyInfo
    policy: Policy
    expected: Mapping[str, Expected] = field(default_factory=dict)  # see `controller.retraining`


def build_rule(name: str, pipeline: DecisionPipeline) -> Policy:
    """A rule by name. Raises InvalidRequestError."""
    match name:
        case "keep":
            return KeepPolicy()
        case "myopic":
            return MyopicPolicy(pipeline.observation_spec)
        case "hysteresis":
            return HysteresisPolicy(pipeline.observation_spec)
    raise InvalidRequestError(
        f"rule {name!r} is not known; expected keep, myopic or hysteresis.", "rule"
    )


class PolicyRoster:
    """Of one pipeline. `folder` holds folders of checkpoints and artifacts; `others` are known by
    their own names. A policy of an artifact, other than its default, is ARTIFACT/NAME. With a
    folder of `verdicts` no policy but the rules decides without a passed one."""

    def __init__(
        self,
        pipeline: DecisionPipeline,
        folder: Path,
        others: tuple[Path, ...] = (),
        verdicts: Path | None = None,
    ) -> None:
        self._pipeline, self._folder, self._others = pipeline, folder, others
        self._verdicts = verdicts

    def _checkpoints(self) -> dict[str, Path]:
        inside = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        paths = filter(is_policy, (*inside, *self._others))
        return {path.resolve().name: path for path in paths}

    def infos(self) -> tuple[PolicyInfo, ...]:
        """Rules first, then checkpoints by name."""
        checkpoints = sorted(self._checkpoints().items())
        rules = tuple(PolicyInfo(name, "rule") for name in RULES)
        return rules + tuple(self._listed(name, path) for name, path in checkpoints)

    def _listed(self, name: str, path: Path) -> PolicyInfo:
        """With what speaks against loading it."""
        info = self._info(name, path)
        try:
            if info.is_compatible:
                self._gated(path, "")
        except TidewrightError as error:
            return replace(info, problem="; ".join(filter(None, (info.problem, str(error)))))
        return info

    def _info(self, name: str, path: Path) -> PolicyInfo:
        try:
            manifest = manifest_of(path)
        except CheckpointError as error:
            return PolicyInfo(name, "checkpoint", "", False, str(error))
        return manifest_info(name, manifest, self._pipeline)

    def _gated(self, path: Path, member: str) -> str:
        """The digest of the policy's files; empty where no gate is asked for."""
        return "" if self._verdicts is None else require_passed(self._verdicts, path, member)

    def load(self, name: str, decides: bool = True) -> LoadedPolicy:
        """Raises NotFoundError, CheckpointError for another feature spec or broken files, and
        UngatedPolicyError; not for one that is only asked (`decides` false)."""
        if name in RULES:
            return LoadedPolicy(PolicyInfo(name, "rule"), build_rule(name, self._pipeline))
        checkpoints = self._checkpoints()
        folder, _, member = name.partition("/")
        if folder not in checkpoints:
            known = ", ".join((*RULES, *sorted(checkpoints)))
            raise NotFoundError(f"no policy {name!r} in {self._folder.name}; there are {known}.")
        path = checkpoints[folder]
        digest = self._gated(path, member) if decides else ""
        policy = load_shipped(path, self._pipeline.observation_spec.hash, member)
        loaded = LoadedPolicy(self._info(name, path), policy, expected_from(manifest_of(path)))
        if decides and digest != self._gated(path, member):
            raise UngatedPolicyError(f"policy {name} changed while it was loaded; load it again.")
        return loaded


def manifest_info(name: str, manifest: dict[str, Any], pipeline: DecisionPipeline) -> PolicyInfo:
    digest = str(manifest["files"].get(WEIGHTS, ""))[:16]
    spec_hash, expected = manifest["spec_hash"], pipeline.observation_spec.hash
    if spec_hash != expected:
        problem = f"trained on features {spec_hash}, this controller has {expected}"
        return PolicyInfo(name, "checkpoint", digest, False, problem)
    trained = manifest.get("decision", {})
    differs = [k for k, v in trained.items() if getattr(pipeline.config, k, v) != v]
    problem = f"trained with another {', '.join(differs)}" if differs else ""
    return PolicyInfo(name, "checkpoint", digest, True, problem)
