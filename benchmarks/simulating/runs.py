"""The same arrivals on the real engine and on the surrogate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.service_model import kv_cost_params
from engine.cluster import (
    Drivable,
    ParallelConfig,
    RequestOutcome,
    RequestStatus,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.facade import EngineCluster
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import Trace

Floats = NDArray[np.float64]
LEAD_S = 0.3  # from now to the first arrival
POLL_S = 0.25
TIMEOUT_S = 120.0  # from the last arrival to the last token
MS = 1e3


@dataclass(frozen=True, slots=True)
class Run:
    """What became of the requests of a trace, by their order in it; seconds since its start."""

    first_token_s: Floats
    finish_s: Floats
    longest_gap_s: Floats
    moves: NDArray[np.int64]
    switch: dict[str, Any] = field(default_factory=dict)  # figures of the ticket

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds, two decimals."""
        return {
            "first_token_ms": np.round(MS * self.first_token_s, 2).tolist(),
            "finish_ms": np.round(MS * self.finish_s, 2).tolist(),
            "longest_gap_ms": np.round(MS * self.longest_gap_s, 2).tolist(),
            "moves": self.moves.tolist(),
            "switch": self.switch,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Run:
        times = (np.array(data[name]) / MS for name in TIME_COLUMNS)
        return cls(*times, np.array(data["moves"], np.int64), data["switch"])


TIME_COLUMNS = ("first_token_ms", "finish_ms", "longest_gap_ms")


def drive(
    cluster: Drivable,
    trace: Trace,
    profiled: ProfiledCluster,
    target: Sequence[ParallelConfig] | None = None,
) -> Run:
    """Serve the trace to its end; with `target`, switch to it halfway through the arrivals."""
    start_s = cluster.snapshot().now_s + LEAD_S
    cursor = cluster.events(0).next_cursor
    for request in trace.requests(f"{start_s:.3f}-"):
        cluster.submit(replace(request, arrival_s=request.arrival_s + start_s))
    ticket_id = ""
    if target is not None:
        cluster.advance(start_s + trace.duration_s / 2)
        snapshot = cluster.snapshot()
        plan = plan_switch(
            cluster.spec,
            snapshot.deployment,
            snapshot.epoch,
            target,
            kv_cost_params(profiled, target),
            profiled.profile.switch_overhead_s,
            kv_blocks_used=snapshot.kv_blocks_used,
        )
        ticket_id = cluster.apply(plan).ticket_id
    cluster.advance(start_s + trace.duration_s)
    outcomes: list[RequestOutcome] = []
    deadline_s = cluster.snapshot().now_s + TIMEOUT_S
    while True:
        batch = cluster.events(cursor)
        cursor = batch.next_cursor
        outcomes += [e.outcome for e in batch.events if e.outcome is not None]
        if len(outcomes) == len(trace):
            break
        now_s = cluster.snapshot().now_s
        if now_s > deadline_s:
            raise RuntimeError(f"{len(trace) - len(outcomes)} requests have not ended")
        cluster.advance(now_s + POLL_S)
    ticket = cluster.ticket(ticket_id) if ticket_id else None
    return _run(outcomes, start_s, ticket)


def _run(outcomes: Sequence[RequestOutcome], start_s: float, ticket: SwitchTicket | None) -> Run:
    for outcome in outcomes:
        if outcome.status is not RequestStatus.FINISHED:
            raise RuntimeError(f"{outcome.request_id} ended as {outcome.status}")
    ordered = sorted(outcomes, key=lambda o: int(o.request_id.rpartition("-")[2]))
    return Run(
        np.array([(o.first_token_s or 0.0) - start_s for o in ordered]),
        np.array([o.finish_s - start_s for o in ordered]),
        np.array([o.longest_gap_s for o in ordered]),
        np.array([o.num_moves for o in ordered]),
        {} if ticket is None else figures(ticket),
    )


def figures(ticket: SwitchTicket) -> dict[str, Any]:
    return {
        "phase": ticket.phase.value,
        "reason": ticket.reason,
        "duration_s": ticket.duration_s,
        "pause_s": ticket.pause_s,
        "weight_bytes": ticket.weight_bytes,
        "kv_bytes": ticket.kv_bytes,
        "migrated": ticket.num_migrated,
        "recomputed": ticket.num_recomputed,
        "drained": ticket.num_drained,
        "phase_s": dict(ticket.phase_s),
    }


def simulate(profiled: ProfiledCluster, deployment: str, trace: Trace, target_key: str = "") -> Run:
    cluster = SurrogateCluster(profiled, dense_deployment(parse_deployment_key(deployment)))
    return drive(cluster, trace, profiled, parse_deployment_key(target_key) if target_key else None)


def warm_up(cluster: EngineCluster, trace: Trace, profiled: ProfiledCluster) -> None:
    """Serve a trace whose times count for nothing, and let the machine come to rest."""
    drive(cluster, trace, profiled)
    time.sleep(POLL_S)
