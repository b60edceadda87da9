"""ControlLoop: snapshot -> decide -> guard -> apply -> log, once per grid interval; never raises.

It works through the `Cluster` protocol alone and takes time from the cluster's snapshots, so the
same loop steers the engine over gRPC and the surrogate in a test. Holds and cool-downs run on the
controller's own clock. What is done by hand is in `controller.operations`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np

from controller.breaker import Actor
from controller.deciding import decide
from controller.decision import DecisionPipeline, PreparedDecision
from controller.decision_log import DecisionLog
from controller.log_records import (
    decision_record,
    interval_record,
    outcome_record,
    switch_record,
    tick_record,
)
from controller.oversight import Oversight, OversightConfig
from controller.policy_server import ActResult, PolicyServer
from controller.records import Counters, Mode, TickRecord, TickStatus
from controller.retraining import RetrainingTrigger, figures_of
from controller.roster import PolicyInfo
from controller.tick_records import Explained, decided_record, observed_record
from controller.trials import Trials
from engine.cluster import (
    Cluster,
    ClusterSnapshot,
    Decision,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import (
    StaleEpochError,
    SwitchInProgressError,
    TidewrightError,
    UnavailableError,
)
from policies.baselines import KeepPolicy

logger = logging.getLogger(__name__)
Step = tuple[str, float, float]  # name, start and end on time.perf_counter
NUM_RECORDS_KEPT = 10_000
NUM_SWITCHES_KEPT = 100
NUM_EXPLAINED_KEPT = 500


class Seen(NamedTuple):
    """Of a snapshot, what only a restart of the engine turns back."""

    now_s: float
    epoch: int
    num_arrived: int

    def is_after(self, snapshot: ClusterSnapshot) -> bool:
        return (
            snapshot.now_s < self.now_s
            or snapshot.epoch < self.epoch
            or snapshot.num_arrived < self.num_arrived
        )


class ControlLoop:
    """One loop per cluster. Ticks and operations take turns (`turn`, held while the engine is
    asked); readers need only `lock`, which is held for instants."""

    def __init__(
        self,
        cluster: Cluster,
        pipeline: DecisionPipeline,
        policy_server: PolicyServer,
        log: DecisionLog,
        mode: Mode,
        seeds: tuple[int, ...] = (0,),
        oversight: Oversight | None = None,
        clock: Callable[[], float] = time.monotonic,
        trials: Trials | None = None,
    ) -> None:
        self.cluster, self.pipeline, self.policy_server = cluster, pipeline, policy_server
        self.log, self.mode, self._seeds = log, mode, seeds
        self.oversight = oversight or Oversight(OversightConfig())
        self.clock = clock
        self.trials = trials or Trials(KeepPolicy(), 1.0, policy_server.deterministic)
        self.active = PolicyInfo(policy_server.policy.name, "rule")
        self.retraining = RetrainingTrigger({})
        self.counters = Counters()
        self.turn = threading.Lock()
        self.lock = threading.Lock()
        self.revision = 0  # rises with every tick and whatever else watchers should know of
        self.listeners: list[Callable[[], None]] = []  # called then, from any thread
        self.records: deque[TickRecord] = deque(maxlen=NUM_RECORDS_KEPT)
        self.explained: deque[Explained] = deque(maxlen=NUM_EXPLAINED_KEPT)
        self.switches: deque[SwitchTicket] = deque(maxlen=NUM_SWITCHES_KEPT)
        self.snapshot: ClusterSnapshot | None = None
        self.prepared: PreparedDecision | None = None
        self.available = False
        self.steps: tuple[Step, ...] = ()  # of the last tick, in order
        self._marks: list[tuple[str, float]] = []
        pipeline.mark = self._mark
        self._notes: list[str] = []
        self.lineage = log.life  # of this life and those that it goes on from
        self.may_act: Callable[[], bool] = lambda: True  # False: another controller may, by now
        self.keep: Callable[[], None] = lambda: None  # what the next life goes on from, in the log
        self.seen: Seen | None = None
        self.cursor, self.next_seq = 0, 1

    # ---------------------------------------------------------------- the loop

    def run(self, stop: threading.Event) -> None:
        """Tick on the grid until `stop`; a tick that takes too long skips grid points."""
        grid_s, due_s = self.pipeline.config.grid_s, self.clock()
        while not stop.wait(max(0.0, due_s - self.clock())):
            self.tick()
            due_s += grid_s
            late = int(max(0.0, self.clock() - due_s) // grid_s)
            self.counters.num_late += late
            due_s += late * grid_s

    def tick(self) -> TickRecord:
        """One decision. Whatever goes wrong ends up in the record."""
        started_s = time.perf_counter()
        with self.turn:
            if not self.may_act():
                return self._blank(TickStatus.UNAVAILABLE, "another controller may act by now")
            self.counters.num_ticks += 1
            self._marks = [("", started_s)]
            explained: Explained | None = None
            try:
                explained = self._decide(started_s)
                record = explained.record
                self.available = True
            except UnavailableError as error:
                self.available = False
                self.counters.num_unavailable += 1
                record = self._blank(TickStatus.UNAVAILABLE, str(error))
            except Exception as error:
                logger.exception("tick %d failed", self.next_seq)
                self.counters.num_failed += 1
                record = self._blank(TickStatus.FAILED, f"{type(error).__name__}: {error}")
            tick_s = time.perf_counter() - started_s
            record = replace(record, tick_s=tick_s, notes=tuple(self._notes))
            if record.status is not TickStatus.DECIDED:
                self.log.append("tick", tick_record(record))
            self._notes = []
            self.keep()
            self._publish(record, explained)
        return record

    def _decide(self, started_s: float) -> Explained:
        at_s = self.clock()
        snapshot = self.observe(at_s)
        prepared = self.pipeline.prepare(snapshot, self.oversight.restraints(at_s))
        self.prepared = prepared
        self.retraining.observe(figures_of(prepared))
        types, seq = self.pipeline.typing.types, self.next_seq
        if self.mode is Mode.OFF:
            record = observed_record(seq, self.mode, prepared, types)
            return Explained(record, prepared.observation)
        _, act, decision = decide(self.pipeline, prepared, lambda p: self._act(p, at_s))
        self.counters.num_fallbacks += bool(act.failure)
        arm, took_s = self.trials.arm, time.perf_counter() - started_s
        told = decision_record(prepared, act, decision, self.mode) | {
            "seq": seq,
            "seeds": self.seeds,
            "decision_s": took_s,
            "policy_digest": self.active.digest,
            "arm": arm,
        }
        self.log.append("decision", told)
        self._mark("log")
        ticket = self._apply(prepared, decision, at_s) if self.mode is Mode.ACTIVE else None
        self.counters.num_decisions += 1
        self.counters.num_vetoed += bool(decision.vetoes)
        self._mark("apply")
        self._ask_shadows(prepared, decision)
        self._mark("shadows")
        record = observed_record(seq, self.mode, prepared, types, act)
        record = decided_record(record, act, decision, ticket, arm)
        return Explained(record, prepared.observation)

    def _ask_shadows(self, prepared: PreparedDecision, decision: Decision) -> None:
        """After all is done, since they may be slow."""
        told = self.trials.ask_shadows(prepared.observation)
        if told:
            self.log.append("shadow", {"decision_id": decision.decision_id, "policies": told})

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the generator that the tick at hand draws with."""
        return (*self._seeds, self.next_seq)

    def _act(self, prepared: PreparedDecision, at_s: float) -> ActResult:
        """An undo that is due, else whoever the circuit breaker lets decide."""
        observation, oversight = prepared.observation, self.oversight
        undo = oversight.undo
        if undo is not None and undo.to_key in observation.keys:
            row = observation.keys.index(undo.to_key)
            if observation.mask[row]:
                self.counters.num_undone += self.mode is Mode.ACTIVE
                self._notes.append(undo.reason)
                sure = np.eye(1, len(observation.mask), row)[0]
                return ActResult(sure, row, "undo", undo.reason)
        actor, rng = oversight.actor(at_s), np.random.default_rng(self.seeds)
        on_trial = self.trials.act(observation, rng) if actor is Actor.POLICY else None
        if on_trial is not None:
            self._end_canary(self.trials.failed(on_trial.failure) if on_trial.failure else "")
            return on_trial
        act = self.policy_server.act(observation, rng, actor)
        if act.failure:
            oversight.breaker.failure(at_s, act.failure)
        else:
            oversight.breaker.success(at_s)
        return act

    def observe(self, at_s: float) -> ClusterSnapshot:
        """New events and a snapshot; notices an engine that was started again, or switched by
        somebody else. With `turn` held."""
        snapshot, last = self.cluster.snapshot(), self.seen
        batch = self.cluster.events(self.cursor)
        self._mark("snapshot")
        if last is not None and (last.is_after(snapshot) or batch.next_cursor < self.cursor):
            logger.warning("the engine was restarted: its clock or its counters went back")
            self.counters.num_restarts += 1
            self.pipeline.reset(0.0)
            self.oversight.restarted()
            self.trials.restarted(snapshot.now_s)
            batch, last = self.cluster.events(0), None
        from_s = last.now_s if last is not None else 0.0
        self.cursor, self.snapshot = batch.next_cursor, snapshot
        self.seen = Seen(snapshot.now_s, snapshot.epoch, snapshot.num_arrived)
        self.counters.num_events_lost += batch.num_lost
        self.pipeline.observe(batch.events, batch.num_lost)
        self.log.append("interval", interval_record(from_s, snapshot, batch))
        for event in batch.events:
            if event.ticket is not None and event.ticket.phase.is_terminal:
                self._end_switch(event.ticket, at_s)
        drift = self.oversight.observe(at_s, snapshot, batch.events)
        if drift is not None:
            self.counters.num_drifts += 1
            self.note(f"drift: {drift.from_key} -> {drift.to_key} {drift.who}")
            self.log.append("drift", asdict(drift))
        self._end_canary(self.trials.observe(snapshot.now_s, batch.events))
        self._cancel_overdue(snapshot)
        self._mark("observe")
        return snapshot

    def _end_canary(self, why: str) -> None:
        if why:
            self.note(why)
            self.log.append("operation", {"name": "end_canary", "reason": why})

    def note(self, text: str) -> None:
        """For the record of the tick at hand, or of the next."""
        logger.warning(text)
        self._notes.append(text)

    def _end_switch(self, ticket: SwitchTicket, at_s: float) -> None:
        done = ticket.phase is SwitchPhase.DONE
        self.counters.num_switches_done += done
        self.counters.num_switches_failed += not done
        with self.lock:
            self.switches.append(ticket)
        self.oversight.ended(at_s, ticket)
        self.log.append("outcome", outcome_record(ticket))

    def _cancel_overdue(self, snapshot: ClusterSnapshot) -> None:
        """A switch that takes far too long is rolled back, whoever started it, if it can be."""
        ticket = self.oversight.overdue(snapshot)
        if ticket is None or self.mode is not Mode.ACTIVE:
            return
        self.counters.num_timeouts += 1
        self.note(f"timeout: switch {ticket.ticket_id} to {ticket.to_key} is cancelled")
        self.log.append("switch", switch_record("timeout", ticket.decision_id, ticket))
        try:
            self.cluster.cancel(ticket.ticket_id)
        except TidewrightError as error:
            logger.warning("the engine did not cancel: %s", error)

    def _apply(
        self, prepared: PreparedDecision, decision: Decision, at_s: float
    ) -> SwitchTicket | None:
        """Start the decided switch, or refresh the routing of the present deployment."""
        try:
            if decision.plan is not None:
                return self.start(decision.plan, prepared.at_s)
            if not prepared.snapshot.switch_in_flight:
                self.cluster.set_routing(self.pipeline.routing_for(prepared))
        except UnavailableError:
            raise
        except TidewrightError as error:  # the engine moved on since the snapshot
            logger.warning("the engine refused: %s", error)
            if decision.plan is not None:
                self.counters.num_switches_failed += 1
                if not isinstance(error, StaleEpochError | SwitchInProgressError):
                    self.oversight.breaker.failure(at_s, f"the engine refused: {error}")
        return None

    def start(self, plan: SwitchPlan, now_s: float) -> SwitchTicket:
        """Hand a switch to the engine. With `turn` held. Raises what `Cluster.apply` does."""
        oversight = self.oversight
        oversight.drift.expect(plan.decision_id)
        if oversight.undo is not None and plan.target.key == oversight.undo.to_key:
            oversight.watch.leave_out(plan.decision_id)
        try:
            ticket = self.cluster.apply(plan)
        except TidewrightError as error:
            unknown = isinstance(error, UnavailableError)
            event = "unknown" if unknown else "refused"
            self.log.append("switch", switch_record(event, plan.decision_id, None, str(error)))
            raise
        self.log.append("switch", switch_record("started", plan.decision_id, ticket))
        self.pipeline.scheduler.record_switch(now_s)
        self.counters.num_switches_started += 1
        return ticket

    # ---------------------------------------------------------------- records

    def _blank(self, status: TickStatus, reason: str) -> TickRecord:
        at_s = self.snapshot.now_s if self.snapshot is not None else 0.0
        return TickRecord(self.next_seq, at_s, status, self.mode, reason=reason)

    def _mark(self, step: str) -> None:
        """That step of the tick has ended; what follows is the next one's."""
        self._marks.append((step, time.perf_counter()))

    def _publish(self, record: TickRecord, explained: Explained | None) -> None:
        pairs = itertools.pairwise(self._marks)
        with self.lock:
            self.next_seq = record.seq + 1
            self.steps = tuple((name, from_s, to_s) for (_, from_s), (name, to_s) in pairs)
            self.records.append(record)
            if explained is not None:
                self.explained.append(replace(explained, record=record))
        self.tell()

    def tell(self) -> None:
        """Something changed: a tick, the mode, a hold, the policy."""
        with self.lock:
            self.revision += 1
        for listener in self.listeners:
            listener()
