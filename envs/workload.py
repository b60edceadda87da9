"""Traces of requests in memory, their statistics, and the seeded generator (the default). Pure.

`python -m envs.workload` prints the statistics of the generator's traces.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Request
from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
AnyFloats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
RATE_STEP_S = 1.0  # rates are constant over a step
WINDOW_S = 60.0  # of resampling


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests by arrival time: arrival_s [N] seconds from the start, lengths [N] in tokens.

    `duration_s` is the span that the trace describes, the last arrival unless given; `num_failed`
    the requests of its file that failed at the source and are left out.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    duration_s: float = -1.0
    num_failed: int = 0

    def __post_init__(self) -> None:
        assert len(self.arrival_s) == len(self.prompt_tokens) == len(self.output_tokens)
        if self.duration_s < 0:
            last_s = float(self.arrival_s[-1]) if len(self) else 0.0
            object.__setattr__(self, "duration_s", last_s)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def mean_rate_per_s(self) -> float:
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    def window(self, start_s: float, duration_s: float) -> Trace:
        """Arrivals in [start_s, start_s + duration_s), with times counted from `start_s`."""
        first, last = np.searchsorted(self.arrival_s, (start_s, start_s + duration_s))
        chosen = slice(int(first), int(last))
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[chosen] - start_s,
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            duration_s=duration_s,
        )

    def scale_lengths(self, factor: float, max_tokens: int) -> Trace:
        """Lengths times `factor`, rounded, at least 1; a pair above `max_tokens` shrinks in
        proportion until it fits. Raises InvalidRequestError."""
        if max_tokens < 2 or factor <= 0:
            raise InvalidRequestError(
                f"lengths need a positive factor and at least 2 tokens per request, got "
                f"factor={factor}, max_tokens={max_tokens}; raise them."
            )
        prompt, output = fit_lengths(
            self.prompt_tokens * float(factor), self.output_tokens * float(factor), max_tokens
        )
        return dataclasses.replace(self, prompt_tokens=prompt, output_tokens=output)

    def resample(
        self, target_rate_per_s: float, rng: np.random.Generator, window_s: float = WINDOW_S
    ) -> Trace:
        """As many requests as `target_rate_per_s` means; time is never compressed.

        With r the ratio of the rates, in every window of `window_s`: below 1 each request is kept
        with probability r, at its time; above 1 all are kept, and (r - 1) times as many are drawn
        from them with replacement, at times drawn uniformly in the window. So rates and mix move
        as in the source, and bursts shorter than a window keep their height only when thinned.
        """
        if not len(self) or target_rate_per_s <= 0 or window_s <= 0:
            raise InvalidRequestError(
                f"a trace of {len(self)} requests cannot be resampled to {target_rate_per_s} "
                f"requests/s in windows of {window_s} s; give a trace with requests, a positive "
                "rate and a positive window."
            )
        ratio = target_rate_per_s / self.mean_rate_per_s
        everything = np.arange(len(self))
        if ratio <= 1:
            index = everything[rng.random(len(self)) < ratio]
            arrival_s = self.arrival_s[index]
        else:
            drawn, drawn_s = self._draw_again(ratio - 1, window_s, rng)
            index = np.concatenate([everything, drawn])
            arrival_s = np.concatenate([self.arrival_s, drawn_s])
        order = np.argsort(arrival_s, kind="stable")
        chosen = index[order]
        return Trace(
            arrival_s[order],
            self.prompt_tokens[chosen],
            self.output_tokens[chosen],
            self.duration_s,
        )

    def _draw_again(
        self, ratio: float, window_s: float, rng: np.random.Generator
    ) -> tuple[Ints, Floats]:
        """`ratio` times the requests of each window, rounded by chance: indices and times."""
        starts_s = np.arange(0.0, max(self.duration_s, window_s / 2), window_s)
        firsts = np.searchsorted(self.arrival_s, starts_s)
        numbers = np.diff(firsts, append=len(self))
        wanted = np.floor(ratio * numbers + rng.random(len(numbers))).astype(np.int64)
        wanted[numbers == 0] = 0
        window = np.repeat(np.arange(len(wanted)), wanted)
        drawn = firsts[window] + np.floor(rng.random(len(window)) * numbers[window])
        stops_s = np.minimum(starts_s + window_s, self.duration_s)
        drawn_s = starts_s[window] + rng.random(len(window)) * (stops_s - starts_s)[window]
        return drawn.astype(np.int64), drawn_s

    def repeat(self, factors: Floats, rng: np.random.Generator, within_s: float) -> Trace:
        """Each request `factors` [N] times in the mean, rounded by chance: not at all, or once as
        it is and again up to `within_s` later."""
        times = np.floor(factors + rng.random(len(self))).astype(np.int64)
        chosen = np.repeat(np.arange(len(self)), times)
        arrival_s = self.arrival_s[chosen]
        again = np.diff(chosen, prepend=-1) == 0
        arrival_s[again] += rng.uniform(0.0, within_s, int(again.sum()))
        arrival_s = np.minimum(arrival_s, self.duration_s)
        order = np.argsort(arrival_s, kind="stable")
        chosen = chosen[order]
        prompt, output = self.prompt_tokens[chosen], self.output_tokens[chosen]
        return Trace(arrival_s[order], prompt, output, self.duration_s)

    def requests(self, prefix: str = "r") -> list[Request]:
        """The requests, with ids `prefix`0, `prefix`1, ..."""
        rows = zip(
            self.arrival_s.tolist(),
            self.prompt_tokens.tolist(),
            self.output_tokens.tolist(),
            strict=True,
        )
        return [Request(f"{prefix}{i}", *row) for i, row in enumerate(rows)]


def fit_lengths(prompt: AnyFloats, output: AnyFloats, max_tokens: int) -> tuple[Ints, Ints]:
    """Whole lengths of at least 1 with prompt + output <= max_tokens, in proportion."""
    prompt, output = np.maximum(np.rint(prompt), 1), np.maximum(np.rint(output), 1)
    total = prompt + output
    shrunk = np.clip(np.floor(prompt * max_tokens / total), 1, max_tokens - 1)
    prompt = np.where(total > max_tokens, shrunk, prompt)
    output = np.minimum(output, max_tokens - prompt)
    return prompt.astype(np.int64), output.astype(np.int64)


# --------------------------------------------------------------------------------------
# The generator


@dataclass(frozen=True, slots=True)
class RequestType:
    """Lognormal lengths: medians in tokens, spreads of the natural logarithm."""

    name: str
    prompt_tokens: float
    output_tokens: float
    prompt_sigma: float = 0.5
    output_sigma: float = 0.6


DEFAULT_TYPES = (
    RequestType("chat", 90, 320),
    RequestType("extract", 400, 20),
    RequestType("code", 1000, 70),
    RequestType("summary", 1500, 190),
)


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """Rates that move: a daily cycle, regimes of the mix and of the level, bursts, and blackouts
    in which one type sends nothing."""

    types: tuple[RequestType, ...] = DEFAULT_TYPES
    mean_rate_per_s: float = 8.0
    cycle_s: float = 3600.0  # one "day"
    cycle_amplitude: float = 0.4  # of the mean rate
    regime_s: float = 600.0  # mean stay in one regime (exponential)
    mix_concentration: float = 0.8  # Dirichlet parameter of the shares; small = one type rules
    level_sigma: float = 0.25  # spread of ln(rate level) between regimes
    burst_gap_s: float = 900.0  # mean time between bursts
    burst_s: float = 20.0  # mean length
    burst_factor: float = 2.5  # times the rate
    blackout_gap_s: float = 0.0  # mean time between blackouts of a type; 0: none
    blackout_s: float = 120.0  # mean length
    max_tokens: int = 8192  # prompt + output


def _spans(duration_s: float, mean_s: float, rng: np.random.Generator) -> Floats:
    """Starts of exponential stays that cover [0, duration_s); the first is 0."""
    starts = [0.0]
    while starts[-1] < duration_s:
        starts.append(starts[-1] + rng.exponential(mean_s))
    return np.array(starts[:-1])


def _burst_factor(config: WorkloadConfig, time_s: Floats, rng: np.random.Generator) -> Floats:
    factor = np.ones(len(time_s))
    horizon_s = float(time_s[-1]) + RATE_STEP_S
    for start_s in _spans(horizon_s, config.burst_gap_s, rng)[1:]:
        stop_s = start_s + rng.exponential(config.burst_s)
        factor[(time_s >= start_s) & (time_s < stop_s)] = config.burst_factor
    return factor


def _rates(
    config: WorkloadConfig, duration_s: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Rate [T] per second and shares [T, types] at each step; the cycle's phase is drawn."""
    time_s = np.arange(0.0, duration_s, RATE_STEP_S)
    starts = _spans(duration_s, config.regime_s, rng)
    regime = np.searchsorted(starts, time_s, side="right") - 1
    shares = rng.dirichlet([config.mix_concentration] * len(config.types), len(starts))
    level = np.exp(config.level_sigma * rng.standard_normal(len(starts)))
    phase = rng.uniform(0, 2 * np.pi)
    cycle = 1 + config.cycle_amplitude * np.sin(2 * np.pi * time_s / config.cycle_s + phase)
    rate = config.mean_rate_per_s * cycle * level[regime] * _burst_factor(config, time_s, rng)
    sending = shares[regime] * _senders(config, time_s, rng)
    left = sending.sum(axis=1)
    return rate * left, sending / np.maximum(left, 1e-12)[:, None]


