"""The requests of a decision log: as a trace to replay, and as the reward of each interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from controller.log_records import REQUEST_FIELDS
from engine.cluster import Request, RequestOutcome, RequestStatus
from envs.reward import RewardConfig, RewardLedger
from envs.workload import Trace
from policies.base import Seconds


@dataclass(frozen=True, slots=True)
class LoggedInterval:
    """One `interval` record, and what was decided on before it."""

    from_s: float
    to_s: float
    arrivals: tuple[tuple[float, int], ...]  # (arrival_s, prompt tokens)
    outcomes: tuple[RequestOutcome, ...]
    switched_bytes: int = 0  # of weights, by the switch that was started before it
    num_devices: int = 0  # in use at its end

    @property
    def tpot_s(self) -> Seconds:
        """Per output token, of the requests that finished with two or more."""
        done = [o.tpot_s for o in self.outcomes if o.status is RequestStatus.FINISHED]
        return np.array([seconds for seconds in done if seconds is not None], np.float64)


def read_interval(record: dict[str, Any], fields: Sequence[str] = REQUEST_FIELDS) -> LoggedInterval:
    """Raises KeyError, TypeError or ValueError for what is no interval."""
    known = [name for name in fields if name in REQUEST_FIELDS]
    outcomes = []
    for values in record["requests"]:
        told = {n: v for n, v in zip(fields, values, strict=True) if n in known}
        outcomes.append(RequestOutcome(**told | {"status": RequestStatus(told["status"])}))
    return LoggedInterval(
        float(record["from_s"]),
        float(record["to_s"]),
        tuple((float(a[0]), int(a[1])) for a in record["arrivals"]),
        tuple(outcomes),
    )


@dataclass(frozen=True, slots=True)
class LoggedTraffic:
    """Requests of an unbroken part of a log, in order of arrival."""

    requests: tuple[Request, ...]
    start_s: float
    end_s: float
    num_guessed: int  # requests whose output length is not known: the median of the others

    @property
    def trace(self) -> Trace:
        """Those that arrived in this part, on a clock that starts with it."""
        inside = [r for r in self.requests if r.arrival_s >= self.start_s]
        return Trace(
            np.array([r.arrival_s - self.start_s for r in inside], np.float64),
            np.array([r.prompt_tokens for r in inside], np.int64),
            np.array([r.output_tokens for r in inside], np.int64),
            duration_s=self.end_s - self.start_s,
        )


def logged_traffic(intervals: Sequence[LoggedInterval]) -> LoggedTraffic:
    """Every request that arrived or ended. Lengths are those that it ended with."""
    ended = [o for interval in intervals for o in interval.outcomes]
    done = [o for o in ended if o.status is RequestStatus.FINISHED]
    usual = int(np.median([o.output_tokens for o in done])) if done else 1
    requests = [
        Request(
            o.request_id,
            o.arrival_s,
            o.prompt_tokens,
            max(o.output_tokens, 1) if o.status is RequestStatus.FINISHED else max(usual, 1),
        )
        for o in ended
    ]
    known = Counter((o.arrival_s, o.prompt_tokens) for o in ended)
    still_open = Counter(a for interval in intervals for a in interval.arrivals) - known
    for number, (arrival_s, prompt_tokens) in enumerate(sorted(still_open.elements())):
        requests.append(Request(f"open-{number}", arrival_s, prompt_tokens, max(usual, 1)))
    return LoggedTraffic(
        tuple(sorted(requests, key=lambda r: r.arrival_s)),
        intervals[0].from_s,
        intervals[-1].to_s,
        len(requests) - len(done),
    )


def interval_rewards(
    intervals: Sequence[LoggedInterval], traffic: LoggedTraffic, reward: RewardConfig
) -> list[float]:
    """The reward of each interval, as an environment gives it. Requests from before the first one
    count when they end, or fall due."""
    ledger, requests = RewardLedger(reward), traffic.requests
    first_s = min([traffic.start_s, *(r.arrival_s for r in requests[:1])])
    trace = Trace(
        np.array([r.arrival_s - first_s for r in requests], np.float64),
        np.array([r.prompt_tokens for r in requests], np.int64),
        np.array([r.output_tokens for r in requests], np.int64),
        duration_s=traffic.end_s - first_s,
    )
    stretch = reward.stretch.of(reward, trace) if len(trace) else np.zeros(0)
    for request, factor in zip(requests, stretch.tolist(), strict=True):
        ledger.admit(request, factor)
    found = []
    for interval in intervals:
        device_s = interval.num_devices * (interval.to_s - interval.from_s)
        terms = ledger.settle(interval.outcomes, interval.to_s, interval.switched_bytes, device_s)
        found.append(terms.total)
    return found
