"""What learned policies are worth against the rules: figures with intervals, and docs/policy.md.

All differences are paired: the same window, the same requests. Intervals come from a hierarchical
bootstrap: cells, then windows of a cell, then seeds where there are several runs of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.study.config import is_main
from envs.study.hindsight import refined_name
from envs.study.report import best_static, fill_page, ratio, run_of, table

Result = Mapping[str, Any]
Floats = NDArray[np.float64]
OUTSIDE = ("unseen", "bursts", "misleading")
HEADROOM = 0.01  # on training days, of utility: cells below it have nothing to recover
RESAMPLES, SEED = 2000, 0
BY_UTILITY, BY_LATENCY = refined_name("utility"), refined_name("latency")


def main_cells(results: Iterable[Result]) -> list[Result]:
    """Those that means are taken over."""
    return [
        r
        for r in results
        if is_main(r["cell"]["role"], r["cell"]["load"]) and run_of(r, "guarded") is not None
    ]


def seeds_of(result: Result) -> list[str]:
    return [str(run["rule"]) for run in result["runs"] if str(run["rule"]).startswith("ppo ")]


def per_request(result: Result, rule: str) -> Floats:
    """[W] mean utility of each window's requests."""
    run = run_of(result, rule)
    assert run is not None, (result["cell"]["name"], rule)
    return np.array([w["utility"] / max(w["arrived"], 1) for w in run["windows"]])


# --------------------------------------------------------------------------------------
# Intervals


def gains(result: Result, rules: Sequence[str], over: str = "hysteresis") -> Floats:
    """[W, S] of each window and run of a kind: utility per request above that of `over`."""
    base = per_request(result, over)
    return np.stack([per_request(result, rule) - base for rule in rules], axis=-1)


