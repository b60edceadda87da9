"""What one rule's windows came to: figures from columns of traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from controller.workload import assign
from engine.cluster import SloSpec, WorkloadTyping
from envs.columns import ColumnLedger
from envs.reward import RewardConfig, slo_met, tpot_of
from envs.workload import Trace
from policies.base import TrafficColumns


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """One window under one rule."""

    trace: Trace
    traffic: TrafficColumns
    end_s: float
    device_s: float  # devices in the deployment times seconds
    first_key: str
    switches: tuple[tuple[float, str], ...]  # when each began, and to what
    switch_s: float


@dataclass(frozen=True, slots=True)
class Objectives:
    """The levels of service that a run is scored by; `mixed`: types of long requests are batch."""

    interactive: SloSpec
    batch: SloSpec
    is_batch: tuple[bool, ...]  # [J]
    reward: RewardConfig  # whose utility is J

    def attainment(self, records: Sequence[WindowRecord], typing: WorkloadTyping) -> dict[str, int]:
        """Requests that meet each."""
        met = {"interactive": 0, "batch": 0, "mixed": 0}
        for record in records:
            ended = record.traffic
            tight, loose = slo_met(self.interactive, ended), slo_met(self.batch, ended)
            types = assign(typing, ended.prompt_tokens, ended.output_tokens)
            mixed = np.where(np.array(self.is_batch)[types], loose, tight)
            for name, good in (("interactive", tight), ("batch", loose), ("mixed", mixed)):
                met[name] += int(good.sum())
        return met


def total_utility(config: RewardConfig, record: WindowRecord) -> float:
    """Of all requests of a window; of those still open at its end at most what they come to."""
    ledger = ColumnLedger(config, record.trace, 0.0)
    ended = ledger.settle(record.traffic, record.end_s).total
    return (ended + ledger.open_worth(record.end_s)) * config.scale_requests


def total_latency_s(record: WindowRecord) -> float:
    """Of all requests of a window, with the age at its end of those still open then."""
    ended = record.traffic
    stayed_s = (ended.finish_s - ended.ended_arrival_s)[ended.finished]
    return float(stayed_s.sum() + _open_ages_s(record).sum())


@dataclass(frozen=True, slots=True)
class RunScore:
    """A rule over all windows. Latency counts every request that was not rejected, with its age at
    the end where it has not finished; attainment and utility count every arrival."""

    rule: str
    arrived: int
    latency_s: float  # mean
    latency_geometric_s: float  # exp of the mean ln: ratios of requests count alike, short or long
    latency_p50_s: float
    latency_p99_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    attainment: dict[str, float]
    utility: float  # J: mean worth of a request, from -1 to 1
    windows: list[dict[str, float]]  # utility (a sum), arrived and switches of each
    unfinished: int
    rejected: int
    device_hours: float
    switches: int
    switch_s: float
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        def short(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: short(v) for k, v in value.items()}
            if isinstance(value, list):
                return [short(v) for v in value]
            return round(value, 5) if isinstance(value, float) else value

        return {key: short(value) for key, value in asdict(self).items()}


def arrived_since(record: WindowRecord, since_s: float) -> WindowRecord:
    """The same without requests that arrived earlier."""
    first = int(np.searchsorted(record.trace.arrival_s, since_s))
    trace, ended = record.trace, record.traffic
    later = ended.index >= first
    kept = {
        name: values[later]
        for name, values in ended.to_dict().items()
        if not name.startswith("arrival")
    }
    kept["index"] = kept["index"] - first
    traffic = TrafficColumns(
        arrival_s=ended.arrival_s[first:],
        arrival_prompt_tokens=ended.arrival_prompt_tokens[first:],
        **kept,
    )
    late = Trace(
        trace.arrival_s[first:],
        trace.prompt_tokens[first:],
        trace.output_tokens[first:],
        trace.duration_s,
    )
    return replace(record, trace=late, traffic=traffic)


def _open_ages_s(record: WindowRecord) -> np.ndarray[Any, np.dtype[np.float64]]:
    is_open = np.ones(len(record.trace), np.bool_)
    is_open[record.traffic.index] = False
    return np.asarray(record.end_s - record.trace.arrival_s[is_open])


def score_run(
    rule: str,
    records: Sequence[WindowRecord],
    objectives: Objectives,
    typing: WorkloadTyping,
    detail: dict[str, Any] | None = None,
) -> RunScore:
    ended = TrafficColumns.join([r.traffic for r in records])
    done = ended.finished
    ages_s = np.concatenate([_open_ages_s(r) for r in records])
    latency_s = np.concatenate([(ended.finish_s - ended.ended_arrival_s)[done], ages_s])
    ttft_s = (ended.first_token_s - ended.ended_arrival_s)[done]
    several = done & (ended.output_tokens > 1)
    tpot_s = tpot_of(ended)[several]
    arrived = sum(len(r.trace) for r in records)
    met = objectives.attainment(records, typing)
    windows: list[dict[str, float]] = [
        {
            "utility": total_utility(objectives.reward, r),
            "arrived": len(r.trace),
            "switches": len(r.switches),
        }
        for r in records
    ]

    def percentile(values: Any, q: float) -> float:
        return float(np.percentile(values, q)) if len(values) else 0.0

    return RunScore(
        rule=rule,
        arrived=arrived,
        latency_s=float(latency_s.mean()),
        latency_geometric_s=float(np.exp(np.log(np.maximum(latency_s, 1e-6)).mean())),
        latency_p50_s=percentile(latency_s, 50),
        latency_p99_s=percentile(latency_s, 99),
        ttft_p99_s=percentile(ttft_s, 99),
        tpot_p99_s=percentile(tpot_s, 99),
        attainment={name: count / arrived for name, count in met.items()},
        utility=sum(w["utility"] for w in windows) / arrived,
        windows=windows,
        unfinished=len(ages_s),
        rejected=int((~done).sum()),
        device_hours=sum(r.device_s for r in records) / 3600.0,
        switches=sum(len(r.switches) for r in records),
        switch_s=sum(r.switch_s for r in records),
        detail=detail or {},
    )
