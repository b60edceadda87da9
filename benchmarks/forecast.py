"""Forecasts of requests per minute and type, against baselines and OServe's predictor.

A trace is counted per minute and type: k-means, k = 4, fitted on the first 70 % of the trace. The
learners are trained on those, and everything is scored on the rest, a minute ahead unless said
otherwise. Figures:

- RRMSE: the root mean squared error over the root mean square of the actual counts, per type;
- its ratio to the better of the two naive forecasts, the last value and that of a day ago;
- coverage of q90: share of minutes whose count is at most the 0.9 quantile that was forecast;
- ms: to take in an interval and forecast all horizons.

`oserve_lstm` is the predictor of OServe (arXiv 2602.12151) as far as it is told: an LSTM per type
that reads the last 50 minutes. Its two ablations are `moving_average`, over as many, and
`untyped_lstm`, one LSTM of all requests times the mean share of each type. `pooled_lstm` is ours.
`floor` is sqrt(mean) over the root mean square: what remains of the RRMSE for one who knows every
minute's rate, if arrivals are Poisson. Without --trace a generated trace is used.

Beside it, what arrivals are counted by: the log loss of P(type | prompt length) and of
P(type | prompt length, class, client), on generated clients of two classes, or on --services.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from forecasting.arriving import LogLoss, generated, log_loss
from rich.console import Console
from rich.table import Table

from controller.forecast_errors import Drift, Floats
from controller.lstm_predictor import WINDOW, LstmPredictor
from controller.predictor import (
    EwmaPredictor,
    MovingAveragePredictor,
    NaivePredictor,
    Predictor,
    SeasonalNaivePredictor,
    TrackedPredictor,
)
from controller.workload import fit_typing
from envs.lstm_training import TrainingConfig, train_per_type, train_pooled, type_counts
from envs.traces import load_trace
from envs.workload import Trace, WorkloadConfig, generate

INTERVAL_S, DAY, DAY_S = 60.0, 1440, 86_400.0  # seconds, intervals, seconds
HORIZONS = (1, 5, 15)
NUM_TYPES, TRAINING_SHARE, MAX_FITTED = 4, 0.7, 50_000
LEAST_TRAINING = 200  # intervals
GENERATED_CLIENTS_S = 2 * DAY_S
NAIVE = ("last_value", "seasonal_naive")
GENERATED = WorkloadConfig(mean_rate_per_s=0.6, cycle_s=DAY_S, regime_s=3_600.0)
Build = Callable[[Floats], Predictor]  # from the training counts[T, J]


@dataclass
class Score:
    """Of one forecaster on one trace; arrays over the types."""

    rrmse: dict[int, Floats]  # by horizon
    coverage: Floats
    ms: Floats  # of every interval
    drifting: float  # share of the minutes
    training_s: float


@dataclass
class Scored:
    """One trace."""

    name: str
    intervals: int
    floor: Floats
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def better_naive(self) -> Floats:
        return np.minimum(*(self.scores[name].rrmse[1] for name in NAIVE))


class UntypedPredictor(TrackedPredictor):
    """An LSTM of the sum over all types, shared out by their mean shares."""

    def __init__(self, total: LstmPredictor, shares: Floats) -> None:
        super().__init__(len(shares), INTERVAL_S, HORIZONS)
        self.name = "untyped_lstm"
        self._total, self._shares = total, shares

    def _forget(self) -> None:
        self._total.reset()

    def _learn(self, actual: Floats) -> None:
        self._total.observe(np.array([actual.sum()]))

    def _mean(self, ahead: int) -> Floats:
        return self._total.forecast(ahead).mean[0] * self._shares


def counts_per_type(trace: Trace) -> tuple[Floats, int]:
    """counts[T, J] of whole minutes, and how many of them are for training."""
    intervals = int(trace.duration_s // INTERVAL_S)
    split = int(TRAINING_SHARE * intervals)
    stop = int(np.searchsorted(trace.arrival_s, split * INTERVAL_S))
    step = max(1, stop // MAX_FITTED)
    typing = fit_typing(
        trace.prompt_tokens[:stop:step], trace.output_tokens[:stop:step], NUM_TYPES, seed=0
    )
    return type_counts(trace, typing, INTERVAL_S), split


def builders(steps: int) -> dict[str, Build]:
    config = TrainingConfig(steps=steps)

    def per_type(counts: Floats) -> Predictor:
        model = train_per_type(counts, INTERVAL_S, HORIZONS, config)
        return LstmPredictor(model, NUM_TYPES, INTERVAL_S)

    def pooled(counts: Floats) -> Predictor:
        model = train_pooled(counts, INTERVAL_S, HORIZONS, config)
        return LstmPredictor(model, NUM_TYPES, INTERVAL_S)

    def untyped(counts: Floats) -> Predictor:
        model = train_per_type(counts.sum(axis=1)[:, None], INTERVAL_S, HORIZONS, config)
        shares = counts.sum(axis=0) / max(counts.sum(), 1.0)
        return UntypedPredictor(LstmPredictor(model, 1, INTERVAL_S), shares)

    return {
        "last_value": lambda counts: NaivePredictor(NUM_TYPES, INTERVAL_S, HORIZONS),
        "seasonal_naive": lambda counts: SeasonalNaivePredictor(
            NUM_TYPES, DAY, INTERVAL_S, HORIZONS
        ),
        "moving_average": lambda counts: MovingAveragePredictor(
            NUM_TYPES, WINDOW, INTERVAL_S, HORIZONS
        ),
        "ewma4": lambda counts: EwmaPredictor(NUM_TYPES, 4.0, INTERVAL_S, HORIZONS),
        "untyped_lstm": untyped,
        "oserve_lstm": per_type,
        "pooled_lstm": pooled,
    }


def evaluate(predictor: Predictor, counts: Floats, split: int, training_s: float) -> Score:
    """Runs over a day before the test part, to warm up, and over the test part."""
    start, stop = max(0, split - DAY - WINDOW), len(counts)
    means = {ahead: np.full(counts.shape, np.nan) for ahead in HORIZONS}
    q90 = np.full(counts.shape, np.nan)
    took_ms, drifting = [], []
    for t in range(start, stop):
        begin_s = time.perf_counter()
        predictor.observe(counts[t] / INTERVAL_S)
        found = {ahead: predictor.forecast(ahead) for ahead in HORIZONS}
        took_ms.append(1e3 * (time.perf_counter() - begin_s))
        drifting.append(found[1].drift is Drift.DRIFTING)
        for ahead, forecast in found.items():
            if t + ahead < stop:
                means[ahead][t + ahead] = np.array(forecast.mean) * INTERVAL_S
        if t + 1 < stop:
            q90[t + 1] = np.array(found[1].q90) * INTERVAL_S
    actual = counts[split:]
    size = np.sqrt(np.mean(actual**2, axis=0))
    rrmse = {
        ahead: np.sqrt(np.mean((mean[split:] - actual) ** 2, axis=0)) / size
        for ahead, mean in means.items()
    }
    coverage = np.mean(actual <= q90[split:] + 1e-9, axis=0)
    tested = slice(split - start, None)
    return Score(
        rrmse, coverage, np.array(took_ms[tested]), float(np.mean(drifting[tested])), training_s
    )


def score(name: str, trace: Trace, builds: dict[str, Build]) -> Scored | None:
    counts, split = counts_per_type(trace)
    if split < LEAST_TRAINING:
        print(
            f"{name}: {split} minutes of training are too few (at least {LEAST_TRAINING}); left out"
        )
        return None
    actual = counts[split:]
    floor = np.sqrt(actual.mean(axis=0) / np.mean(actual**2, axis=0))
    found = Scored(name, len(counts), floor)
    for key, build in builds.items():
        begin_s = time.perf_counter()
        predictor = build(counts[:split])
        training_s = time.perf_counter() - begin_s
        found.scores[key] = evaluate(predictor, counts, split, training_s)
    return found


def show(found: Scored, console: Console) -> None:
    types = [f"type{j}" for j in range(NUM_TYPES)]
    ahead = [f"{h} min" for h in HORIZONS[1:]]
    table = Table(
        "forecaster", *types, *ahead, "ratio", "cover q90", "drifting", "ms p50", "ms p99",
        "trained s", title=f"{found.name}: RRMSE per type of {found.intervals} minutes",
    )  # fmt: skip
    for key, s in found.scores.items():
        later = [f"{np.median(s.rrmse[h]):.3f}" for h in HORIZONS[1:]]
        table.add_row(
            key, *(f"{r:.3f}" for r in s.rrmse[1]), *later,
            f"{np.median(s.rrmse[1] / found.better_naive):.3f}",
            " ".join(f"{c:.2f}" for c in s.coverage), f"{s.drifting:.3f}",
            f"{np.median(s.ms):.2f}", f"{np.percentile(s.ms, 99):.2f}", f"{s.training_s:.1f}",
        )  # fmt: skip
    table.add_row("floor", *(f"{r:.3f}" for r in found.floor))
    console.print(table)


def summarise(everything: Sequence[Scored], loss: LogLoss) -> dict[str, object]:
    """Medians over types and traces; milliseconds of the slowest forecaster."""
    names = list(everything[0].scores)

    def median(name: str, values: Callable[[Scored, Score], Floats]) -> float:
        return float(np.median(np.concatenate([values(s, s.scores[name]) for s in everything])))

    rrmse = {name: median(name, lambda _, s: s.rrmse[1]) for name in names}
    ratio = {name: median(name, lambda t, s: s.rrmse[1] / t.better_naive) for name in names}
    cover = {name: median(name, lambda _, s: s.coverage) for name in names}
    ms = {n: np.percentile(np.concatenate([t.scores[n].ms for t in everything]), 99) for n in names}
    best = min(names, key=lambda name: rrmse[name])
    floor = float(np.median(np.concatenate([t.floor for t in everything])))
    return {
        "benchmark": "forecast",
        "best_model": best,
        "rrmse_best_median": round(rrmse[best], 4),
        "rrmse_ratio_vs_seasonal_naive_median": round(ratio[best], 4),
        "coverage_q90_median": round(cover[best], 4),
        "forecast_ms_p99": round(float(max(ms.values())), 3),
        "rrmse_floor_median": round(floor, 4),
        "posterior_log_loss_prompt": round(loss.prompt, 4),
        "posterior_log_loss_full": round(loss.full, 4),
        "models": {
            name: {
                "rrmse_median": round(rrmse[name], 4),
                "ratio_median": round(ratio[name], 4),
                "coverage_q90_median": round(cover[name], 4),
                "forecast_ms_p99": round(float(ms[name]), 3),
            }
            for name in names
        },
        "traces": [t.name for t in everything],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="trace files")
    parser.add_argument(
        "--quick", action="store_true", help="less training; 4 generated days, not 10"
    )
    parser.add_argument(
        "--services",
        type=Path,
        nargs="+",
        default=[],
        help="traces whose requests share a pool, each a class of its own, for the log loss",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    builds = builders(steps=200 if args.quick else 800)
    console, everything = Console(width=150), []
    days = 4 if args.quick else 10
    for path in args.trace or [None]:
        if path is None:
            name = f"generated, {days} days"
            trace = generate(GENERATED, days * DAY_S, np.random.default_rng(0))
        else:
            name, trace = path.name.split(".")[0], load_trace(path)
        found = score(name, trace, builds)
        if found is not None:
            show(found, console)
            everything.append(found)
    if not everything:
        parser.error("no trace is long enough")
    services = {(path.name.split(".")[0], ""): load_trace(path) for path in args.services}
    arriving = services or generated(GENERATED, GENERATED_CLIENTS_S, seed=0)
    loss = log_loss(arriving, NUM_TYPES, TRAINING_SHARE, MAX_FITTED)
    print(
        f"type of {loss.requests} requests as they arrive: log loss {loss.prompt:.4f} by prompt "
        f"length, {loss.full:.4f} by class and client too"
    )
    print(json.dumps(summarise(everything, loss)))


if __name__ == "__main__":
    main()
