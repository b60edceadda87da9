"""`python evaluate.py explain`: why a logged decision was made, and what came of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.decision_log import read_log
from controller.explanations import Explanation, explain
from controller.observation import observation_spec
from controller.records import CandidateView, Mode, TickRecord, TickStatus
from engine.errors import InvalidRequestError, NotFoundError
from envs.logged import observation_of
from envs.offline.files import check_writable, write_json

Record = Mapping[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python evaluate.py explain", description=__doc__)
    add = parser.add_argument
    add("log", type=Path, help="decision log of `python -m controller`")
    add(
        "--tick",
        default="-1",
        metavar="T",
        help="number of the decision in the log, from 0 (negative: from the end), or its id "
        "(default: -1, the last)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    if args.json:
        check_writable(args.json)
    told = explain_tick(args.log, args.tick)
    if args.json:
        write_json(args.json, told)
    show(told)
    print(json.dumps(told, allow_nan=False))
    return 0


def explain_tick(path: Path, tick: str) -> dict[str, Any]:
    """Raises InvalidRequestError for a log without decisions, NotFoundError for no such tick."""
    try:
        records = read_log(path).records
    except OSError as error:
        raise InvalidRequestError(f"log {path} cannot be read: {error.strerror}.") from error
    at = [i for i, record in enumerate(records) if record["record"] == "decision"]
    if not at:
        raise InvalidRequestError(
            f"{path} has no decision in it; give a log of a controller that ran in active or "
            "advisory mode."
        )
    index = at[_number(tick, [str(records[i].get("decision_id", "")) for i in at])]
    headers = [r for r in records[:index] if r["record"] == "header" and "decision" in r]
    if not headers:
        raise InvalidRequestError(f"{path} has no header before that decision; it was cut off.")
    try:
        found = _explanation(headers[-1], records[index], at.index(index))
        return _told(path, found, records[index], _afterwards(records, index))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequestError(
            f"decision {tick} of {path} is not understood ({what}); this version reads logs of "
            "its own features."
        ) from error


def _number(tick: str, ids: Sequence[str]) -> int:
    """Its place among the decisions."""
    if tick in ids:
        return ids.index(tick)
    try:
        number = int(tick)
        ids[number]
    except (ValueError, IndexError):
        raise NotFoundError(
            f"no decision {tick!r}: the log has {len(ids)}, from 0 to {len(ids) - 1}, the first "
            f"with the id {ids[0]!r}."
        ) from None
    return number % len(ids)


def _explanation(header: Record, decision: Record, seq: int) -> Explanation:
    settings = header["decision"]
    spec = observation_spec(
        len(header["types"]), int(settings["max_candidates"]), float(settings["grid_s"])
    )
    return explain(record_of(decision, seq), observation_of(spec, dict(decision)), spec)


def record_of(decision: Record, seq: int) -> TickRecord:
    """A logged decision as the controller published it."""
    shown = zip(
        decision["candidates"],
        decision["mask"],
        decision["mask_reasons"],
        decision.get("probabilities", np.zeros(len(decision["mask"]))),
        strict=False,  # rows past the last candidate
    )
    return TickRecord(
        seq=seq,
        at_s=float(decision["at_s"]),
        status=TickStatus.DECIDED,
        mode=Mode(decision.get("mode", "active")),
        decision_id=str(decision.get("decision_id", "")),
        candidates=tuple(
            CandidateView(
                key=str(c["key"]),
                origin=str(c["origin"]),
                legal=bool(legal),
                mask_reason=str(reason),
                probability=float(probability),
                headroom=float(c["headroom"]),
                predicted_switch_s=float(c["switch_s"]),
                weight_bytes=int(c["weight_bytes"]),
            )
            for c, legal, reason, probability in shown
        ),
        action=int(decision["action"]),
        chosen_key=str(decision["chosen_key"]),
        executed_key=str(decision["executed_key"]),
        propensity=float(decision.get("propensity", 0.0)),
        policy=str(decision["policy"]),
        reason=str(decision.get("reason", "")),
        vetoes=tuple(map(str, decision.get("vetoes", ()))),
        epoch=int(decision.get("epoch", 0)),
        deployment_key=str(decision["deployment_key"]),
    )


def _afterwards(records: Sequence[Record], index: int) -> list[str]:
    """Sentences on what followed, until the next decision; the end of its switch whenever."""
    told, name, is_next = [], records[index].get("decision_id"), True
    for record in records[index + 1 :]:
        kind = record["record"]
        is_next = is_next and kind != "decision"
        if kind == "switch" and record.get("decision_id") == name:
            why = f": {record['reason']}" if record.get("reason") else ""
            told.append(f"the switch was {record['event']}{why}")
        elif kind == "interval" and is_next:
            ended = len(record["requests"])
            seconds, came = record["to_s"] - record["from_s"], len(record["arrivals"])
            told.append(f"in the {seconds:g} s after it {came} requests came and {ended} ended")
        elif kind == "outcome" and is_next:
            ticket = record["ticket"]
            told.append(f"a switch to {ticket.get('to_key', '?')} ended: {ticket.get('phase')}")
    return told


def _told(
    path: Path, found: Explanation, decision: Record, afterwards: list[str]
) -> dict[str, Any]:
    record = found.record
    return {
        "log": str(path),
        "tick": record.seq,
        "decision_id": record.decision_id,
        "at_s": record.at_s,
        "mode": record.mode.value,
        "deployment": record.deployment_key,
        "executed": record.executed_key,
        "summary": found.summary,
        "afterwards": afterwards,
        "candidates": [
            asdict(c.candidate)
            | {"why": c.why, "is_chosen": c.is_chosen, "is_executed": c.is_executed}
            | {"features": c.features}
            for c in found.candidates
        ],
        "state": found.state_features,
        "forecast": decision.get("forecast"),
    }


def show(told: Mapping[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(
        f"tick {told['tick']} ({told['decision_id']}) at {told['at_s']:g} s, {told['mode']}: "
        f"{told['summary']}",
        markup=False,
    )
    table = Table("", "candidate", "origin", "probability", "headroom", "switch s", "why")
    for c in told["candidates"]:
        mark = "→" if c["is_executed"] else "·" if c["is_chosen"] else ""
        table.add_row(
            mark, c["key"], c["origin"], f"{c['probability']:.3f}", f"{c['headroom']:.2f}",
            f"{c['predicted_switch_s']:.2f}", c["why"],
        )  # fmt: skip
    console.print(table)
    for sentence in told["afterwards"]:
        console.print(sentence, markup=False)
