"""Circuit breaker: who decides after failures. From the policy to the rule, then to the safe plan.

Pure: time is an argument. Half-open after a cool-down: the one it stepped back from decides again
on trial, and is back after some decisions without a failure; a failure on trial opens the breaker
for twice as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from engine.errors import InvalidRequestError


class Actor(StrEnum):
    """Who decides, the least trusted first."""

    POLICY = "policy"
    RULE = "rule"  # the hysteresis rule
    SAFE = "safe"  # go to the static safe deployment and stay


ACTORS = tuple(Actor)


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When it opens and for how long."""

    max_failures: int = 3  # within the window; one more step back at that many
    window_s: float = 600.0
    cool_down_s: float = 300.0  # doubled by each failed trial
    max_cool_down_s: float = 3600.0
    num_trials: int = 3  # decisions without a failure that end a trial

    def __post_init__(self) -> None:
        if self.max_failures < 1 or self.num_trials < 1 or not self.cool_down_s > 0:
            raise InvalidRequestError(
                "a circuit breaker needs max_failures >= 1, num_trials >= 1 and cool_down_s > 0, "
                f"got {self.max_failures}, {self.num_trials} and {self.cool_down_s}."
            )


class CircuitBreaker:
    """Owns the failures seen. A failure is a policy that gave no valid answer in time, or a switch
    that did not end well."""

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self._level, self._trials, self._on_trial = 0, 0, False
        self._failures: deque[tuple[float, str]] = deque()
        self._opened_s, self._cool_down_s = 0.0, config.cool_down_s
        self.reason = ""  # what it opened for; empty when closed

    @property
    def actor(self) -> Actor:
        """Who decides; one on trial counts."""
        return ACTORS[self._level - self._on_trial]

    @property
    def state(self) -> str:
        """closed, open or half_open."""
        return "half_open" if self._on_trial else "open" if self._level else "closed"

    def advance(self, now_s: float) -> Actor:
        """Who decides at `now_s`: begins a trial when the cool-down is over."""
        over = now_s - self._opened_s >= self._cool_down_s
        if self._level and not self._on_trial and over:
            self._on_trial, self._trials = True, 0
        return self.actor

    def failure(self, now_s: float, what: str) -> None:
        if self._on_trial:
            longer = min(2.0 * self._cool_down_s, self.config.max_cool_down_s)
            self._open(now_s, self._level, f"on trial: {what}", longer)
            return
        self._failures.append((now_s, what))
        while self._failures[0][0] < now_s - self.config.window_s:
            self._failures.popleft()
        if len(self._failures) >= self.config.max_failures and self._level + 1 < len(ACTORS):
            reason = f"{len(self._failures)} failures, the last: {what}"
            self._open(now_s, self._level + 1, reason, self.config.cool_down_s)

    def success(self, now_s: float) -> None:
        """The actor made a decision without a failure."""
        if not self._on_trial:
            return
        self._trials += 1
        if self._trials >= self.config.num_trials:
            level = self._level - 1
            self._open(now_s, level, self.reason if level else "", self.config.cool_down_s)

    def close(self) -> None:
        """Trust the policy again: it was exchanged, or an operator says so."""
        self._open(0.0, 0, "", self.config.cool_down_s)

    def saved(self) -> dict[str, Any]:
        """What `restore` takes; times as they are."""
        return {
            "level": self._level,
            "on_trial": self._on_trial,
            "trials": self._trials,
            "failures": list(self._failures),
            "opened_s": self._opened_s,
            "cool_down_s": self._cool_down_s,
            "reason": self.reason,
        }

    def restore(self, saved: Mapping[str, Any], shift_s: float) -> None:
        """As it was; `shift_s` is added to times."""
        self._level, self._on_trial = int(saved["level"]), bool(saved["on_trial"])
        self._trials, self.reason = int(saved["trials"]), str(saved["reason"])
        self._opened_s = saved["opened_s"] + shift_s
        self._cool_down_s = float(saved["cool_down_s"])
        self._failures = deque((at_s + shift_s, str(what)) for at_s, what in saved["failures"])

    def _open(self, now_s: float, level: int, reason: str, cool_down_s: float) -> None:
        self._level, self._on_trial, self.reason = level, False, reason
        self._opened_s, self._cool_down_s = now_s, cool_down_s
        self._failures.clear()
