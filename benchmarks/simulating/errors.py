"""How far simulated runs are from measured ones: per cell, per pair of deployments, in a switch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from envs.workload import Trace
from simulating.cells import Cell
from simulating.runs import Run

Floats = NDArray[np.float64]
METRICS = ("throughput", "ttft", "tpot", "latency")
STATISTICS = ("mean", "p50", "p90", "p99")
PERCENT = 100.0
CLEAR_PCT = 5.0  # a difference of two deployments of at least so much is a clear one


def figures_of(run: Run, trace: Trace) -> dict[str, dict[str, float]]:
    """Statistics of TTFT, TPOT and end-to-end latency in seconds; throughput in tokens/s, over the
    time from the first arrival to the last token."""
    latency_s = run.finish_s - trace.arrival_s
    more = trace.output_tokens > 1
    tpot_s = (run.finish_s - run.first_token_s)[more] / (trace.output_tokens[more] - 1)
    span_s = run.finish_s.max() - trace.arrival_s.min()
    return {
        "throughput": {"mean": float(trace.output_tokens.sum() / span_s)},
        "ttft": _statistics(run.first_token_s - trace.arrival_s),
        "tpot": _statistics(tpot_s),
        "latency": _statistics(latency_s),
    }


def _statistics(values: Floats) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99}


def mean_figures(runs: Sequence[Run], trace: Trace) -> dict[str, dict[str, float]]:
    """Of several runs of one cell."""
    all_of = [figures_of(run, trace) for run in runs]
    return {
        name: {key: float(np.mean([f[name][key] for f in all_of])) for key in values}
        for name, values in all_of[0].items()
    }


@dataclass(frozen=True, slots=True)
class Compared:
    """A cell measured (mean of its runs) and predicted, by metric and statistic."""

    cell: Cell
    measured: dict[str, dict[str, float]]
    predicted: dict[str, dict[str, float]]

    def error_pct(self, metric: str, statistic: str) -> float:
        ratio = self.predicted[metric][statistic] / self.measured[metric][statistic]
        return PERCENT * (ratio - 1.0)


def compare(cells: Sequence[Cell], predict: Callable[[Cell], Run]) -> list[Compared]:
    return [
        Compared(cell, mean_figures(cell.runs, cell.trace), figures_of(predict(cell), cell.trace))
        for cell in cells
    ]


def repeat_errors(cells: Sequence[Cell]) -> list[Compared]:
    """The engine's second run beside its first: what no simulator can be better than."""
    return [
        Compared(c, figures_of(c.runs[0], c.trace), figures_of(c.runs[1], c.trace))
        for c in cells
        if len(c.runs) > 1
    ]


def median_error_pct(
    compared: Sequence[Compared], statistic: str, metrics: Sequence[str] = METRICS
) -> float:
    """Median over cells and metrics of the absolute error."""
    errors = [
        abs(c.error_pct(metric, statistic))
        for c in compared
        for metric in metrics
        if statistic in c.measured[metric]
    ]
    return float(np.median(errors))


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Mean latencies of every two deployments on the same arrivals."""

    sign_agreement: float
    clear_sign_agreement: float  # of those that differ by CLEAR_PCT or more
    error_pct: float  # median error of the difference, in percent of the measured one if clear
    spearman: float  # median over arrivals, of the deployments' order
    pairs: int
    clear_pairs: int


def contrasts(compared: Sequence[Compared], metric: str = "latency") -> Contrasts:
    by_traffic: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for c in compared:
        by_traffic[c.cell.traffic].append((c.measured[metric]["mean"], c.predicted[metric]["mean"]))
    rows = [
        (a[0] - b[0], a[1] - b[1], max(a[0], b[0]))
        for both in by_traffic.values()
        for a, b in combinations(both, 2)
    ]
    measured, predicted, larger = np.array(rows).T
    agrees = np.sign(measured) == np.sign(predicted)
    clear = PERCENT * np.abs(measured) >= CLEAR_PCT * larger
    ranks = [spearmanr(*np.array(both).T).statistic for both in by_traffic.values()]
    return Contrasts(
        float(agrees.mean()),
        float(agrees[clear].mean()),
        float(np.median(PERCENT * np.abs(predicted / measured - 1.0)[clear])),
        float(np.median(ranks)),
        len(rows),
        int(clear.sum()),
    )


def gaps_s(run: Run) -> Floats:
    """Longest gaps of the requests that a switch moved."""
    return run.longest_gap_s[run.moves > 0]


def switch_rows(cells: Sequence[Cell], predict: Callable[[Cell], Run]) -> list[dict[str, Any]]:
    """One per cell with a switch: gaps and figures of the ticket, measured and predicted."""
    rows = []
    for cell in cells:
        predicted = predict(cell)
        measured_s = float(np.mean([np.median(gaps_s(run)) for run in cell.runs]))
        predicted_s = float(np.median(gaps_s(predicted)))
        rows.append(
            {
                "from": cell.deployment,
                "to": cell.target,
                "moved": [int((run.moves > 0).sum()) for run in (*cell.runs, predicted)],
                "gap_s": measured_s,
                "predicted_gap_s": predicted_s,
                "error_pct": PERCENT * (predicted_s / measured_s - 1.0),
                "measured": [run.switch for run in cell.runs],
                "predicted": predicted.switch,
            }
        )
    return rows