def _senders(config: WorkloadConfig, time_s: Floats, rng: np.random.Generator) -> Floats:
    """[T, types] 0 where a type is blacked out, else 1; one type at a time, drawn uniformly."""
    senders = np.ones((len(time_s), len(config.types)))
    if config.blackout_gap_s > 0:
        horizon_s = float(time_s[-1]) + RATE_STEP_S
        start_s = rng.exponential(config.blackout_gap_s)
        while start_s < horizon_s:
            stop_s = start_s + rng.exponential(config.blackout_s)
            silent = int(rng.integers(len(config.types)))
            senders[(time_s >= start_s) & (time_s < stop_s), silent] = 0.0
            start_s = stop_s + rng.exponential(config.blackout_gap_s)
    return senders


def gusts(config: WorkloadConfig, trace: Trace, rng: np.random.Generator) -> Trace:
    """The trace with the levels and bursts of `config` on top of its own; its mix and lengths
    stay as they are."""
    if not len(trace):
        return trace
    time_s = np.arange(0.0, max(trace.duration_s, RATE_STEP_S), RATE_STEP_S)
    starts = _spans(float(time_s[-1]) + RATE_STEP_S, config.regime_s, rng)
    level = np.exp(config.level_sigma * rng.standard_normal(len(starts)))
    regime = np.searchsorted(starts, time_s, side="right") - 1
    factor = level[regime] * _burst_factor(config, time_s, rng)
    step = np.minimum((trace.arrival_s / RATE_STEP_S).astype(np.int64), len(factor) - 1)
    return trace.repeat(factor[step], rng, RATE_STEP_S)


