"""Ticks of earlier lives, from the decision log, as far as it has them: without notes and
durations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from controller.records import CandidateView, Mode, TickRecord, TickStatus, TypeRate
from engine.cluster import SwitchMode, SwitchPhase, SwitchTicket


def past_ticks(records: Sequence[Mapping[str, Any]], types: Sequence[str]) -> list[TickRecord]:
    """Oldest first; `types` are the names of the workload types. A tick that decided and then
    lost the engine has two records, of which the second tells what it came to."""
    return list({tick.seq: tick for tick in _ticks(records, types)}.values())


def _ticks(records: Sequence[Mapping[str, Any]], types: Sequence[str]) -> Iterator[TickRecord]:
    tickets = {
        r["decision_id"]: _ticket(r["ticket"])
        for r in records
        if r["record"] == "switch" and r["event"] == "started"
    }
    for record in records:
        if record["record"] == "decision" and "seq" in record:
            yield _decided(record, types, tickets.get(record["decision_id"]))
        elif record["record"] == "tick":
            yield TickRecord(
                record["seq"],
                record["at_s"],
                TickStatus(record["status"]),
                Mode(record["mode"]),
                reason=record["reason"],
                deployment_key=record["deployment_key"],
                tick_s=record["tick_s"],
            )


def _decided(
    told: Mapping[str, Any], types: Sequence[str], ticket: SwitchTicket | None
) -> TickRecord:
    forecast, actual = told["forecast"], told["rates"][0]
    rates = zip(types, forecast["q50"], forecast["q90"], actual, strict=False)
    snapshot = told["snapshot"]
    waiting = sum(r["num_waiting"] for r in snapshot["replicas"])
    return TickRecord(
        seq=told["seq"],
        at_s=told["at_s"],
        status=TickStatus.DECIDED,
        mode=Mode(told["mode"]),
        decision_id=told["decision_id"],
        candidates=tuple(_view(told, row) for row in range(len(told["candidates"]))),
        action=told["action"],
        chosen_key=told["chosen_key"],
        executed_key=told["executed_key"],
        propensity=told["propensity"],
        policy=told["policy"],
        reason=told["reason"],
        vetoes=tuple(told["vetoes"]),
        ticket=ticket,
        rates=tuple(TypeRate(*rate) for rate in rates),
        epoch=told["epoch"],
        deployment_key=told["deployment_key"],
        num_waiting=waiting + snapshot["num_queued_unrouted"],
        num_running=sum(r["num_running"] for r in snapshot["replicas"]),
        arm=told["arm"],
    )


def _view(told: Mapping[str, Any], row: int) -> CandidateView:
    candidate = told["candidates"][row]
    return CandidateView(
        key=candidate["key"],
        origin=candidate["origin"],
        legal=bool(told["mask"][row]),
        mask_reason=told["mask_reasons"][row],
        probability=told["probabilities"][row],
        headroom=candidate["headroom"],
        predicted_switch_s=candidate["switch_s"],
        weight_bytes=candidate["weight_bytes"],
    )


def _ticket(told: Mapping[str, Any]) -> SwitchTicket:
    """As it was when the switch began."""
    kinds = {"phase": SwitchPhase(told["phase"]), "mode": SwitchMode(told["mode"])}
    phases = tuple((name, seconds) for name, seconds in told["phase_s"])
    return SwitchTicket(**dict(told) | kinds | {"phase_s": phases, "bindings": ()})
