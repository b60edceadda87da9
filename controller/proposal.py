"""A switch asked for by hand: planned and guarded like a candidate of the planner's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from controller.decision import DecisionPipeline, PreparedDecision, plan_to
from controller.deployments import counts_of
from controller.guardrails import mask_reasons
from engine.cluster import Candidate, Decision, ParallelConfig, deployment_key
from engine.migration.plan import switch_cost


def propose(
    pipeline: DecisionPipeline,
    prepared: PreparedDecision,
    configs: Sequence[ParallelConfig],
    waived: frozenset[str] = frozenset(),
) -> tuple[Decision, tuple[str, ...]]:
    """The decision that would switch to `configs`, and the vetoes against it.

    Raises InfeasibleError when no plan exists.
    """
    snapshot, cluster = prepared.snapshot, pipeline.cluster
    decision = pipeline.resolve(prepared, 0, policy_name="operator")
    plan = plan_to(cluster, snapshot, configs, decision.decision_id)
    candidate = _candidate(pipeline, prepared, tuple(configs))
    assert prepared.circumstances is not None
    rows = (prepared.candidates[0], candidate)
    reasons = mask_reasons(prepared.circumstances, rows, pipeline.guards, waived)
    key = deployment_key(configs)
    decision = replace(decision, chosen_key=key, executed_key=key, plan=plan, reason="operator")
    present = ("already_deployed",) if key == snapshot.deployment.key else ()
    return decision, (*present, *(r for r in reasons[1:] if r))


def _candidate(
    pipeline: DecisionPipeline, prepared: PreparedDecision, configs: tuple[ParallelConfig, ...]
) -> Candidate:
    spec, forecast, planner = pipeline.cluster.spec, prepared.forecast, pipeline.planner
    state, mixing = prepared.monitor_state, pipeline.monitor.posterior.mixing
    lengths = np.array([state.prompt_tokens, state.output_tokens]).T
    median = planner.estimate(configs, forecast.q50, lengths, mixing)
    high = planner.estimate(configs, forecast.q90, lengths, mixing)
    per_replica = planner.scorer.model(planner.scorer.lengths_key(None)).kv_tokens
    cost = switch_cost(spec, prepared.snapshot.deployment, configs)
    return Candidate(
        configs=configs,
        origin="operator",
        routing=median.routing,
        headroom=median.headroom,
        headroom_q90=high.headroom,
        latency_s=median.latency_s,
        kv_capacity_tokens=int(np.dot(counts_of(configs, planner.configs), per_replica)),
        weight_bytes=cost.weight_bytes,
        switch_s=cost.seconds + pipeline.cluster.profile.switch_overhead_s,
        num_devices_changed=cost.devices_changed,
    )