def generate(config: WorkloadConfig, duration_s: float, rng: np.random.Generator) -> Trace:
    """A trace of `duration_s` seconds: Poisson arrivals at the moving rates."""
    rate, shares = _rates(config, duration_s, rng)
    step = np.repeat(np.arange(len(rate)), rng.poisson(rate * RATE_STEP_S))
    arrival_s = np.minimum((step + rng.random(len(step))) * RATE_STEP_S, duration_s)
    order = np.argsort(arrival_s, kind="stable")
    draw = rng.random((len(step), 1))
    kind = np.minimum((draw > shares.cumsum(1)[step]).sum(1), len(config.types) - 1)
    medians = np.array([(t.prompt_tokens, t.output_tokens) for t in config.types])
    sigmas = np.array([(t.prompt_sigma, t.output_sigma) for t in config.types])
    noise = rng.standard_normal((len(step), 2))
    lengths = medians[kind] * np.exp(sigmas[kind] * noise)
    prompt, output = fit_lengths(lengths[:, 0], lengths[:, 1], config.max_tokens)
    return Trace(arrival_s[order], prompt[order], output[order], duration_s)


# --------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """Percentiles are (p50, p90, p99)."""

    num_requests: int
    duration_s: float
    prompt_tokens: tuple[float, float, float]
    output_tokens: tuple[float, float, float]
    mean_per_min: float
    peak_per_min: float
    idc_60s: float  # variance / mean of requests per minute; 1 = Poisson
    iat_cv: float  # coefficient of variation of inter-arrival times; 1 = Poisson


def _percentiles(lengths: Ints) -> tuple[float, float, float]:
    p50, p90, p99 = (float(v) for v in np.percentile(lengths, (50, 90, 99)))
    return p50, p90, p99


def statistics(trace: Trace) -> TraceStatistics:
    """Raises InvalidRequestError for a trace of fewer than 3 requests."""
    if len(trace) < 3:
        raise InvalidRequestError(
            f"statistics need at least 3 requests, the trace has {len(trace)}; widen the window."
        )
    minutes = max(int(trace.duration_s // 60), 1)
    per_min = np.bincount((trace.arrival_s // 60).astype(np.int64), minlength=minutes)[:minutes]
    gaps_s = np.diff(trace.arrival_s)
    return TraceStatistics(
        num_requests=len(trace),
        duration_s=trace.duration_s,
        prompt_tokens=_percentiles(trace.prompt_tokens),
        output_tokens=_percentiles(trace.output_tokens),
        mean_per_min=60 * trace.mean_rate_per_s,
        peak_per_min=float(per_min.max()),
        idc_60s=float(per_min.var() / per_min.mean()) if per_min.any() else 0.0,
        iat_cv=float(gaps_s.std() / gaps_s.mean()) if gaps_s.any() else 0.0,
    )


def _row(name: str, s: TraceStatistics) -> str:
    def triple(values: tuple[float, float, float]) -> str:
        return "/".join(f"{v:.0f}" for v in values)

    return (
        f"{name:>8} {s.num_requests:>9} {triple(s.prompt_tokens):>16} "
        f"{triple(s.output_tokens):>14} {s.mean_per_min:>9.1f} {s.peak_per_min:>9.0f} "
        f"{s.idc_60s:>7.1f} {s.iat_cv:>7.2f}"
    )


def main() -> None:
    """Print the statistics of generated traces, one line per seed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--duration-s", type=float, default=86_400.0, help="seconds per trace")
    parser.add_argument("--seeds", type=int, default=5, help="number of traces, seeds 0, 1, ...")
    args = parser.parse_args()
    print(
        f"{'seed':>8} {'requests':>9} {'prompt 50/90/99':>16} {'output':>14} {'mean/min':>9} "
        f"{'peak/min':>9} {'IDC 60s':>7} {'IAT CV':>7}"
    )
    for seed in range(args.seeds):
        trace = generate(WorkloadConfig(), args.duration_s, np.random.default_rng(seed))
        print(_row(str(seed), statistics(trace)))


if __name__ == "__main__":
    main()
