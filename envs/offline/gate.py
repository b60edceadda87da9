"""Gates: rules that a policy must pass before it is let loose, and why it does or does not.

A rule is a YAML file; keys that are left out ask for nothing:

    margin: 0.0                 # J per request that it may be below the active policy's
    level: 0.95                 # of the interval whose lower end must not be below -margin
    max_switches_per_hour: 6
    min_worst_block: 0.98       # worth, (1 + J) / 2, over the active one's in the worst half hour
    max_slo_drop: 0.01          # share of requests within their service level
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.config import load_config
from engine.errors import InvalidRequestError


class GateRule(BaseModel):
    """See the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: float | None = Field(None, ge=0, description="J that it may be below the active one's")
    level: float = Field(0.95, gt=0.5, lt=1, description="of the interval")
    max_switches_per_hour: float | None = Field(None, ge=0, description="of the policy")
    min_worst_block: float | None = Field(None, ge=0, description="worth over the active one's")
    max_slo_drop: float | None = Field(None, ge=0, le=1, description="share of requests")


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What is known of a policy beside the active one; None is not known, and passes no rule."""

    gain_j: float | None
    gain_interval: tuple[float, float] | None
    switches_per_hour: float | None
    worst_block: float | None
    slo_drop: float | None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule, and what came of it."""

    rule: str
    passed: bool
    text: str


def read_rule(path: Path) -> GateRule:
    """Raises InvalidRequestError in one sentence, also for a rule that asks for nothing."""
    rule = load_config(GateRule, path, {})
    asked = rule.model_dump(exclude={"level"})
    if all(value is None for value in asked.values()):
        raise InvalidRequestError(
            f"gate {path} asks for nothing; give at least one of {', '.join(asked)}."
        )
    return rule


def judge(rule: GateRule, facts: GateFacts) -> tuple[Reason, ...]:
    """One reason for each thing that the rule asks."""
    found = []
    if rule.margin is not None:
        found.append(_gain(rule, rule.margin, facts))
    limits: list[tuple[str, float | None, float | None, str, bool]] = [
        ("max_switches_per_hour", rule.max_switches_per_hour, facts.switches_per_hour,
         "switches per hour", True),
        ("min_worst_block", rule.min_worst_block, facts.worst_block,
         "of the active policy's worth in the worst half hour", False),
        ("max_slo_drop", rule.max_slo_drop, facts.slo_drop,
         "fewer of the requests within their service level", True),
    ]  # fmt: skip
    found += [
        _limit(name, limit, value, what, is_most)
        for name, limit, value, what, is_most in limits
        if limit is not None
    ]
    return tuple(found)


def _gain(rule: GateRule, margin: float, facts: GateFacts) -> Reason:
    if facts.gain_interval is None:
        why = facts.refusal or "there is too little data for an interval"
        return Reason("margin", False, f"J beside the active policy's is not known: {why}")
    low, high = facts.gain_interval
    told = f"J is {facts.gain_j:+.4f} from the active policy's, {rule.level:.0%} interval "
    told += f"{low:+.4f} to {high:+.4f}; its lower end must be at least {-margin:+.4f}"
    return Reason("margin", low >= -margin, told)


def _limit(name: str, limit: float, value: float | None, what: str, is_most: bool) -> Reason:
    word = "at most" if is_most else "at least"
    if value is None:
        return Reason(name, False, f"{what}: not known, must be {word} {limit:g}")
    passed = value <= limit if is_most else value >= limit
    return Reason(name, passed, f"{value:.4g} {what}, must be {word} {limit:g}")


def gate_json(reasons: tuple[Reason, ...]) -> dict[str, Any]:
    return {
        "passed": all(r.passed for r in reasons),
        "reasons": [{"rule": r.rule, "passed": r.passed, "text": r.text} for r in reasons],
    }
