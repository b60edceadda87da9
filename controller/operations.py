"""What is done to a control loop by hand: switches asked for, holds, modes, policies.

All of it takes turns with the loop's ticks, and all of it is in the decision log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from controller.canary import CanaryConfig
from controller.idempotency import Idempotency
from controller.log_records import proposal_record
from controller.loop import ControlLoop
from controller.oversight import Hold
from controller.predictor import Forecast
from controller.proposal import propose
from controller.records import Mode
from controller.retraining import RetrainingTrigger
from controller.roster import LoadedPolicy, PolicyInfo, PolicyRoster
from engine.cluster import Candidate, Decision, SwitchTicket, parse_deployment_key
from engine.errors import (
    InvalidRequestError,
    NotFoundError,
    StaleEpochError,
    UnavailableError,
)

MAX_KEPT = 20  # policies to go back to


@dataclass(frozen=True, slots=True)
class Proposal:
    """Answer to a switch asked for by hand."""

    decision: Decision
    vetoes: tuple[str, ...]
    ticket: SwitchTicket | None


class Operations:
    """Over one loop."""

    def __init__(self, loop: ControlLoop, roster: PolicyRoster | None = None) -> None:
        self._loop, self._roster = loop, roster
        self.before: list[LoadedPolicy] = []  # policies, the latest last
        self.idempotency = Idempotency()

    # ---------------------------------------------------------------- switches

    def propose(
        self, target_key: str, dry_run: bool, expected_epoch: int | None = None
    ) -> Proposal:
        """Plan and guard a switch asked for by hand; apply it unless dry_run or mode is not active.

        Raises StaleEpochError when the engine is not at that epoch, InfeasibleError,
        InvalidRequestError (no step times), UnavailableError, and what `Cluster.apply` raises when
        the engine moved on.
        """
        loop, configs = self._loop, parse_deployment_key(target_key)
        with loop.turn:
            snapshot, at_s = loop.observe(loop.clock()), loop.clock()
            if expected_epoch not in (None, snapshot.epoch):
                raise StaleEpochError(
                    f"the engine is at epoch {snapshot.epoch} ({snapshot.deployment.key}), the "
                    f"switch was asked for at epoch {expected_epoch}; look again before you do."
                )
            prepared = loop.pipeline.prepare(snapshot, loop.oversight.restraints(at_s))
            decision, vetoes = propose(loop.pipeline, prepared, configs)
            if loop.mode is not Mode.ACTIVE and not dry_run:
                vetoes = (*vetoes, f"mode_{loop.mode}")
            loop.log.append("proposal", proposal_record(decision, vetoes, dry_run, loop.mode))
            ticket = None
            if not vetoes and not dry_run and decision.plan:
                loop.oversight.watch.leave_out(decision.decision_id)
                ticket = loop.start(decision.plan, prepared.at_s)
                loop.keep()
            return Proposal(decision, vetoes, ticket)

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """Roll back the switch of that ticket, or the one in flight. Raises NotFoundError."""
        loop = self._loop
        with loop.turn:
            if not ticket_id:
                switch = loop.cluster.snapshot().switch
                if switch is None or switch.phase.is_terminal:
                    raise NotFoundError("no switch is in flight.")
                ticket_id = switch.ticket_id
            ticket = loop.cluster.cancel(ticket_id)
            self._log("cancel", ticket_id=ticket_id, phase=ticket.phase)
        return ticket

    # ---------------------------------------------------------------- what the loop may do

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
            ended = loop.oversight.holds(loop.clock())
            loop.oversight.resume()
            self._log("resume", ended=[h.rule for h in ended])
        loop.tell()
        return ended

    # ---------------------------------------------------------------- policies

    @property
    def roster(self) -> PolicyRoster:
        if self._roster is None:
            raise NotFoundError("this controller was started without a folder of policies.")
        return self._roster

    def load_policy(self, name: str) -> tuple[PolicyInfo, PolicyInfo]:
        """Decide by that policy from the next tick on; returns it and the one before.

        Raises NotFoundError, and CheckpointError when it was trained on other features.
        """
        loaded = self.roster.load(name)
        loop = self._loop
        with loop.turn:
            previous = LoadedPolicy(
                loop.active, loop.policy_server.policy, loop.retraining.expected
            )
            self.before = [*self.before, previous][-MAX_KEPT:]
            self._take("load_policy", loaded)
        loop.tell()
        return loaded.info, previous.info

    def rollback(self) -> tuple[PolicyInfo, PolicyInfo]:
        """Back to the policy before the last `load_policy`; returns it and the one left.

        Raises NotFoundError when there was none.
        """
        loop = self._loop
        with loop.turn:
            if not self.before:
                raise NotFoundError(
                    f"no policy was loaded since the start; {loop.active.name} is the first."
                )
            left, loaded = loop.active, self.before.pop()
            self._take("rollback", loaded)
        loop.tell()
        return loaded.info, left

    def set_canary(self, name: str, fraction: float) -> None:
        """Let that policy decide in so large a fraction of randomised blocks; no name ends it.

        Raises NotFoundError, CheckpointError (other features), InvalidRequestError.
        """
        loop, config = self._loop, CanaryConfig(fraction) if name else None
        loaded = self.roster.load(name) if name else None
        with loop.turn:
            if loaded is None or config is None:
                loop.trials.end_canary()
            else:
                now_s = loop.snapshot.now_s if loop.snapshot is not None else 0.0
                targets = loop.oversight.watch.targets
                loop.trials.begin_canary(loaded, config, targets, now_s)
            self._log("set_canary", policy=name, fraction=fraction)
        loop.tell()

    def _take(self, operation: str, loaded: LoadedPolicy) -> None:
        """A new policy starts with the trust that the one before may have lost."""
        left = self._loop.active
        self.decide_by(loaded)
        self._loop.oversight.breaker.close()
        self._log(operation, policy=loaded.info.name, digest=loaded.info.digest, left=left.name)

    def decide_by(self, loaded: LoadedPolicy) -> None:
        """From the next tick on; with the loop's turn held."""
        loop = self._loop
        loop.active = loaded.info
        loop.retraining = RetrainingTrigger(loaded.expected)
        loop.policy_server.policy = loaded.policy

    # ---------------------------------------------------------------- what if

    def forecasts(self) -> tuple[float, tuple[Forecast, ...]]:
        """When, and what the predictor expects at each of its horizons."""
        loop = self._loop
        with loop.turn:
            predictor = loop.pipeline.predictor
            at_s = loop.snapshot.now_s if loop.snapshot is not None else 0.0
            return at_s, tuple(predictor.forecast(ahead) for ahead in predictor.horizons)

    def plan(self, demand: Mapping[str, float]) -> tuple[Candidate, ...]:
        """Candidates for requests per second by type, the present deployment first; without a
        demand for the present forecast.

        Raises InvalidRequestError for unknown types and rates, UnavailableError before the first
        snapshot.
        """
        loop = self._loop
        prepared = loop.prepared
        if prepared is None:
            raise UnavailableError("the engine has not been seen yet; try again after a tick.")
        forecast, pipeline = prepared.forecast, loop.pipeline
        if demand:
            rates = demanded_rates(demand, [t.name for t in pipeline.typing.types])
            forecast = Forecast(rates, rates, rates, tuple(0.0 for _ in rates))
        state = prepared.monitor_state
        lengths = np.array([state.prompt_tokens, state.output_tokens]).T
        with loop.turn:
            mixing = pipeline.monitor.posterior.mixing
            return pipeline.planner.propose(prepared.snapshot, forecast, None, lengths, (), mixing)

    def _log(self, name: str, **arguments: object) -> None:
        """What was done, and what the next life is to know of it."""
        now_s = self._loop.snapshot.now_s if self._loop.snapshot is not None else 0.0
        self._loop.log.append("operation", {"name": name, "at_s": now_s} | arguments)
        self._loop.keep()


def demanded_rates(demand: Mapping[str, float], types: list[str]) -> tuple[float, ...]:
    """Per type; those not named are none. Raises InvalidRequestError."""
    unknown = sorted(demand.keys() - set(types))
    if unknown:
        raise InvalidRequestError(
            f"no type {unknown[0]!r}; this controller has {', '.join(types)}.", "demand"
        )
    wrong = [rate for rate in demand.values() if not 0 <= rate < float("inf")]
    if wrong or not any(demand.values()):
        raise InvalidRequestError(
            f"the demand is {dict(demand)}; expected finite requests per second of 0 or more, and "
            "some above 0.",
            "demand",
        )
    return tuple(float(demand.get(name, 0.0)) for name in types)
