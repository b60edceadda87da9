"""What a simulated span leaves: events for the log, or columns without an object per request."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Arrival, EventKind, Request, RequestOutcome, RequestStatus
from engine.events import EventLog
from envs.surrogate.layout import FAILED, FINISHED, REJECTED
from policies.base import TrafficColumns

Floats = NDArray[np.float64]
Records = NDArray[Any]  # of a dtype in `envs.surrogate.layout`
Slots = NDArray[np.int64]

STATUS = {
    FINISHED: RequestStatus.FINISHED,
    REJECTED: RequestStatus.REJECTED,
    FAILED: RequestStatus.FAILED,
}
OUTCOME_FIELDS = (
    "first_token_s",
    "output_tokens",
    "row",
    "longest_gap_s",
    "num_preemptions",
    "num_moves",
    "status",
)


def _ended_s(seqs: Records, ended: Slots) -> Floats:
    rejected = seqs["status"][ended] == REJECTED
    return np.asarray(np.where(rejected, seqs["arrival_s"][ended], seqs["last_token_s"][ended]))


def traffic_columns(seqs: Records, arrived: Slots, ended: Slots) -> TrafficColumns:
    """Of the slots of requests that arrived, and ended, in one span."""
    finish_s = _ended_s(seqs, ended)
    order = np.lexsort((seqs["row"][ended], finish_s))  # whichever replica was looked at first
    ended, finish_s = ended[order], finish_s[order]
    return TrafficColumns(
        seqs["arrival_s"][arrived],
        seqs["prompt_tokens"][arrived],
        seqs["index"][ended],
        seqs["status"][ended] == FINISHED,
        seqs["arrival_s"][ended],
        seqs["first_token_s"][ended],
        finish_s,
        seqs["prompt_tokens"][ended],
        seqs["output_tokens"][ended],
    )


def log_events(
    log: EventLog,
    seqs: Records,
    arrived: Slots,
    ended: Slots,
    requests: list[Request],
    replica_ids: dict[int, int],
) -> None:
    """Append the span's events in order of time; at one instant ends, arrivals, rejections.

    `requests` are those of `ended`, then those of `arrived`; `replica_ids` is by row.
    """
    rejected = seqs["status"][ended] == REJECTED
    at_s = np.concatenate([_ended_s(seqs, ended), seqs["arrival_s"][arrived]])
    rank = np.concatenate([np.where(rejected, 2, 0), np.ones(len(arrived), np.int64)])
    row = np.concatenate([seqs["row"][ended], np.zeros(len(arrived), np.int64)])
    times, values = at_s.tolist(), seqs[list(OUTCOME_FIELDS)][ended].tolist()
    for i in np.lexsort((row, rank, at_s)).tolist():
        if i < len(ended):
            outcome = _outcome(requests[i], values[i], times[i], replica_ids)
            log.append(times[i], EventKind.ENDED, outcome=outcome)
        else:
            log.append(times[i], EventKind.ARRIVED, arrival=_arrival(requests[i]))


def _arrival(request: Request) -> Arrival:
    return Arrival(
        request.request_id,
        request.arrival_s,
        request.prompt_tokens,
        request.request_class,
        request.client_id,
    )


def _outcome(
    request: Request, values: tuple[Any, ...], at_s: float, replica_ids: dict[int, int]
) -> RequestOutcome:
    """`values` in the order of OUTCOME_FIELDS."""
    first_token_s, output_tokens, row, longest_gap_s, num_preemptions, num_moves, status = values
    return RequestOutcome(
        request.request_id,
        STATUS[status],
        request.arrival_s,
        first_token_s if output_tokens else None,
        at_s,
        request.prompt_tokens,
        output_tokens,
        replica_ids.get(row),
        longest_gap_s,
        num_preemptions,
        num_moves,
        request.request_class,
        request.client_id,
    )
