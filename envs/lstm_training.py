"""Trains the LSTM forecasters of `controller.lstm_predictor` on counts per interval, in torch.

`python -m envs.lstm_training --trace FILE --out FILE` writes what `predictor: lstm:FILE` reads.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from controller.forecast_errors import Floats
from controller.lstm_files import save_lstm
from controller.lstm_predictor import (
    OUTPUTS,
    WINDOW,
    Encoder,
    LstmModel,
    LstmWeights,
    PoissonLevels,
    StandardCounts,
    Weights,
)
from controller.workload import assign, fit_typing
from engine.cluster import WorkloadTyping
from engine.errors import InvalidRequestError
from envs.traces import load_trace
from envs.workload import Trace

WARM_UP = 10  # intervals of a window whose forecasts are not scored
LEVELS = (0.5, 0.9)  # of the quantiles
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Of one LSTM. The series are cut into windows anew when all have been used."""

    hidden: int = 24
    steps: int = 800  # of the gradient
    batch: int = 32  # windows in each
    learning_rate: float = 5e-3  # at the start; falls to zero as a cosine
    seed: int = 0


def type_counts(trace: Trace, typing: WorkloadTyping, interval_s: float) -> Floats:
    """[T, J] requests of each type in each whole interval."""
    intervals, types = int(trace.duration_s // interval_s), len(typing.types)
    interval = (trace.arrival_s // interval_s).astype(np.int64)
    inside = interval < intervals
    kind = assign(typing, trace.prompt_tokens[inside], trace.output_tokens[inside])
    counts = np.bincount(interval[inside] * types + kind, minlength=intervals * types)
    return counts.reshape(intervals, types).astype(np.float64)


class Series(NamedTuple):
    """S series of T intervals.

    features: [S, T, F]; targets: [S, T, H] in units above the base, NaN where unknown;
    weight: [S, T] of a squared error, which makes it relative to the counts of its series.
    """

    features: Tensor
    targets: Tensor
    weight: Tensor


def encode(encoder: Encoder, counts: Floats, horizons: Sequence[int]) -> Series:
    """The series of counts[T, J], one per type."""
    encoder.reset()
    steps = [encoder.step(row) for row in counts]
    base, unit = (np.array([s[i] for s in steps]) for i in (1, 2))
    targets = np.full((*counts.shape, len(horizons)), np.nan)
    for i, ahead in enumerate(horizons):
        targets[:-ahead, :, i] = (counts[ahead:] - base[:-ahead]) / unit[:-ahead]
    weight = unit**2 / np.maximum(np.mean(counts**2, axis=0), 1.0)
    arrays = (np.array([s.features for s in steps]), targets, weight)
    return Series(*(torch.tensor(a, dtype=torch.float32).transpose(0, 1) for a in arrays))


class Network(nn.Module):
    def __init__(self, num_features: int, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_outputs)
        nn.init.zeros_(self.head.weight)  # starts as the forecast `base`
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.lstm(features)[0])  # type: ignore[no-any-return]

    def arrays(self) -> dict[str, Weights]:
        lstm = {name: p.detach().numpy() for name, p in self.lstm.named_parameters()}
        return {
            "input": lstm["weight_ih_l0"],
            "recurrent": lstm["weight_hh_l0"],
            "bias": lstm["bias_ih_l0"] + lstm["bias_hh_l0"],
            "head": self.head.weight.detach().numpy(),
            "head_bias": self.head.bias.detach().numpy(),
        }


def _loss(outputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Squared error of the mean and, where there are quantiles, their pinball losses."""
    outputs = outputs.unflatten(-1, (-1, targets.shape[-1]))
    known = ~torch.isnan(targets)
    errors = torch.where(known, targets, 0.0)[..., None, :] - outputs
    loss = weight[..., None] * errors[..., 0, :] ** 2
    for i, level in enumerate(LEVELS[: outputs.shape[-2] - 1], start=1):
        error = errors[..., i, :]
        loss = loss + torch.maximum(level * error, (level - 1.0) * error)
    return loss[known].mean()


def _cut(series: Series, generator: torch.Generator) -> Series:
    """Windows that follow one another from a drawn start: [N, WINDOW, ...], shuffled."""
    length = series.features.shape[1]
    start = int(torch.randint(min(WINDOW, length - WINDOW + 1), (), generator=generator))
    number = (length - start) // WINDOW
    cut = [
        a[:, start : start + number * WINDOW].unflatten(1, (number, WINDOW)).flatten(0, 1)
        for a in series
    ]
    order = torch.randperm(len(cut[0]), generator=generator)
    return Series(*(a[order] for a in cut))


def _batches(series: Series, size: int, generator: torch.Generator) -> Iterator[Series]:
    while True:
        windows = _cut(series, generator)
        for first in range(0, len(windows.features), size):
            yield Series(*(a[first : first + size] for a in windows))


def _fit(series: Series, num_outputs: int, config: TrainingConfig) -> Network:
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Network(series.features.shape[2], config.hidden, num_outputs)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    batches = _batches(series, config.batch, generator)
    for features, targets, weight in itertools.islice(batches, config.steps):
        outputs = network(features)[:, WARM_UP:]
        loss = _loss(outputs, targets[:, WARM_UP:], weight[:, WARM_UP:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network


def _model(networks: Sequence[Network], interval_s: float, horizons: Sequence[int]) -> LstmModel:
    arrays = [network.arrays() for network in networks]
    weights = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
    return LstmModel(LstmWeights(**weights), interval_s, tuple(horizons))


def _check(counts: Floats, horizons: Sequence[int]) -> None:
    least = WINDOW + max(horizons) + 1
    if counts.ndim != 2 or len(counts) < least:
        raise InvalidRequestError(
            f"training an LSTM needs counts [T, J] of at least {least} intervals, got shape "
            f"{counts.shape}; give a longer trace or shorter intervals."
        )


def train_per_type(
    counts: Floats, interval_s: float, horizons: Sequence[int], config: TrainingConfig
) -> LstmModel:
    """OServe's: for each type of counts[T, J] an LSTM of its own, squared error of the mean."""
    _check(counts, horizons)
    centre, spread = counts.mean(axis=0), np.maximum(counts.std(axis=0), 1e-3)
    series = encode(StandardCounts(centre, spread), counts, horizons)
    networks = [
        _fit(Series(*(a[j : j + 1] for a in series)), len(horizons), config)
        for j in range(counts.shape[1])
    ]
    model = _model(networks, interval_s, horizons)
    return replace(model, centre=tuple(centre.tolist()), spread=tuple(spread.tolist()))


def train_pooled(
    counts: Floats, interval_s: float, horizons: Sequence[int], config: TrainingConfig
) -> LstmModel:
    """One LSTM for all types of counts[T, J], with quantiles; its season is a day."""
    _check(counts, horizons)
    season = round(DAY_S / interval_s)
    series = encode(PoissonLevels(counts.shape[1], season, horizons), counts, horizons)
    network = _fit(series, OUTPUTS * len(horizons), config)
    return replace(_model([network], interval_s, horizons), season_intervals=season)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="trace file, plain or gzip'd")
    add("--out", type=Path, required=True, help="safetensors file to write")
    add("--interval-s", type=float, default=15.0, help="the decision grid, s (default 15)")
    add("--horizons", type=int, nargs="+", default=[1, 4, 20], help="intervals (default 1 4 20)")
    add("--types", type=int, default=4, help="k of the typing (default 4)")
    add("--per-type", action="store_true", help="OServe's LSTM per type, not one for all")
    add("--steps", type=int, default=TrainingConfig().steps, help="of the gradient (default 800)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    train = train_per_type if args.per_type else train_pooled
    config = TrainingConfig(steps=args.steps, seed=args.seed)
    try:
        trace = load_trace(args.trace)
        typing = fit_typing(trace.prompt_tokens, trace.output_tokens, args.types, seed=0)
        counts = type_counts(trace, typing, args.interval_s)
        save_lstm(args.out, train(counts, args.interval_s, args.horizons, config))
    except InvalidRequestError as error:
        parser.error(str(error))
    print(f"{args.out}: trained on {len(counts)} intervals of {args.interval_s:g} s")


if __name__ == "__main__":
    main()
