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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from controller.decision import DecisionPipeline, PreparedDecision
from controller.decision_log import DecisionLog
from controller.policy_server import ActResult, PolicyServer
from controller.proposal import propose
from controller.records import CandidateView, Counters, Mode, TickRecord, TickStatus, TypeRate
from engine.cluster import (
    Cluster,
    ClusterSnapshot,
    Decision,
    SwitchPhase,
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
    """One loop per cluster. `tick` is called by one thread at a time; readers use the lock."""

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
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.records: deque[TickRecord] = deque(maxlen=NUM_RECORDS_KEPT)
        self.switches: deque[SwitchTicket] = deque(maxlen=NUM_SWITCHES_KEPT)
        self.snapshot: ClusterSnapshot | None = None
        self.available = False
        self._cursor, self._next_seq, self._last_now_s = 0, 1, -1.0
        self._open_ticket = ""

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
        with self.lock:
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
        self._log_decision(prepared, act, decision)
        ticket = self._apply(prepared, decision) if self.mode is Mode.ACTIVE else None
        self.counters.num_decisions += 1
        self.counters.num_vetoed += bool(decision.vetoes)
        return self._record(prepared, TickStatus.DECIDED, act, decision, ticket)

    def _observe(self) -> ClusterSnapshot:
        """New events and a snapshot; notices an engine that was started again."""
        snapshot = self.cluster.snapshot()
        if snapshot.now_s < self._last_now_s:
            logger.warning("the engine's clock went back: it was restarted")
            self.counters.num_restarts += 1
            self._cursor, self._open_ticket = 0, ""
            self.pipeline.reset(snapshot.now_s)
        self._last_now_s = snapshot.now_s
        batch = self.cluster.events(self._cursor)
        self._cursor = batch.next_cursor
        self.counters.num_events_lost += batch.num_lost
        self.pipeline.observe(batch.events)
        for event in batch.events:
            if event.ticket is not None and event.ticket.phase.is_terminal:
                self._end_switch(event.ticket)
        self.snapshot = snapshot
        return snapshot

    def _end_switch(self, ticket: SwitchTicket) -> None:
        done = ticket.phase is SwitchPhase.DONE
        self.counters.num_switches_done += done
        self.counters.num_switches_failed += not done
        self.switches.append(ticket)
        self.log.append("outcome", {"ticket": asdict(ticket), "duration_s": ticket.duration_s})

    def _apply(self, prepared: PreparedDecision, decision: Decision) -> SwitchTicket | None:
        """Start the decided switch, or refresh the routing of the present deployment."""
        try:
            if decision.plan is None:
                if not prepared.snapshot.switch_in_flight:
                    self.cluster.set_routing(self.pipeline.routing_for(prepared))
                return None
            ticket = self.cluster.apply(decision.plan)
        except UnavailableError:
            raise
        except TidewrightError as error:  # the engine moved on since the snapshot
            logger.warning("the engine refused: %s", error)
            self.counters.num_switches_failed += decision.plan is not None
            return None
        self.pipeline.scheduler.record_switch(prepared.at_s)
        self.counters.num_switches_started += 1
        return ticket

    # ---------------------------------------------------------------- by hand

    def propose(self, target_key: str, dry_run: bool) -> Proposal:
        """Plan and guard a switch asked for by hand; apply it unless dry_run or mode is not active.

        Raises InfeasibleError, UnavailableError.
        """
        configs = parse_deployment_key(target_key)
        with self.lock:
            snapshot = self._observe()
            prepared = self.pipeline.prepare(snapshot)
            decision, vetoes = propose(self.pipeline, prepared, configs)
            ticket = None
            if not vetoes and not dry_run and self.mode is Mode.ACTIVE:
                ticket = self._apply(prepared, decision)
            return Proposal(decision, vetoes, ticket)

    def set_mode(self, mode: Mode) -> Mode:
        """Returns the mode before."""
        with self.lock:
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
            reason=decision.reason if act.reason == "policy" else act.reason,
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
        self.records.append(record)
        self.changed.notify_all()

    def _log_decision(self, prepared: PreparedDecision, act: ActResult, decision: Decision) -> None:
        snapshot = prepared.snapshot
        plan: dict[str, Any] | None = None
        if decision.plan is not None:
            plan = {
                "weight_bytes": decision.plan.weight_bytes,
                "predicted_s": decision.plan.predicted_s,
            }
        self.log.append(
            "decision",
            {
                "decision_id": decision.decision_id,
                "at_s": prepared.at_s,
                "mode": self.mode,
                "policy": decision.policy,
                "observation": prepared.observation.flat(),
                "candidates": [asdict(c) | {"key": c.key} for c in prepared.candidates],
                "mask": prepared.observation.mask,
                "mask_reasons": prepared.mask_reasons,
                "probabilities": act.probabilities,
                "action": decision.action,
                "chosen_key": decision.chosen_key,
                "executed_key": decision.executed_key,
                "propensity": decision.propensity,
                "reason": decision.reason if act.reason == "policy" else act.reason,
                "vetoes": decision.vetoes,
                "plan": plan,
                "forecast": asdict(prepared.forecast),
                "rates": prepared.monitor_state.rates,
                "epoch": snapshot.epoch,
                "deployment_key": snapshot.deployment.key,
                "num_arrived": snapshot.num_arrived,
                "num_finished": snapshot.num_finished,
                "num_rejected": snapshot.num_rejected,
                "latency_s": prepared.monitor_state.latency_s,
            },
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
