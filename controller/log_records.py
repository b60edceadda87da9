"""What the records of the decision log hold.

A life starts with a `header`; then, per tick, an `interval` (every arrival and every ended request
since the tick before) and a `decision`, or a `tick` where nothing was decided and why. Beside them:
`switch` (a switch was started, refused by the engine, not answered, or timed out), `outcome` (a
switch ended, rolled back or not), `proposal` (a switch asked for by hand), `operation` (holds,
modes, policies) and `drift`. `state` and `answer` are what the next life goes on from: see
`controller.resume`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from controller.decision import DecisionPipeline, PreparedDecision
from controller.guardrails import guard_map
from controller.policy_server import ActResult
from controller.records import Mode, TickRecord
from engine.cluster import ClusterSnapshot, Decision, EventBatch, SwitchPlan, SwitchTicket

REQUEST_FIELDS = (
    "request_id",
    "status",
    "arrival_s",
    "first_token_s",
    "finish_s",
    "prompt_tokens",
    "output_tokens",
    "replica_id",
    "request_class",
    "client_id",
)


def header_record(pipeline: DecisionPipeline, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for a whole life: versions of all that decides, and what `facts` add."""
    return {
        "versions": {
            "tidewright": version("tidewright"),
            "generator": pipeline.config_hash,  # of the candidates and their masks
            "features": pipeline.observation_spec.hash,
        },
        "request_fields": REQUEST_FIELDS,
        "decision": asdict(pipeline.config),
        "predictor": pipeline.predictor.name,
        "types": [asdict(t) for t in pipeline.typing.types],
    } | dict(facts)


def decision_record(
    prepared: PreparedDecision, act: ActResult, decision: Decision, mode: Mode
) -> dict[str, Any]:
    """Everything that importance weighting needs: `propensity` is the probability of
    `executed_key`, the sum over the rows that `guard_map` sends there."""
    snapshot, state = prepared.snapshot, prepared.monitor_state
    return {
        "decision_id": decision.decision_id,
        "at_s": prepared.at_s,
        "mode": mode,
        "policy": decision.policy,
        "snapshot": asdict(snapshot),
        "observation": prepared.observation.flat(),
        "candidates": [asdict(c) | {"key": c.key} for c in prepared.candidates],
        "mask": prepared.observation.mask,
        "mask_reasons": prepared.mask_reasons,
        "probabilities": act.probabilities,
        "guard_map": guard_map(prepared.mask_reasons, len(act.probabilities)),
        "action": decision.action,
        "chosen_key": decision.chosen_key,
        "executed_key": decision.executed_key,
        "propensity": decision.propensity,
        "reason": decision_reason(act, decision),
        "failure": act.failure,
        "vetoes": decision.vetoes,
        "plan": _plan_figures(decision.plan),
        "forecast": asdict(prepared.forecast),
        "rates": state.rates,
        "epoch": snapshot.epoch,
        "deployment_key": snapshot.deployment.key,
        "num_arrived": snapshot.num_arrived,
        "num_finished": snapshot.num_finished,
        "num_rejected": snapshot.num_rejected,
        "latency_s": state.latency_s,
    }


def decision_reason(act: ActResult, decision: Decision) -> str:
    """The rule behind the executed candidate, or why the fall-back decided."""
    return decision.reason if act.reason == "policy" else act.reason


def proposal_record(
    decision: Decision, vetoes: tuple[str, ...], dry_run: bool, mode: Mode
) -> dict[str, Any]:
    return {
        "decision_id": decision.decision_id,
        "at_s": decision.at_s,
        "mode": mode,
        "chosen_key": decision.chosen_key,
        "vetoes": vetoes,
        "dry_run": dry_run,
        "plan": _plan_figures(decision.plan),
    }


def tick_record(record: TickRecord) -> dict[str, Any]:
    """A tick that decided nothing, and why."""
    return {
        "seq": record.seq,
        "at_s": record.at_s,
        "status": record.status,
        "mode": record.mode,
        "reason": record.reason,
        "deployment_key": record.deployment_key,
        "tick_s": record.tick_s,
    }


def switch_record(
    event: str, decision_id: str, ticket: SwitchTicket | None, reason: str = ""
) -> dict[str, Any]:
    """started, refused (by the engine), unknown (it did not answer) or timeout."""
    told = asdict(ticket) if ticket is not None else None
    return {"event": event, "decision_id": decision_id, "ticket": told, "reason": reason}


def outcome_record(ticket: SwitchTicket) -> dict[str, Any]:
    return {"ticket": asdict(ticket), "duration_s": ticket.duration_s}


def interval_record(from_s: float, snapshot: ClusterSnapshot, batch: EventBatch) -> dict[str, Any]:
    """Arrivals as [arrival_s, prompt_tokens, class, client], ended requests as REQUEST_FIELDS."""
    events = batch.events
    arrivals = [e.arrival for e in events if e.arrival is not None]
    ended = [e.outcome for e in events if e.outcome is not None]
    return {
        "from_s": from_s,
        "to_s": snapshot.now_s,
        "epoch": snapshot.epoch,
        "num_arrived": snapshot.num_arrived,
        "next_cursor": batch.next_cursor,
        "num_events_lost": batch.num_lost,
        "arrivals": [
            [a.arrival_s, a.prompt_tokens, a.request_class, a.client_id] for a in arrivals
        ],
        "requests": [[getattr(o, name) for name in REQUEST_FIELDS] for o in ended],
    }


def _plan_figures(plan: SwitchPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {"weight_bytes": plan.weight_bytes, "predicted_s": plan.predicted_s}
