"""What a tick came to, as the record that is published, and a decision with its explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.decision import PreparedDecision
from controller.log_records import decision_reason
from controller.policy_server import ActResult
from controller.records import CandidateView, Mode, TickRecord, TickStatus, TypeRate
from engine.cluster import Decision, SwitchTicket, WorkloadType
from policies.base import Observation


@dataclass(frozen=True, slots=True)
class Explained:
    """What `Explain` needs of one decision, beside its record."""

    record: TickRecord
    observation: Observation


def observed_record(
    seq: int,
    mode: Mode,
    prepared: PreparedDecision,
    types: Sequence[WorkloadType],
    act: ActResult | None = None,
) -> TickRecord:
    """The record of a tick that saw the engine, before anything is decided."""
    snapshot = prepared.snapshot
    return TickRecord(
        seq=seq,
        at_s=prepared.at_s,
        status=TickStatus.OBSERVED,
        mode=mode,
        candidates=tuple(CandidateView(**found) for found in candidate_fields(prepared, act)),
        rates=tuple(TypeRate(**found) for found in rate_fields(prepared, types)),
        epoch=snapshot.epoch,
        deployment_key=snapshot.deployment.key,
        num_waiting=prepared.monitor_state.num_waiting,
        num_running=sum(r.num_running for r in snapshot.replicas),
    )


def decided_record(
    record: TickRecord, act: ActResult, decision: Decision, ticket: SwitchTicket | None, arm: str
) -> TickRecord:
    """The same record with what was decided."""
    return replace(
        record,
        status=TickStatus.DECIDED,
        decision_id=decision.decision_id,
        action=decision.action,
        chosen_key=decision.chosen_key,
        executed_key=decision.executed_key,
        propensity=decision.propensity,
        policy=decision.policy,
        reason=decision_reason(act, decision),
        vetoes=decision.vetoes,
        ticket=ticket,
        arm=arm,
    )


def rate_fields(
    prepared: PreparedDecision, types: Sequence[WorkloadType]
) -> Iterator[dict[str, Any]]:
    """Forecast and seen lately, of each type: the fields of `TypeRate`, also in the protocol."""
    forecast, actual = prepared.forecast, prepared.monitor_state.rates[0]
    for t, q50, q90, rate in zip(types, forecast.q50, forecast.q90, actual, strict=True):
        yield {
            "type": t.name,
            "forecast_p50_per_s": q50,
            "forecast_p90_per_s": q90,
            "actual_per_s": rate,
        }


def candidate_fields(prepared: PreparedDecision, act: ActResult | None) -> Iterator[dict[str, Any]]:
    """Of each as the policy saw it, with the probability that it gave if it was asked: the fields
    of `CandidateView`, here and in the protocol."""
    keys, legal = prepared.observation.keys, prepared.observation.mask.tolist()
    given = [None] * len(legal) if act is None else act.probabilities.tolist()
    rows = zip(keys, prepared.candidates, prepared.mask_reasons, legal, given, strict=False)
    for key, c, reason, is_legal, probability in rows:
        yield {
            "key": key,
            "origin": c.origin,
            "legal": is_legal,
            "mask_reason": reason,
            "probability": probability,
            "headroom": c.headroom,
            "predicted_switch_s": c.switch_s,
            "weight_bytes": c.weight_bytes,
        }
