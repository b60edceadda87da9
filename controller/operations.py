"""What is done to a control loop by hand: switches asked for, holds, modes.

All of it takes turns with the loop's ticks, and all of it is in the decision log.
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.log_records import proposal_record
from controller.loop import ControlLoop
from controller.oversight import Hold
from controller.proposal import propose
from controller.records import Mode
from engine.cluster import Decision, SwitchTicket, parse_deployment_key


@dataclass(frozen=True, slots=True)
class Proposal:
    """Answer to a switch asked for by hand."""

    decision: Decision
    vetoes: tuple[str, ...]
    ticket: SwitchTicket | None


class Operations:
    """Over one loop."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop

    def propose(self, target_key: str, dry_run: bool) -> Proposal:
        """Plan and guard a switch asked for by hand; apply it unless dry_run or mode is not active.

        Raises InfeasibleError, InvalidRequestError (no step times), UnavailableError, and what
        `Cluster.apply` raises when the engine moved on.
        """
        loop, configs = self._loop, parse_deployment_key(target_key)
        with loop.turn:
            snapshot = loop.observe(loop.clock())
            prepared = loop.pipeline.prepare(snapshot, loop.oversight.restraints(loop.clock()))
            decision, vetoes = propose(loop.pipeline, prepared, configs)
            loop.log.append("proposal", proposal_record(decision, vetoes, dry_run, loop.mode))
            ticket = None
            if not vetoes and not dry_run and loop.mode is Mode.ACTIVE and decision.plan:
                ticket = loop.start(decision.plan, prepared.at_s)
            return Proposal(decision, vetoes, ticket)

    def set_mode(self, mode: Mode) -> Mode:
        """Returns the mode before. A tick under way ends first: after this, the mode holds."""
        loop = self._loop
        with loop.turn:
            previous, loop.mode = loop.mode, mode
            self._log("set_mode", mode=mode, previous=previous)
        loop.tell()
        return previous

    def hold(self, seconds: float, reason: str) -> Hold:
        """No switch for so long. Raises InvalidRequestError."""
        loop = self._loop
        with loop.turn:
            held = loop.oversight.hold(loop.clock(), seconds, reason)
            self._log("hold", seconds=seconds, reason=reason)
        loop.tell()
        return held

    def resume(self) -> tuple[Hold, ...]:
        """Ends holds and bans; returns the holds that were in force."""
        loop = self._loop
        with loop.turn:
            ended = loop.oversight.resume()
            self._log("resume", ended=[h.rule for h in ended])
        loop.tell()
        return ended

    def _log(self, name: str, **arguments: object) -> None:
        now_s = self._loop.snapshot.now_s if self._loop.snapshot is not None else 0.0
        self._loop.log.append("operation", {"name": name, "at_s": now_s} | arguments)
