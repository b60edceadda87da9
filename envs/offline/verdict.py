"""A gate's verdict as a file beside the result: what a controller with --require-gate asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from controller.roster import RULES
from engine.errors import InvalidRequestError
from envs.offline.files import check_writable, write_json
from envs.offline.gate import GateRule, Reason, gate_json
from envs.offline.target import policy_folder
from policies.verdicts import SUFFIX, policy_digest, sealed


@dataclass(frozen=True, slots=True)
class PendingVerdict:
    """Of a policy that is about to be judged; `digest` is that of its files before."""

    path: Path
    policy: str
    digest: str
    rule: GateRule

    def write(self, reasons: tuple[Reason, ...], made: Mapping[str, Any]) -> None:
        """Raises InvalidRequestError, also when the policy's files are others than before."""
        if policy_digest(*policy_folder(self.policy)) != self.digest:
            raise InvalidRequestError(
                f"{self.policy} changed while it was judged: there is no verdict; judge it again."
            )
        told = {"policy": self.policy, "digest": self.digest, "rule": self.rule.model_dump()}
        told |= gate_json(reasons) | dict(made) | {"made_at": datetime.now(UTC).isoformat()}
        write_json(self.path, sealed(told))


def pending_verdict(
    result: Path | None, policy: str, rule: GateRule | None
) -> PendingVerdict | None:
    """None without a gate or a file of results, and for rules, which have no files.

    Raises InvalidRequestError and CheckpointError.
    """
    if result is None or rule is None or policy in RULES:
        return None
    path = result.with_suffix(SUFFIX)
    check_writable(path)
    return PendingVerdict(path, policy, policy_digest(*policy_folder(policy)), rule)
