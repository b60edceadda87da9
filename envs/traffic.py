"""What a policy is trained and judged on: traces cut, scaled and loaded to a stated share.

Load is relative: 0.7 means 0.7 of the rate that the best static deployment sustains, by the
planner's estimate, on the mean mix and lengths of the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controller.deployments import configs_of, enumerate_counts
from controller.library import Space, list_homogeneous
from controller.packing import nodes_of
from controller.planner import Planner
from controller.workload import assign, centres, fit_typing
from engine.cluster import WorkloadTyping, deployment_key, parse_deployment_key
from engine.errors import InvalidRequestError
from envs.reward import RewardConfig, Stretch
from envs.workload import Trace, WorkloadConfig, generate

DAY_S = 86_400.0
SAMPLE_S = 12 * 3600.0  # of generated traffic, for typing and capacity
MAX_ENUMERATED_DEVICES = 8
STRETCHED_LOAD, NUM_STRETCHES = 0.95, 20  # where the last of the tabulated loads is; how many
MAX_FITTED = 50_000  # requests that a typing is fitted on


@dataclass(frozen=True, slots=True)
class Shaping:
    """What is done to a source before it is loaded."""

    days: tuple[int, int] | None = None  # first and last day, counted from 1; None: all
    length_factor: float = 1.0  # multiplies prompt and output lengths


@dataclass(frozen=True, slots=True)
class Source:
    """Traffic before load is set: a shaped trace or, with `generator`, freshly drawn windows."""

    trace: Trace  # of a generator: a sample
    shaping: Shaping
    max_tokens: int
    generator: WorkloadConfig | None = None

    def window(self, start_s: float, duration_s: float) -> Trace:
        assert self.generator is None
        return self.trace.window(start_s, duration_s)


def cut_days(trace: Trace, days: tuple[int, int] | None) -> Trace:
    """Days [first, last] of a trace, 86400 s each, counted from 1. Raises InvalidRequestError."""
    if days is None:
        return trace
    first, last = days
    available = int(np.ceil(trace.duration_s / DAY_S))
    if not 1 <= first <= last <= available:
        raise InvalidRequestError(
            f"days {first}-{last} are not in the trace, which has {available}; give days between "
            f"1 and {available}, such as 1-{available}."
        )
    return trace.window((first - 1) * DAY_S, (last - first + 1) * DAY_S)


def shape_trace(trace: Trace, shaping: Shaping, max_tokens: int) -> Source:
    """Cut days, scale lengths to the model's context."""
    cut = cut_days(trace, shaping.days)
    if not len(cut):
        raise InvalidRequestError(f"days {shaping.days} of the trace have no requests.")
    scaled = cut.scale_lengths(shaping.length_factor, max_tokens)
    return Source(scaled, shaping, max_tokens)


def generator_source(
    config: WorkloadConfig, shaping: Shaping, max_tokens: int, rng: np.random.Generator
) -> Source:
    """The embedded generator; a sample of it stands for its mean mix."""
    sample = generate(config, SAMPLE_S, rng).scale_lengths(shaping.length_factor, max_tokens)
    return Source(sample, shaping, max_tokens, config)


def pool_traces(traces: Sequence[Trace]) -> Trace:
    """About as many requests of each of several traces, for typing and mean mix; when they arrive
    says nothing."""
    if len(traces) == 1:
        return traces[0]
    few = min(map(len, traces))
    chosen = [np.linspace(0, len(t) - 1, few).astype(np.int64) for t in traces]
    prompt = np.concatenate([t.prompt_tokens[i] for t, i in zip(traces, chosen, strict=True)])
    output = np.concatenate([t.output_tokens[i] for t, i in zip(traces, chosen, strict=True)])
    return Trace(np.arange(len(prompt), dtype=np.float64), prompt, output)


# --------------------------------------------------------------------------------------
# Load


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the best static deployment sustains on the mean mix of a trace."""

    key: str
    rate_per_s: float  # requests, at the utilisation that the planner allows
    shares: tuple[float, ...]  # of each workload type
    lengths: tuple[tuple[float, float], ...]  # mean prompt and output tokens of each type


def static_keys(planner: Planner) -> tuple[str, ...]:
    """Every deployment that leaves no usable device idle; in pools of more than
    MAX_ENUMERATED_DEVICES those of equal replicas."""
    devices = planner.cluster.spec.num_devices
    if devices > MAX_ENUMERATED_DEVICES:
        return homogeneous_keys(planner)
    sizes = [c.num_devices for c in planner.configs]
    found = (configs_of(counts, planner.configs) for counts in enumerate_counts(sizes, devices))
    return tuple(deployment_key(configs) for configs in found)


def fit_trace_typing(trace: Trace, k: int, seed: int) -> WorkloadTyping:
    """`controller.workload.fit_typing` on at most about MAX_FITTED requests, evenly spaced."""
    step = max(1, len(trace) // MAX_FITTED)
    return fit_typing(trace.prompt_tokens[::step], trace.output_tokens[::step], k, seed)


def mean_mix(
    trace: Trace, typing: WorkloadTyping
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares [J] and mean lengths [J, 2] of the types; a type never seen has its centre's."""
    types = assign(typing, trace.prompt_tokens, trace.output_tokens)
    number = np.bincount(types, minlength=len(typing.types))
    sums = [
        np.bincount(types, weights=tokens, minlength=len(number))
        for tokens in (trace.prompt_tokens, trace.output_tokens)
    ]
    means = np.stack(sums, axis=-1) / np.maximum(number, 1)[:, None]
    return number / len(trace), np.where(number[:, None] > 0, means, centres(typing))


