"""The decision log: JSON lines from which off-line evaluation can replay every decision.

One `header` record, then per tick an `interval` (every arrival and every ended request since the
tick before) and a `decision`; a `proposal` when a switch is asked for by hand, and an `outcome`
when a switch ends. A record is one write and one flush, so a killed controller leaves at most one
torn line, the last; the next life starts on a line of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from controller.decision import PreparedDecision
from controller.policy_server import ActResult
from controller.records import Mode, TickRecord
from engine.cluster import ClusterEvent, Decision, SwitchPlan, SwitchTicket
from engine.errors import InvalidRequestError

SCHEMA = 1
REQUEST_FIELDS = (
    "request_id",
    "status",
    "arrival_s",
    "first_token_s",
    "finish_s",
    "prompt_tokens",
    "output_tokens",
    "replica_id",
)


class DecisionLog:
    """Appends records to one file; `path` None keeps nothing.

    Raises InvalidRequestError when the file cannot be opened.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._file: TextIO | None = None
        if path is not None:
            self._file = _open(path)
            self.append(
                "header", {"schema": SCHEMA, "request_fields": REQUEST_FIELDS} | dict(header)
            )

    def append(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"record": kind} | dict(record), allow_nan=False, default=_plain)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> TextIO:
    """For appending; a torn last line of an earlier life is ended first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                file.write(b"\n")
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"decision log {path} cannot be written: {error.strerror}; choose another with --log."
        ) from error


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """numpy arrays and scalars as JSON."""
    return value.tolist()


@dataclass(frozen=True, slots=True)
class LogContents:
    """What a log held; `skipped` says for each unreadable line its number and why."""

    records: tuple[dict[str, Any], ...]
    skipped: tuple[tuple[int, str], ...]


def read_log(path: Path) -> LogContents:
    """Read a log, also one whose last record is torn. Raises OSError when there is no file."""
    records, skipped = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                torn = "torn record" if not line.endswith("\n") else "not JSON"
                skipped.append((number, f"{torn}: {error}"))
                continue
            if isinstance(record, dict) and "record" in record:
                records.append(record)
            else:
                skipped.append((number, "not a record of this log"))
    return LogContents(tuple(records), tuple(skipped))


# ------------------------------------------------------------------------------ what records hold


def decision_record(
    prepared: PreparedDecision, act: ActResult, decision: Decision, mode: Mode
) -> dict[str, Any]:
    """Everything that importance weighting needs. The guard map is in `mask_reasons`: a row with
    a reason is executed as row 0, keep."""
    snapshot, state = prepared.snapshot, prepared.monitor_state
    return {
        "decision_id": decision.decision_id,
        "at_s": prepared.at_s,
        "mode": mode,
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
        "reason": decision_reason(act, decision),
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


def interval_record(
    from_s: float, to_s: float, events: Iterable[ClusterEvent], num_lost: int
) -> dict[str, Any]:
    """Arrivals as [arrival_s, prompt_tokens, class], ended requests as REQUEST_FIELDS."""
    events = tuple(events)
    arrivals = [e.arrival for e in events if e.arrival is not None]
    ended = [e.outcome for e in events if e.outcome is not None]
    return {
        "from_s": from_s,
        "to_s": to_s,
        "num_events_lost": num_lost,
        "arrivals": [[a.arrival_s, a.prompt_tokens, a.request_class] for a in arrivals],
        "requests": [[getattr(o, name) for name in REQUEST_FIELDS] for o in ended],
    }


def _plan_figures(plan: SwitchPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {"weight_bytes": plan.weight_bytes, "predicted_s": plan.predicted_s}
