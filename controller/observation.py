"""Monitor state, forecast and candidates -> the arrays a policy sees.

Every feature is a logarithm, a share or a ratio of order one, so that no feature depends on the
unit or size of a cluster; unknowns have a flag of their own and are never NaN. Candidate features
that rules read by name: `log_latency` is ln seconds, `switch_s` is seconds (`policies.baselines`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from controller.monitor import SCALES, MonitorState
from controller.predictor import Forecast
from engine.cluster import Candidate, ClusterSnapshot, ClusterSpec, ModelSpec, ParallelConfig
from policies.base import Observation, ObservationSpec

OBSERVATION_VERSION = 1
DEGREES = (1, 2, 4, 8)  # tensor- and pipeline-parallel degrees; larger ones count as the last
MAX_RATIO = 10.0  # headrooms and latency ratios are cut here
MAX_LOG = 2.0 * math.log(MAX_RATIO)
MAX_SWITCH_S = 600.0
FEATURE_LIMIT = MAX_SWITCH_S  # no feature is larger in magnitude
LONG_AGO_S = 3600.0
LOG_LONG_AGO = math.log1p(LONG_AGO_S)

STATE_NAMES = (
    "outstanding",  # ln(1 + requests) / 5
    "outstanding_per_device",
    "waiting_share",  # of outstanding
    "log_waiting_tokens",
    "log_running_context",
    "waiting_tokens_per_kv",
    "kv_usage_mean",
    "kv_usage_max",
    "utilisation",  # 1 / headroom of keep at the median forecast
    "utilisation_q90",
    "log_latency",  # observed, ln(1 + s)
    "log_ttft",
    "log_tpot_ms",
    "latency_known",
    "since_switch",  # ln(1 + s) / ln(1 + 3600), cut at one hour
    "never_switched",
    "switch_in_flight",
    "stale",
    "log_observed_s",
    "dead_share",
    "log_grid_s",
)
TYPE_NAMES = (
    *(f"rate_scale{i}" for i in range(len(SCALES))),
    "forecast_mean",
    "forecast_q90",
    "forecast_error",
    "log_prompt_tokens",
    "log_output_tokens",
)
CANDIDATE_NAMES = (
    "is_keep",
    "is_optimum",
    "is_lowest_latency",
    "was_last",
    "headroom",  # cut at 10
    "log_headroom",
    "headroom_q90",
    "headroom_vs_keep",  # ln ratio
    "log_latency",
    "latency_vs_keep",  # ln ratio
    "switch_s",
    "log_switch_s",
    "switch_per_grid",
    "weight_bytes",  # share of the weights of every device in the pool
    "kv_capacity",  # ln ratio to the present
    "log_kv_tokens_per_length",  # ln(tokens / max_model_len)
    "devices_changed",  # share
    "num_replicas",  # share of devices
    "largest_replica",  # share of devices
    "devices_used",  # share
    *(f"tp{d}_share" for d in DEGREES),
    *(f"pp{d}_share" for d in DEGREES),
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What `build_observation` needs beside the candidates."""

    spec: ClusterSpec
    snapshot: ClusterSnapshot
    monitor: MonitorState
    forecast: Forecast
    since_switch_s: float  # inf when there was none


def observation_spec(num_types: int, max_candidates: int, grid_s: float) -> ObservationSpec:
    """Names and order of all features for J types and K candidate rows."""
    per_type = tuple(f"{name}.type{j}" for j in range(num_types) for name in TYPE_NAMES)
    return ObservationSpec(
        STATE_NAMES + per_type, CANDIDATE_NAMES, max_candidates, grid_s, OBSERVATION_VERSION
    )


def build_observation(
    spec: ObservationSpec,
    situation: Situation,
    candidates: Sequence[Candidate],
    mask_reasons: Sequence[str],
) -> Observation:
    """State and candidate rows as float32, unknowns as zero, everything within FEATURE_LIMIT; rows
    past the last candidate are zero and masked."""
    keep, num_state, width = candidates[0], len(spec.state_features), len(spec.candidate_features)
    features = _state(situation, keep, spec.grid_s)
    assert len(features) == num_state, (len(features), num_state)
    most_bytes = _pool_weight_bytes(situation.spec)
    for candidate in candidates:
        features += _candidate_row(situation, keep, candidate, spec.grid_s, most_bytes)
    both = np.zeros(num_state + spec.max_candidates * width, np.float32)
    both[: len(features)] = features
    if not math.isfinite(sum(features)):
        np.nan_to_num(both, copy=False, nan=0.0, posinf=MAX_RATIO, neginf=-MAX_RATIO)
    np.maximum(both, -FEATURE_LIMIT, out=both)
    np.minimum(both, FEATURE_LIMIT, out=both)
    state, rows = both[:num_state], both[num_state:].reshape(spec.max_candidates, width)
    legal = [not reason for reason in mask_reasons]
    mask = np.array(legal + [False] * (spec.max_candidates - len(legal)), np.bool_)
    return Observation(state, rows, mask, tuple([c.key for c in candidates]))


