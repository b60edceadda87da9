"""Deployment scheduler: when a switch may start. Dwell, one in flight, a budget per hour.

A plain state object: time is an argument, nothing waits. It learns of switches from the cluster's
tickets, so that it counts the same whoever started them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.cluster import Decision, SwitchTicket


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits on switching."""

    min_dwell_s: float = 60.0  # from the end of one switch to the start of the next
    switches_per_hour: float = 30.0  # refill of the budget
    burst: float = 6.0  # most switches the budget can hold


class DeploymentScheduler:
    """Owns the token bucket and the last switch's times."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.reset(0.0)

    def reset(self, now_s: float) -> None:
        """A full budget and no switch seen; tickets that ended before are not counted."""
        self._tokens, self._refilled_s = self.config.burst, now_s
        self._last_end_s, self._reset_s = -math.inf, now_s
        self._in_flight, self._seen_id, self._unmatched = False, "", 0

    def saved(self) -> dict[str, Any]:
        """What `restore` takes, on the cluster's clock."""
        return {
            "tokens": self._tokens,
            "refilled_s": self._refilled_s,
            "last_end_s": None if math.isinf(self._last_end_s) else self._last_end_s,
            "reset_s": self._reset_s,
            "seen_id": self._seen_id,
            "unmatched": self._unmatched,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """As it was; switches since are counted from the cluster's tickets."""
        ended_s = saved["last_end_s"]
        self._last_end_s = -math.inf if ended_s is None else float(ended_s)
        self._tokens, self._refilled_s = float(saved["tokens"]), float(saved["refilled_s"])
        self._reset_s, self._seen_id = float(saved["reset_s"]), str(saved["seen_id"])
        self._unmatched = int(saved["unmatched"])

    def _refill(self, now_s: float) -> None:
        elapsed_s = max(now_s - self._refilled_s, 0.0)
        gained = elapsed_s * self.config.switches_per_hour / 3600.0
        self._tokens = min(self.config.burst, self._tokens + gained)
        self._refilled_s = max(now_s, self._refilled_s)

    def _spend(self, now_s: float) -> None:
        self._refill(now_s)
        self._tokens = max(0.0, self._tokens - 1.0)

    def record_switch(self, now_s: float) -> None:
        """A switch was handed to the cluster; its ticket will not be counted again. It counts as
        in flight until the next snapshot's ticket tells."""
        self._spend(now_s)
        self._unmatched += 1
        self._in_flight = True

    def observe(self, ticket: SwitchTicket | None) -> None:
        """Take in the snapshot's ticket: the switch in flight, else the last one."""
        self._in_flight = ticket is not None and not ticket.phase.is_terminal
        if ticket is None:
            return
        if ticket.ticket_id != self._seen_id:
            self._seen_id = ticket.ticket_id
            if self._unmatched:
                self._unmatched -= 1
            elif ticket.started_s >= self._reset_s:
                self._spend(ticket.started_s)
        if ticket.phase.is_terminal:
            self._last_end_s = ticket.updated_s

    def since_switch_s(self, now_s: float) -> float:
        """Seconds since the last switch ended; inf before any."""
        return now_s - self._last_end_s

    def reasons(self, now_s: float) -> tuple[str, ...]:
        """Every reason why no switch may start now, in the order of `guardrails.RULES`."""
        self._refill(now_s)
        waits = {
            "switch_in_flight": self._in_flight,
            "dwell": self.since_switch_s(now_s) < self.config.min_dwell_s - 1e-9,
            "switch_budget": self._tokens < 1.0 - 1e-9,
        }
        return tuple(name for name, is_so in waits.items() if is_so)

    def reason(self, now_s: float) -> str:
        """The first of them, or an empty string."""
        return next(iter(self.reasons(now_s)), "")

    def admit(self, decision: Decision, now_s: float) -> str:
        """Why this decision's switch may not start now; empty when it may or has none."""
        return self.reason(now_s) if decision.plan is not None else ""