def interval(cells: Sequence[Floats], share: float = 0.95) -> tuple[float, float, float]:
    """Mean of [W, S] gains over cells that count alike, and the ends of its interval."""
    rng = np.random.default_rng(SEED)
    drawn = np.zeros(RESAMPLES)
    for _ in cells:  # each place is taken by a cell drawn anew
        chosen = rng.integers(len(cells), size=RESAMPLES)
        for index, cell in enumerate(cells):
            times = np.flatnonzero(chosen == index)
            windows, seeds = (rng.integers(n, size=(len(times), n)) for n in cell.shape)
            drawn[times] += cell[windows[:, :, None], seeds[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(drawn / len(cells), [(1 - share) / 2, (1 + share) / 2])
    return float(np.mean([cell.mean() for cell in cells])), float(low), float(high)


def worth_ratio_low(result: Result, rule: str = "guarded", over: str = "hysteresis") -> float:
    """Lower end of the 95 % interval, over windows, of the ratio of worth, (1 + utility) / 2."""
    rng = np.random.default_rng(SEED)
    ours, theirs = ((1 + per_request(result, name)) / 2 for name in (rule, over))
    index = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = ours[index].sum(axis=1) / theirs[index].sum(axis=1)
    return float(np.quantile(ratios, 0.025))


# --------------------------------------------------------------------------------------
# Figures


def geometric_mean(values: Iterable[float | None]) -> float:
    found = [v for v in values if v is not None and v > 0]
    return round(float(np.exp(np.mean(np.log(found)))), 4) if found else 0.0


def capacity_at(
    results: Sequence[Result], attainment_of: Callable[[Result], float], level: float
) -> float | None:
    """The load of one pool and traffic at which attainment falls to `level`, linear between the
    cells' loads; None where it never does."""
    points = sorted((float(r["cell"]["load"]), attainment_of(r)) for r in results)
    for (load, above), (heavier, below) in pairwise(points):
        if above >= level > below:
            return load + (heavier - load) * (above - level) / (above - below)
    return None


def _capacity_ratios(cells: Sequence[Result]) -> list[float]:
    """Per pool and traffic that has three loads or more: guarded over the best equal static, at
    the attainment that the latter has at the middle load."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for cell in cells:
        groups.setdefault((cell["cell"]["trace"], cell["cell"]["devices"]), []).append(cell)
    found = []
    for group in groups.values():
        middle = sorted(group, key=lambda r: float(r["cell"]["load"]))[len(group) // 2]
        theirs, level = float(middle["cell"]["load"]), _best_attainment(middle)
        ours = capacity_at(group, lambda r: _attainment(r, "guarded"), level)
        if len(group) > 2 and ours:
            found.append(ours / theirs)
    return found


def _attainment(result: Result, rule: str) -> float:
    run = run_of(result, rule)
    assert run is not None, rule
    return float(run["attainment"]["interactive"])


def _best_attainment(result: Result) -> float:
    statics = [r for r in result["runs"] if r["detail"].get("static") == "equal"]
    return max(float(r["attainment"]["interactive"]) for r in statics)


def recovered(cells: Sequence[Result], reference: Callable[[Result], float]) -> float:
    """Share of what the reference has over hysteresis that the guarded policy takes, pooled."""
    won = sum(_utility(c, "guarded") - _utility(c, "hysteresis") for c in cells)
    there = sum(reference(c) - _utility(c, "hysteresis") for c in cells)
    return round(won / there, 4) if there > 0 else 0.0


def _utility(result: Result, rule: str) -> float:
    run = run_of(result, rule)
    assert run is not None, rule
    return float(run["utility"])


def figures(results: Iterable[Result]) -> dict[str, float]:
    """Ratios are above 1 where the guarded policy is better; statics are the best equal replicas
    in hindsight, by the figure itself."""
    everything = [r for r in results if run_of(r, "guarded") is not None]
    cells = main_cells(everything)
    searched = [c for c in cells if c["training"]]
    worthwhile = [
        c for c in searched if c["training"]["beam"] - c["training"]["hysteresis"] > HEADROOM
    ]
    refined = [c for c in cells if run_of(c, BY_UTILITY)]

    def static(figure: str) -> float:
        return geometric_mean(
            ratio(best_static(c, "equal", figure), run_of(c, "guarded"), figure) for c in cells
        )

    def oserve(figure: str) -> float:
        return geometric_mean(
            ratio(run_of(c, "oserve"), run_of(c, "guarded"), figure) for c in cells
        )

    def hindsight(over: Callable[[Result], Result | None]) -> float:
        return geometric_mean(ratio(over(c), run_of(c, BY_LATENCY)) for c in cells)

    gain, low, high = interval([gains(c, ["guarded"]) for c in cells])
    alone, alone_low, alone_high = interval([gains(c, seeds_of(c)) for c in cells])
    over_greedy, greedy_low, greedy_high = interval(
        [gains(c, ["guarded"], over="greedy") for c in cells]
    )
    outside = [c for c in everything if c["cell"]["role"] in OUTSIDE]
    guarded = [run for c in cells if (run := run_of(c, "guarded")) is not None]
    hours = sum(float(c["seconds"]) for c in cells) / 3600.0
    return {
        "latency_vs_static_mean": static("latency_s"),
        "p99_vs_static_mean": static("latency_p99_s"),
        "capacity_vs_static_mean": geometric_mean(_capacity_ratios(cells)),
        "goodput_vs_static_mean": geometric_mean(
            _attainment(c, "guarded") / _best_attainment(c) for c in cells
        ),
        "latency_vs_oserve_mean": oserve("latency_s"),
        "p99_vs_oserve_mean": oserve("latency_p99_s"),
        "j_vs_hysteresis": round(gain, 5),
        "j_vs_hysteresis_ci_low": round(low, 5),
        "j_vs_hysteresis_ci_high": round(high, 5),
        "j_alone_vs_hysteresis": round(alone, 5),
        "j_alone_vs_hysteresis_ci_low": round(alone_low, 5),
        "j_alone_vs_hysteresis_ci_high": round(alone_high, 5),
        "j_vs_greedy": round(over_greedy, 5),
        "j_vs_greedy_ci_low": round(greedy_low, 5),
        "j_vs_greedy_ci_high": round(greedy_high, 5),
        "recovered_vs_beam": recovered(worthwhile, lambda c: _utility(c, "beam")),
        "recovered_vs_bound": recovered(worthwhile, lambda c: float(c["bounds"]["utility"])),
        "excluded_share": round(1 - len(worthwhile) / len(searched), 4) if searched else 1.0,
        "recovered_vs_hindsight": recovered(refined, lambda c: _utility(c, BY_UTILITY)),
        "hindsight_latency_vs_static_mean": hindsight(lambda c: best_static(c, "equal")),
        "hindsight_latency_vs_oserve_mean": hindsight(lambda c: run_of(c, "oserve")),
        "ood_worst_block_ci_low": round(min(map(worth_ratio_low, outside), default=0.0), 4),
        "switches_per_hour": round(sum(float(r["switches"]) for r in guarded) / hours, 3),
        "seeds": max((len(seeds_of(c)) for c in cells), default=0),
    }


# --------------------------------------------------------------------------------------
# The page

HEADER = (
    "cell", "role", "best equal static", "J static", "J OServe", "J greedy", "J hysteresis",
    "J PPO alone", "J guarded", "J beam", "J hindsight", "guarded - hysteresis", "95 %",
    "worth ratio, low", "mean s: best static", "OServe", "hysteresis", "guarded", "hindsight",
    "switches/h: hysteresis", "guarded",
)  # fmt: skip


def _row(result: Result) -> list[str]:
    static = max(
        (r for r in result["runs"] if r["detail"].get("static") == "equal"),
        key=lambda r: float(r["utility"]),
    )
    fastest, hours = best_static(result, "equal"), float(result["seconds"]) / 3600.0
    by_latency = run_of(result, BY_LATENCY)
    assert fastest is not None
    gain, low, high = interval([gains(result, ["guarded"])])
    alone = np.mean([_utility(result, seed) for seed in seeds_of(result)])

    def run(rule: str) -> Mapping[str, Any]:
        found = run_of(result, rule)
        assert found is not None, rule
        return found

    return [
        str(result["cell"]["name"]),
        str(result["cell"]["role"]),
        str(static["detail"]["key"]),
        f"{static['utility']:.4f}",
        *(f"{_utility(result, rule):.4f}" for rule in ("oserve", "greedy", "hysteresis")),
        f"{alone:.4f}",
        f"{_utility(result, 'guarded'):.4f}",
        *(f"{r['utility']:.4f}" if (r := run_of(result, n)) else "" for n in ("beam", BY_UTILITY)),
        f"{gain:+.4f}",
        f"{low:+.4f} to {high:+.4f}",
        f"{worth_ratio_low(result):.4f}",
        f"{fastest['latency_s']:.2f}",
        *(f"{run(rule)['latency_s']:.2f}" for rule in ("oserve", "hysteresis", "guarded")),
        f"{by_latency['latency_s']:.2f}" if by_latency else "",
        *(f"{run(rule)['switches'] / hours:.1f}" for rule in ("hysteresis", "guarded")),
    ]


TUNED_HEADER = (
    "cell", "hysteresis", "with more", "margin of the guard", "with more",
    "J hysteresis", "with more", "J guarded", "with more", "guarded - hysteresis", "with more",
)  # fmt: skip
TUNED_FIGURES = (
    "j_vs_hysteresis", "j_vs_hysteresis_ci_low", "j_vs_hysteresis_ci_high", "j_vs_greedy",
    "latency_vs_static_mean", "latency_vs_oserve_mean", "switches_per_hour",
)  # fmt: skip


def _tuned_row(result: Result, more: Result) -> list[str]:
    both, settings = (result, more), ("horizon_s", "num_ticks", "margin")
    rules = [" / ".join(f"{r['hysteresis'][name]:g}" for name in settings) for r in both]
    margins = [f"{r['guarded']['margin']:g}" for r in both]
    utilities = [f"{_utility(r, rule):.4f}" for rule in ("hysteresis", "guarded") for r in both]
    won = [f"{gains(r, ['guarded']).mean():+.4f}" for r in both]
    return [str(result["cell"]["name"]), *rules, *margins, *utilities, *won]


def _with_more_tuning(results: Mapping[str, Result], more: Mapping[str, Result]) -> tuple[str, str]:
    """Figures over the cells that were run with more windows to tune on, and those cells."""
    pairs = [(results[name], more[name]) for name in sorted(more.keys() & results.keys())]
    before, after = (figures(side) for side in zip(*pairs, strict=True))
    rows = [[name, f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in TUNED_FIGURES]
    header = ("figure", "as above", "with more windows to tune on")
    return table(rows, header), table(starmap(_tuned_row, pairs), TUNED_HEADER)


def write_verdict(results: Mapping[str, Result], more: Mapping[str, Result], page: Path) -> None:
    """Puts figures and the table of cells between the marks of a page; `more` are results of cells
    with more windows to tune on."""
    shown = [r for r in results.values() if run_of(r, "guarded") is not None]
    parts = [
        table(([name, f"{value:.4f}"] for name, value in figures(shown).items()), ("figure", "")),
        table(map(_row, shown), HEADER),
    ]
    if more:
        parts += _with_more_tuning(results, more)
    fill_page(parts, page)
