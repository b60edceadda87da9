"""What the control loop knows -> messages of control.proto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from controller.canary import ACTIVE, CANARY, Canary
from controller.deciding import Decided
from controller.explanations import Explanation
from controller.log_records import decision_reason
from controller.loop import ControlLoop
from controller.operations import Proposal
from controller.oversight import Hold
from controller.predictor import Forecast
from controller.records import Mode
from controller.roster import PolicyInfo
from controller.tick_records import candidate_fields, rate_fields
from engine.cluster import Candidate, Routing, WorkloadType
from engine.wire import to_proto
from protos import control_pb2 as pb

MODES = {
    pb.MODE_ACTIVE: Mode.ACTIVE,
    pb.MODE_ADVISORY: Mode.ADVISORY,
    pb.MODE_OFF: Mode.OFF,
}
NUMBERS = {mode: number for number, mode in MODES.items()}


def state(loop: ControlLoop, uptime_s: float) -> Any:
    """With the loop's `lock` held."""
    oversight, snapshot = loop.oversight, loop.snapshot
    response = pb.GetStateResponse(
        mode=NUMBERS[loop.mode],
        policy=loop.active.name,
        policy_digest=loop.active.digest,
        uptime_s=uptime_s,
        grid_s=loop.pipeline.config.grid_s,
        engine_available=loop.available,
        next_seq=loop.next_seq,
        actor=oversight.breaker.actor,
        breaker=oversight.breaker.state,
        breaker_reason=oversight.breaker.reason,
        num_log_records_lost=loop.log.num_lost,
        retraining=loop.retraining.state.reasons,
        shadows=loop.trials.shadows,
        canary=None if loop.trials.canary is None else canary(loop.trials.canary),
    )
    to_proto(loop.counters, response.counters)
    at_s = loop.clock()
    response.holds.extend(hold(h, at_s) for h in oversight.holds(at_s))
    if snapshot is not None:
        response.epoch = snapshot.epoch
        response.deployment_key = snapshot.deployment.key
        to_proto(snapshot.deployment, response.deployment)
    if loop.records:
        to_proto(loop.records[-1], response.last_tick)
    for ticket in loop.switches:
        to_proto(ticket, response.switches.add())
    return response


def hold(held: Hold, at_s: float) -> Any:
    return pb.HoldView(
        rule=held.rule, reason=held.reason, remaining_s=max(0.0, held.until_s - at_s)
    )


def canary(found: Canary) -> Any:
    arms = [block.arm for block in found.blocks]
    view = pb.CanaryView(
        name=found.name,
        fraction=found.config.fraction,
        arm=found.arm,
        num_active_blocks=arms.count(ACTIVE),
        num_canary_blocks=arms.count(CANARY),
        evidence=found.evidence,
        threshold=found.config.threshold,
    )
    if view.num_active_blocks:
        view.active_goodput = found.goodput(ACTIVE)
    if view.num_canary_blocks:
        view.canary_goodput = found.goodput(CANARY)
    return view


def proposal(found: Proposal) -> Any:
    plan = found.decision.plan
    response = pb.ProposeSwitchResponse(
        accepted=not found.vetoes,
        applied=found.ticket is not None,
        vetoes=found.vetoes,
        target_key=found.decision.chosen_key,
        decision_id=found.decision.decision_id,
    )
    if plan is not None:
        response.weight_bytes = plan.weight_bytes
        response.lower_bound_bytes = plan.lower_bound_bytes
        response.predicted_s = plan.predicted_s
        response.num_transfers = len(plan.transfers)
        response.expected_epoch = plan.expected_epoch
        to_proto(plan.target, response.target)
    if found.ticket is not None:
        to_proto(found.ticket, response.ticket)
    return response


def explanation(found: Explanation, candidate_key: str) -> Any:
    """Of all candidates, or of one by key."""
    response = pb.ExplainResponse(summary=found.summary, state_features=found.state_features)
    to_proto(found.record, response.record)
    for item in found.candidates:
        if candidate_key in ("", item.candidate.key):
            message = response.candidates.add(
                is_chosen=item.is_chosen,
                is_executed=item.is_executed,
                why=item.why,
                features=item.features,
            )
            to_proto(item.candidate, message.candidate)
    return response


def forecast(found: Forecast, types: Sequence[WorkloadType]) -> Any:
    message = pb.HorizonForecast(ahead=found.ahead, is_drifting=found.drift == "drifting")
    rows = zip(types, found.mean, found.q50, found.q90, found.relative_error, strict=True)
    for kind, mean, q50, q90, error in rows:
        message.types.add(
            type=kind.name, mean_per_s=mean, p50_per_s=q50, p90_per_s=q90, relative_error=error
        )
    return message


def estimate(found: Candidate) -> Any:
    return pb.DeploymentEstimate(
        key=found.key,
        origin=found.origin,
        headroom=found.headroom,
        latency_s=found.latency_s,
        weight_bytes=found.weight_bytes,
        switch_s=found.switch_s,
        num_devices=sum(c.num_devices for c in found.configs),
        kv_capacity_tokens=found.kv_capacity_tokens,
    )


def policy(info: PolicyInfo, active: PolicyInfo) -> Any:
    is_active = (info.name, info.digest) == (active.name, active.digest)
    return to_proto(info, pb.PolicyView(is_active=is_active))


def decided(found: Decided, routing: Routing, types: Sequence[WorkloadType]) -> Any:
    decision = found.decision
    response = pb.DecideResponse(
        decision_id=decision.decision_id,
        chosen_key=decision.chosen_key,
        executed_key=decision.executed_key,
        propensity=decision.propensity,
        policy=decision.policy,
        reason=decision_reason(found.act, decision),
        vetoes=decision.vetoes,
    )
    for fields in candidate_fields(found.prepared, found.act):
        response.candidates.add(**fields)
    for fields in rate_fields(found.prepared, types):
        response.rates.add(**fields)
    if decision.plan is not None:
        to_proto(decision.plan, response.plan)
    to_proto(routing, response.routing)
    return response
