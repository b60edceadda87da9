"""What the control loop remembers against switches: holds, drift, undone switches, failures. Pure.

Two clocks: `at_s` is the controller's own, which never goes back, and is what holds, bans and
cool-downs run on; the cluster's `now_s` comes with its snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from controller.breaker import Actor, BreakerConfig, CircuitBreaker
from controller.decision import Restraints
from controller.drift import DriftEvent, DriftWatch
from controller.guardrails import UNDO_WAIVES
from controller.switch_watch import SwitchWatch, Undo, WatchConfig
from engine.cluster import NO_SLO, ClusterEvent, ClusterSnapshot, SloSpec, SwitchPhase, SwitchTicket
from engine.errors import InvalidRequestError

MAX_HOLD_S = 7 * 86400.0
MAX_SAVED = 20  # tickets that were cancelled


@dataclass(frozen=True, slots=True)
class OversightConfig:
    """Seconds unless said otherwise."""

    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    drift_hold_s: float = 600.0  # after a switch by somebody else; 0: only reported
    ban_s: float = 1800.0  # for a deployment that was undone
    undo_patience_s: float = 300.0  # for an undo that other rules are against
    switch_timeout_s: float = 120.0  # beside five times the predicted time; then it is cancelled


@dataclass(frozen=True, slots=True)
class Hold:
    """No switch until then, on the controller's clock."""

    until_s: float
    reason: str
    rule: str = "hold"  # of guardrails.RULES


class Oversight:
    """One per loop, which alone calls it."""

    def __init__(self, config: OversightConfig, slo: SloSpec = NO_SLO) -> None:
        self.config = config
        self.breaker = CircuitBreaker(config.breaker)
        self.watch = SwitchWatch(config.watch, slo)
        self.drift = DriftWatch()
        self._holds: dict[str, Hold] = {}  # by rule
        self._banned: dict[str, float] = {}  # deployment key -> until
        self._cancelled: dict[str, None] = {}
        self.undo: Undo | None = None  # not yet carried out
        self._undo_until_s = 0.0

    def restarted(self) -> None:
        """The engine was: what was known of its deployments and requests is void."""
        self.watch.reset()
        self.drift.reset()
        self.undo = None

    def saved(self) -> dict[str, Any]:
        """What `restore` takes; times of the controller's clock as they are."""
        return {
            "breaker": self.breaker.saved(),
            "watch": self.watch.saved(),
            "drift": self.drift.saved(),
            "holds": [asdict(h) for h in self._holds.values()],
            "banned": self._banned,
            "cancelled": list(self._cancelled)[-MAX_SAVED:],
            "undo": None if self.undo is None else asdict(self.undo),
            "undo_until_s": self._undo_until_s,
        }

    def restore(self, saved: Mapping[str, Any], shift_s: float) -> None:
        """As it was; `shift_s` leads from the controller's clock then to that of now."""
        self.breaker.restore(saved["breaker"], shift_s)
        self.watch.restore(saved["watch"])
        self.drift.restore(saved["drift"])
        holds = (Hold(**told) for told in saved["holds"])
        self._holds = {h.rule: replace(h, until_s=h.until_s + shift_s) for h in holds}
        self._banned = {key: until_s + shift_s for key, until_s in saved["banned"].items()}
        self._cancelled = dict.fromkeys(saved["cancelled"])
        self.undo = None if saved["undo"] is None else Undo(**saved["undo"])
        self._undo_until_s = saved["undo_until_s"] + shift_s

    # ---------------------------------------------------------------- what is known

    def observe(
        self, at_s: float, snapshot: ClusterSnapshot, events: Sequence[ClusterEvent]
    ) -> DriftEvent | None:
        """One tick's news; says when somebody else switched the engine."""
        drifted = self.drift.observe(snapshot)
        if drifted is not None and drifted.is_wanted:
            self.undo = None
            self.watch.leave_out(snapshot.switch.decision_id if snapshot.switch else "")
            if self.config.drift_hold_s > 0:
                why = f"{drifted.from_key} -> {drifted.to_key} {drifted.who}"
                until_s = at_s + self.config.drift_hold_s
                self._holds = self._holds | {"drift": Hold(until_s, why, "drift")}
        undo = self.watch.observe(snapshot.now_s, events, snapshot.switch)
        if undo is not None:
            self.take_back(at_s, undo)
        if self.undo is not None and (
            snapshot.deployment.key != self.undo.from_key or at_s > self._undo_until_s
        ):
            self.undo = None  # done, overtaken, or too late
        return drifted

    def take_back(self, at_s: float, undo: Undo) -> None:
        """Undo that switch as soon as other rules allow, and do not make it again for a while."""
        self.undo, self._undo_until_s = undo, at_s + self.config.undo_patience_s
        self._banned[undo.from_key] = at_s + self.config.ban_s

    def ended(self, at_s: float, ticket: SwitchTicket) -> None:
        """A switch ended; one that an operator cancelled is no failure."""
        if ticket.phase is SwitchPhase.ROLLED_BACK or ticket.ticket_id in self._cancelled:
            self.breaker.failure(at_s, f"switch {ticket.ticket_id} {ticket.phase}: {ticket.reason}")

    def overdue(self, snapshot: ClusterSnapshot) -> SwitchTicket | None:
        """The switch in flight when it takes far too long; each is named once."""
        ticket = snapshot.switch
        if ticket is None or ticket.phase.is_terminal or ticket.ticket_id in self._cancelled:
            return None
        limit_s = self.config.switch_timeout_s + 5.0 * ticket.predicted_s
        if snapshot.now_s - ticket.started_s <= limit_s:
            return None
        self._cancelled[ticket.ticket_id] = None
        return ticket

    # ---------------------------------------------------------------- what follows

    def hold(self, at_s: float, seconds: float, reason: str) -> Hold:
        """Raises InvalidRequestError for a length that is no number of seconds up to a week."""
        if not 0 < seconds <= MAX_HOLD_S:
            raise InvalidRequestError(
                f"a hold of {seconds:g} s was asked for; expected more than 0 and at most "
                f"{MAX_HOLD_S:.0f} (a week): hold again when it ends, or set the mode to advisory."
            )
        held = Hold(at_s + seconds, reason)
        self._holds = self._holds | {"hold": held}
        return held

    def resume(self) -> tuple[Hold, ...]:
        """Ends every hold and ban; returns the holds."""
        ended, self._holds, self._banned = tuple(self._holds.values()), {}, {}
        return ended

    def holds(self, at_s: float) -> tuple[Hold, ...]:
        """Those in force; may be asked from any thread."""
        return tuple(h for h in self._holds.values() if at_s < h.until_s)

    def restraints(self, at_s: float) -> Restraints:
        """For the pipeline at this tick."""
        self._banned = {key: until for key, until in self._banned.items() if at_s < until}
        waived = UNDO_WAIVES if self.undo is not None else frozenset[str]()
        not_now = tuple(h.rule for h in self.holds(at_s))
        return Restraints(not_now, dict.fromkeys(self._banned, "undone"), waived)

    def actor(self, at_s: float) -> Actor:
        """Who decides at this tick."""
        return self.breaker.advance(at_s)
