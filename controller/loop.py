"""ControlLoop: snapshot -> decide -> guard -> apply -> log, once per grid interval; never raises.

It works through the `Cluster` protocol alone and takes time from the cluster's snapshots, so the
same loop steers the engine over gRPC and the surrogate in a test.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from controller.decision import DecisionPipeline, PreparedDecision
from controller.decision_log import (
    DecisionLog,
    decision_reason,
    decision_record,
    interval_record,
    outcome_record,
    proposal_record,
)
from controller.policy_server import ActResult, PolicyServer
from controller.proposal import propose
from controller.records import CandidateView, Counters, Mode, TickRecord, TickStatus, TypeRate
from engine.cluster import (
    Cluster,
    ClusterSnapshot,
    Decision,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
    parse_deployment_key,
)
from engine.errors import TidewrightError, UnavailableError

logger = logging.getLogger(__name__)
NUM_RECORDS_KEPT = 10_000
NUM_SWITCHES_KEPT = 100


@dataclass(frozen=True, slots=True)
class Proposal:
    """Answer to a switch asked for by hand."""

    decision: Decision
    vetoes: tuple[str, ...]
    ticket: SwitchTicket | None


class ControlLoop:
    """One loop per cluster. Ticks and proposals take turns (`_turn`, held while the engine is
    asked); readers need only `lock`, which is held for instants."""

    def __init__(
        self,
        cluster: Cluster,
        pipeline: DecisionPipeline,
        policy_server: PolicyServer,
        log: DecisionLog,
        mode: Mode,
        rng: np.random.Generator,
    ) -> None:
        self.cluster, self.pipeline, self.policy_server = cluster, pipeline, policy_server
        self.log, self.mode, self._rng = log, mode, rng
        self.counters = Counters()
        self._turn = threading.Lock()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.records: deque[TickRecord] = deque(maxlen=NUM_RECORDS_KEPT)
        self.switches: deque[SwitchTicket] = deque(maxlen=NUM_SWITCHES_KEPT)
        self.snapshot: ClusterSnapshot | None = None
        self.available = False
        self._cursor, self._next_seq = 0, 1

    # ---------------------------------------------------------------- the loop

    def run(self, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        """Tick on the grid until `stop`; a tick that takes too long skips grid points."""
        grid_s, due_s = self.pipeline.config.grid_s, clock()
        while not stop.wait(max(0.0, due_s - clock())):
            self.tick()
            due_s += grid_s
            late = int(max(0.0, clock() - due_s) // grid_s)
            self.counters.num_late += late
            due_s += late * grid_s

    def tick(self) -> TickRecord:
        """One decision. Whatever goes wrong ends up in the record."""
        started_s = time.perf_counter()
        with self._turn:
            self.counters.num_ticks += 1
            try:
                record = self._decide()
                self.available = True
            except UnavailableError as error:
                self.available = False
                self.counters.num_unavailable += 1
                record = self._blank(TickStatus.UNAVAILABLE, str(error))
            except Exception as error:
                logger.exception("tick %d failed", self._next_seq)
                self.counters.num_failed += 1
                record = self._blank(TickStatus.FAILED, f"{type(error).__name__}: {error}")
            record = replace(record, tick_s=time.perf_counter() - started_s)
            self._publish(record)
        return record

    def _decide(self) -> TickRecord:
        snapshot = self._observe()
        prepared = self.pipeline.prepare(snapshot)
        if self.mode is Mode.OFF:
            return self._record(prepared, TickStatus.OBSERVED, None, None, None)
        act = self.policy_server.act(prepared.observation, self._rng)
        self.counters.num_fallbacks += act.reason != "policy"
        decision = self.pipeline.resolve(prepared, act.action, act.probabilities, act.policy)
        self.log.append("decision", decision_record(prepared, act, decision, self.mode))
        ticket = self._apply(prepared, decision) if self.mode is Mode.ACTIVE else None
        self.counters.num_decisions += 1
        self.counters.num_vetoed += bool(decision.vetoes)
        return self._record(prepared, TickStatus.DECIDED, act, decision, ticket)

    def _observe(self) -> ClusterSnapshot:
        """New events and a snapshot; notices an engine that was started again."""
        snapshot, last = self.cluster.snapshot(), self.snapshot
        batch = self.cluster.events(self._cursor)
        if last is not None and (_is_older(snapshot, last) or batch.next_cursor < self._cursor):
            logger.warning("the engine was restarted: its clock or its counters went back")
            self.counters.num_restarts += 1
            self.pipeline.reset(0.0)
            batch, last = self.cluster.events(0), None
        from_s = last.now_s if last is not None else 0.0
        self._cursor, self.snapshot = batch.next_cursor, snapshot
        self.counters.num_events_lost += batch.num_lost
        self.pipeline.observe(batch.events)
        self.log.append(
            "interval", interval_record(from_s, snapshot.now_s, batch.events, batch.num_lost)
        )
        for event in batch.events:
            if event.ticket is not None and event.ticket.phase.is_terminal:
                self._end_switch(event.ticket)
        return snapshot

    def _end_switch(self, ticket: SwitchTicket) -> None:
        done = ticket.phase is SwitchPhase.DONE
        self.counters.num_switches_done += done
        self.counters.num_switches_failed += not done
        with self.lock:
            self.switches.append(ticket)
        self.log.append("outcome", outcome_record(ticket))

    def _apply(self, prepared: PreparedDecision, decision: Decision) -> SwitchTicket | None:
        """Start the decided switch, or refresh the routing of the present deployment."""
        try:
            if decision.plan is not None:
                return self._start(decision.plan, prepared.at_s)
            if not prepared.snapshot.switch_in_flight:
                self.cluster.set_routing(self.pipeline.routing_for(prepared))
        except UnavailableError:
            raise
        except TidewrightError as error:  # the engine moved on since the snapshot
            logger.warning("the engine refused: %s", error)
            self.counters.num_switches_failed += decision.plan is not None
        return None

    def _start(self, plan: SwitchPlan, now_s: float) -> SwitchTicket:
        ticket = self.cluster.apply(plan)
        self.pipeline.scheduler.record_switch(now_s)
        self.counters.num_switches_started += 1
        return ticket

    # ---------------------------------------------------------------- by hand

    def propose(self, target_key: str, dry_run: bool) -> Proposal:
        """Plan and guard a switch asked for by hand; apply it unless dry_run or mode is not active.

        Raises InfeasibleError, InvalidRequestError (no step times), UnavailableError, and what
        `Cluster.apply` raises when the engine moved on.
        """
        configs = parse_deployment_key(target_key)
        with self._turn:
            prepared = self.pipeline.prepare(self._observe())
            decision, vetoes = propose(self.pipeline, prepared, configs)
            self.log.append("proposal", proposal_record(decision, vetoes, dry_run, self.mode))
            ticket = None
            if not vetoes and not dry_run and self.mode is Mode.ACTIVE and decision.plan:
                ticket = self._start(decision.plan, prepared.at_s)
            return Proposal(decision, vetoes, ticket)

    def set_mode(self, mode: Mode) -> Mode:
        """Returns the mode before. A tick under way ends first: after this, the mode holds."""
        with self._turn:
            previous, self.mode = self.mode, mode
            return previous

    # ---------------------------------------------------------------- records

    def _blank(self, status: TickStatus, reason: str) -> TickRecord:
        at_s = self.snapshot.now_s if self.snapshot is not None else 0.0
        return TickRecord(self._next_seq, at_s, status, self.mode, reason=reason)

    def _record(
        self,
        prepared: PreparedDecision,
        status: TickStatus,
        act: ActResult | None,
        decision: Decision | None,
        ticket: SwitchTicket | None,
    ) -> TickRecord:
        snapshot = prepared.snapshot
        record = TickRecord(
            seq=self._next_seq,
            at_s=prepared.at_s,
            status=status,
            mode=self.mode,
            candidates=_views(prepared, act),
            rates=self._rates(prepared),
            epoch=snapshot.epoch,
            deployment_key=snapshot.deployment.key,
            num_waiting=prepared.monitor_state.num_waiting,
            num_running=sum(r.num_running for r in snapshot.replicas),
            ticket=ticket,
        )
        if decision is None or act is None:
            return record
        return replace(
            record,
            decision_id=decision.decision_id,
            action=decision.action,
            chosen_key=decision.chosen_key,
            executed_key=decision.executed_key,
            propensity=decision.propensity,
            policy=decision.policy,
            reason=decision_reason(act, decision),
            vetoes=decision.vetoes,
        )

    def _rates(self, prepared: PreparedDecision) -> tuple[TypeRate, ...]:
        forecast, actual = prepared.forecast, prepared.monitor_state.rates[0]
        return tuple(
            TypeRate(t.name, q50, q90, rate)
            for t, q50, q90, rate in zip(
                self.pipeline.typing.types, forecast.q50, forecast.q90, actual, strict=True
            )
        )

    def _publish(self, record: TickRecord) -> None:
        self._next_seq += 1
        with self.changed:
            self.records.append(record)
            self.changed.notify_all()


def _is_older(snapshot: ClusterSnapshot, last: ClusterSnapshot) -> bool:
    """Whether clock or counters went back: what only a restart does."""
    return (
        snapshot.now_s < last.now_s
        or snapshot.epoch < last.epoch
        or snapshot.num_arrived < last.num_arrived
    )


def _views(prepared: PreparedDecision, act: ActResult | None) -> tuple[CandidateView, ...]:
    return tuple(
        CandidateView(
            key=c.key,
            origin=c.origin,
            legal=bool(prepared.observation.mask[i]),
            mask_reason=prepared.mask_reasons[i],
            probability=float(act.probabilities[i]) if act is not None else 0.0,
            headroom=c.headroom,
            predicted_switch_s=c.switch_s,
            weight_bytes=c.weight_bytes,
        )
        for i, c in enumerate(prepared.candidates)
    )