def _ln1(value: float) -> float:
    return math.log1p(value) if value > 0.0 else 0.0


def _state(situation: Situation, keep: Candidate, grid_s: float) -> list[float]:
    """In the order of STATE_NAMES, then TYPE_NAMES for each type."""
    spec, snapshot, monitor = situation.spec, situation.snapshot, situation.monitor
    known = monitor.num_finished_recent > 0.5
    since_s = min(situation.since_switch_s, LONG_AGO_S)
    kv_tokens = max(keep.kv_capacity_tokens, 1)
    values = [
        _ln1(monitor.num_outstanding) / 5.0,
        _ln1(monitor.num_outstanding / spec.num_devices),
        monitor.num_waiting / max(monitor.num_outstanding, monitor.num_waiting, 1),
        _ln1(monitor.waiting_prompt_tokens) / 10.0,
        _ln1(monitor.running_context_tokens) / 10.0,
        _ln1(monitor.waiting_prompt_tokens / kv_tokens),
        monitor.kv_usage_mean,
        monitor.kv_usage_max,
        1.0 / max(keep.headroom, 1.0 / MAX_RATIO),
        1.0 / max(keep.headroom_q90, 1.0 / MAX_RATIO),
        _ln1(monitor.latency_s),
        _ln1(monitor.ttft_s),
        _ln1(1e3 * monitor.tpot_s),
        float(known),
        _ln1(since_s) / LOG_LONG_AGO,
        float(math.isinf(situation.since_switch_s)),
        float(snapshot.switch_in_flight),
        float(monitor.is_stale),
        _ln1(min(monitor.observed_s, LONG_AGO_S)) / LOG_LONG_AGO,
        len(set(snapshot.dead_devices)) / spec.num_devices,
        _ln1(grid_s),
    ]
    expected = situation.forecast
    lengths = zip(monitor.prompt_tokens, monitor.output_tokens, strict=True)
    rates = zip(*monitor.rates, expected.mean, expected.q90, strict=True)
    for seen, error, (prompt, output) in zip(rates, expected.relative_error, lengths, strict=True):
        values += map(_ln1, seen)
        values += (
            min(error, MAX_RATIO),
            math.log(max(prompt, 1.0)) / 10.0,
            math.log(max(output, 1.0)) / 10.0,
        )
    return values


def _ratio(value: float, reference: float) -> float:
    """ln(value / reference), cut at +-MAX_LOG."""
    found = math.log(max(value, 1e-9) / max(reference, 1e-9))
    return -MAX_LOG if found < -MAX_LOG else found if found < MAX_LOG else MAX_LOG


@lru_cache(maxsize=16)
def _model_bytes(model: ModelSpec) -> int:
    return sum(math.prod(t.shape) for t in model.tensors) * model.dtype_bytes


def _pool_weight_bytes(spec: ClusterSpec) -> float:
    """Bytes of one full copy of the weights on every device: the most a switch could move."""
    return max(float(_model_bytes(spec.model)) * spec.num_devices, 1.0)


@lru_cache(maxsize=4096)
def _shape(configs: tuple[ParallelConfig, ...], num_devices: int) -> tuple[float, ...]:
    """num_replicas, largest_replica, devices_used; the share of the devices in replicas of each tp
    degree; that of each pp degree."""
    sizes = [c.num_devices for c in configs]
    shares = dict.fromkeys([("tp", d) for d in DEGREES] + [("pp", d) for d in DEGREES], 0.0)
    for parallel in configs:
        for axis, degree in (("tp", parallel.tp), ("pp", parallel.pp)):
            step = next((d for d in DEGREES if degree <= d), DEGREES[-1])
            shares[axis, step] += parallel.num_devices / num_devices
    used = (len(sizes), max(sizes, default=0), sum(sizes))
    return (*(number / num_devices for number in used), *shares.values())


def _candidate_row(
    situation: Situation, keep: Candidate, candidate: Candidate, grid_s: float, most_bytes: float
) -> list[float]:
    """In the order of CANDIDATE_NAMES; `most_bytes` is `_pool_weight_bytes`."""
    spec, origins = situation.spec, candidate.origin.split("+")
    devices = spec.num_devices
    switch_s = min(candidate.switch_s, MAX_SWITCH_S)
    return [
        float(candidate is keep),
        float("optimum" in origins),
        float("lowest_latency" in origins),
        float("undo" in origins),
        min(candidate.headroom, MAX_RATIO),
        _ratio(candidate.headroom, 1.0),
        min(candidate.headroom_q90, MAX_RATIO),
        _ratio(candidate.headroom, keep.headroom),
        math.log(max(candidate.latency_s, 1e-6)),
        _ratio(candidate.latency_s, keep.latency_s),
        switch_s,
        _ln1(switch_s),
        min(switch_s / grid_s, MAX_RATIO),
        candidate.weight_bytes / most_bytes,
        _ratio(candidate.kv_capacity_tokens, keep.kv_capacity_tokens),
        _ratio(candidate.kv_capacity_tokens, spec.model.max_model_len),
        candidate.num_devices_changed / devices,
        *_shape(candidate.configs, devices),
    ]