def measure_capacity(planner: Planner, trace: Trace, typing: WorkloadTyping) -> Capacity:
    """The deployment with the most headroom on the trace's mean mix, and its rate."""
    shares, lengths = mean_mix(trace, typing)
    best = (0.0, "")
    for key in static_keys(planner):
        estimate = planner.estimate(parse_deployment_key(key), shares, lengths)
        best = max(best, (estimate.headroom, key))
    rate_per_s, key = best
    if rate_per_s <= 0:
        raise InvalidRequestError(
            "no static deployment can serve the trace's mean mix; scale its lengths down."
        )
    rows = ((float(prompt), float(output)) for prompt, output in lengths)
    return Capacity(key, rate_per_s, tuple(shares.tolist()), tuple(rows))


def measure_stretch(planner: Planner, capacity: Capacity, lone: RewardConfig) -> Stretch:
    """By arriving work the least estimated latency of equal replicas over that of an idle pool, on
    the mean mix, up to STRETCHED_LOAD of the capacity; `lone` has the references."""
    shares, lengths = np.array(capacity.shares), np.array(capacity.lengths)
    keys = homogeneous_keys(planner)

    def least_s(load: float) -> float:
        rates = shares * capacity.rate_per_s * max(load, 1e-6)
        estimates = (planner.estimate(parse_deployment_key(key), rates, lengths) for key in keys)
        return min(found.latency_s for found in estimates)

    loads = np.linspace(0.0, STRETCHED_LOAD, NUM_STRETCHES).tolist()
    latencies_s = np.maximum.accumulate([least_s(load) for load in loads])
    work_s = sum(
        share * lone.reference_s(prompt, output)
        for share, (prompt, output) in zip(capacity.shares, capacity.lengths, strict=True)
    )
    arriving = [load * capacity.rate_per_s * work_s for load in loads]
    return Stretch(tuple(arriving), tuple((latencies_s / latencies_s[0]).tolist()))


def homogeneous_keys(planner: Planner) -> tuple[str, ...]:
    """Equal replicas of every configuration, as many as there is room for in the whole pool."""
    spec = planner.cluster.spec
    counts = list_homogeneous(planner.configs, Space(nodes_of(spec), spec.num_devices))
    return tuple(deployment_key(configs_of(row, planner.configs)) for row in counts)


def fastest_key(planner: Planner, capacity: Capacity, load: float) -> str:
    """The deployment of least estimated latency among those with headroom at that mean load."""
    rates = np.array(capacity.shares) * capacity.rate_per_s * load
    lengths = np.array(capacity.lengths)

    def cost(key: str) -> tuple[bool, float]:
        estimate = planner.estimate(parse_deployment_key(key), rates, lengths)
        return estimate.headroom < 1.0, estimate.latency_s

    return min(static_keys(planner), key=cost)


def load_window(
    window: Trace, mean_rate_per_s: float, rate_per_s: float, rng: np.random.Generator
) -> Trace:
    """A window resampled so that a source with a mean of `mean_rate_per_s` gets `rate_per_s`."""
    if not len(window):
        return window
    return window.resample(rate_per_s * window.mean_rate_per_s / mean_rate_per_s, rng)


def draw_window(
    source: Source, rate_per_s: float, duration_s: float, rng: np.random.Generator
) -> Trace:
    """A window for training: its start drawn uniformly, or generated afresh."""
    if source.generator is not None:
        config = replace(source.generator, mean_rate_per_s=rate_per_s)
        drawn = generate(config, duration_s, rng)
        return drawn.scale_lengths(source.shaping.length_factor, source.max_tokens)
    latest_s = max(source.trace.duration_s - duration_s, 0.0)
    window = source.window(float(rng.uniform(0.0, latest_s)), duration_s)
    return load_window(window, source.trace.mean_rate_per_s, rate_per_s, rng)


def spaced_windows(trace: Trace, number: int, duration_s: float) -> list[Trace]:
    """Windows in the middle of `number` equal parts; no longer than the parts are."""
    part_s = trace.duration_s / number
    duration_s = min(duration_s, part_s)
    starts = [(i + 0.5) * part_s - duration_s / 2 for i in range(number)]
    return [trace.window(start_s, duration_s) for start_s in starts]


def evaluation_windows(
    source: Source, rate_per_s: float, number: int, duration_s: float, seeds: Sequence[int]
) -> tuple[Trace, ...]:
    """Windows in the middle of `number` equal parts of the source, resampled once per seed so that
    their mean rate together is `rate_per_s`; of a generator, `number` fresh ones per seed.

    Raises InvalidRequestError when a window is longer than its part, or all are empty.
    """
    streams = [np.random.default_rng((seed, i)) for seed in seeds for i in range(number)]
    if source.generator is not None:
        return tuple(draw_window(source, rate_per_s, duration_s, rng) for rng in streams)
    part_s = source.trace.duration_s / number
    if duration_s > part_s * (1 + 1e-9):
        raise InvalidRequestError(
            f"{number} windows of {duration_s:g} s do not fit {source.trace.duration_s:g} s of "
            "trace; take fewer, shorter or more days."
        )
    windows = spaced_windows(source.trace, number, duration_s)
    mean_rate_per_s = sum(map(len, windows)) / (number * duration_s)
    if not mean_rate_per_s:
        raise InvalidRequestError("no request arrives in any of the windows; choose other days.")
    return tuple(
        load_window(window, mean_rate_per_s, rate_per_s, rng)
        for window, rng in zip(windows * len(seeds), streams, strict=True)
    )
