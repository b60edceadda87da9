"""What the cells say together: figures for machines, and tables and plots for docs/headroom.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Result = Mapping[str, Any]
Run = Mapping[str, Any]
HINDSIGHT = ("beam", "mpc_perfect")


def run_of(result: Result, rule: str) -> Run | None:
    return next((run for run in result["runs"] if run["rule"] == rule), None)


def best_static(result: Result, kind: str = "", figure: str = "latency_s") -> Run | None:
    """Of the static deployments, those of a kind or all, the one with the least of a figure."""
    kinds = (kind,) if kind else ("equal", "unequal")
    found = [run for run in result["runs"] if run["detail"].get("static") in kinds]
    return min(found, key=lambda run: float(run[figure]), default=None)


def best_hindsight(result: Result) -> Run | None:
    found = [run for name in HINDSIGHT if (run := run_of(result, name))]
    return min(found, key=lambda run: float(run["latency_s"]), default=None)


def ratio(over: Run | None, under: Run | None, figure: str = "latency_s") -> float | None:
    if over is None or under is None:
        return None
    return float(over[figure]) / float(under[figure])


def capacity_ratio(result: Result, other: str) -> float:
    """Load of the best equal replicas over that of `static` or `moving`: above 1, capacity won."""
    capacity = result["capacity"]
    return float(capacity["equal"]["load"]) / float(capacity[other]["load"])


def figures(results: Iterable[Result]) -> dict[str, float]:
    """Means over the cells that have what is asked for; latency ratios are above 1 where the first
    named is better. `dyn` is hysteresis, tuned on training days; statics are the best in hindsight
    by the figure itself."""
    cells = list(results)
    whole = [c for c in cells if not c["cell"]["lost_devices"]]
    lost = [c for c in cells if c["cell"]["lost_devices"]]

    def mean(of: Sequence[Result], value: Callable[[Result], float | None]) -> float:
        found = [v for c in of if (v := value(c)) is not None]
        return round(fmean(found), 4) if found else 0.0

    def against_static(rule: str, figure: str) -> Callable[[Result], float | None]:
        return lambda c: ratio(best_static(c, "", figure), run_of(c, rule), figure)

    def saved(cell: Result) -> float | None:
        scaling = run_of(cell, "scaling")
        devices_h = ratio(scaling, run_of(cell, "keep"), "device_hours")
        return None if devices_h is None else 1.0 - devices_h

    def after_loss(cell: Result) -> float | None:
        keep, again = run_of(cell, "keep"), run_of(cell, "hysteresis")
        if keep is None or again is None:
            return None
        return float(again["attainment"]["interactive"]) / float(keep["attainment"]["interactive"])

    return {
        "capacity_het_vs_hom_mean": mean(whole, lambda c: capacity_ratio(c, "static")),
        "latency_het_vs_hom_mean": mean(
            whole, lambda c: ratio(best_static(c, "equal"), best_static(c, "unequal"))
        ),
        "latency_dyn_vs_static_mean": mean(whole, against_static("hysteresis", "latency_s")),
        "geometric_dyn_vs_static_mean": mean(
            whole, against_static("hysteresis", "latency_geometric_s")
        ),
        "p99_dyn_vs_static_mean": mean(whole, against_static("hysteresis", "latency_p99_s")),
        "oserve_vs_static_latency_mean": mean(whole, against_static("oserve", "latency_s")),
        "clairvoyant_vs_static_mean": mean(
            whole, lambda c: ratio(best_static(c), best_hindsight(c))
        ),
        "clairvoyant_vs_hysteresis_mean": mean(
            whole, lambda c: ratio(run_of(c, "hysteresis"), best_hindsight(c))
        ),
        "device_hours_saved_mean": mean(whole, saved),
        "goodput_after_device_loss_ratio": mean(lost, after_loss),
    }


# --------------------------------------------------------------------------------------
# Tables


def _cell_row(result: Result) -> list[str]:
    equal, unequal = best_static(result, "equal"), best_static(result, "unequal")
    static = best_static(result)
    assert static is not None

    def over(rule: str, figure: str = "latency_s") -> str:
        found = ratio(best_static(result, "", figure), run_of(result, rule), figure)
        return "" if found is None else f"{found:.3f}"

    hindsight = ratio(static, best_hindsight(result))
    unequal_over = ratio(equal, unequal)
    return [
        str(result["cell"]["name"]),
        f"{result['peak_per_s']:.1f}",
        str(static["detail"]["key"]),
        f"{static['latency_s']:.2f}",
        f"{static['attainment']['interactive']:.3f}",
        "" if unequal_over is None else f"{unequal_over:.3f}",
        over("llumnix"),
        over("oserve"),
        over("homogeneous_replanned"),
        over("replanned"),
        over("greedy"),
        over("hysteresis"),
        over("mpc"),
        "" if hindsight is None else f"{hindsight:.3f}",
        over("hysteresis", "latency_geometric_s"),
    ]


HEADER = (
    "cell", "peak/s", "best static", "its mean s", "its SLO", "unequal static", "like Llumnix",
    "OServe's rule", "equal, each minute", "any, each minute", "greedy", "hysteresis", "MPC",
    "hindsight", "hysteresis, geometric",
)  # fmt: skip


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cells_table(results: Iterable[Result]) -> str:
    """Ratios of mean latency: the best static deployment over each rule, above 1 where the rule is
    better; `unequal static`: best equal over best unequal replicas."""
    return table((_cell_row(r) for r in results if not r["cell"]["lost_devices"]), HEADER)


def loss_table(results: Iterable[Result]) -> str:
    rows = [
        [
            str(result["cell"]["name"]),
            str(run["rule"]),
            f"{run['latency_s']:.2f}",
            f"{run['attainment']['interactive']:.3f}",
            f"{run['attainment']['batch']:.3f}",
            str(run["switches"]),
        ]
        for result in results
        if result["cell"]["lost_devices"]
        for run in result["runs"]
        if run["detail"].get("static") != "by_load"
    ]
    return table(rows, ("cell", "rule", "mean s", "interactive", "batch", "switches"))


def scaling_table(results: Iterable[Result]) -> str:
    rows = []
    for result in results:
        keep, scaling = run_of(result, "keep"), run_of(result, "scaling")
        if keep is None or scaling is None:
            continue
        rows.append(
            [
                str(result["cell"]["name"]),
                f"{1.0 - scaling['device_hours'] / keep['device_hours']:.2f}",
                f"{scaling['latency_s'] / keep['latency_s']:.2f}",
                f"{keep['attainment']['interactive']:.3f}",
                f"{scaling['attainment']['interactive']:.3f}",
                f"{keep['attainment']['batch']:.3f}",
                f"{scaling['attainment']['batch']:.3f}",
            ]
        )
    header = ("cell", "device-hours saved", "mean latency, times", "interactive, all",
              "interactive, scaled", "batch, all", "batch, scaled")  # fmt: skip
    return table(rows, header)


def plot(results: Sequence[Result], path: Path) -> None:
    """Mean latency of each rule over that of the best static deployment, a column per cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if not r["cell"]["lost_devices"]]
    rules = {
        "oserve": "s", "homogeneous_replanned": "v", "greedy": "^", "hysteresis": "o", "mpc": "D",
        "beam": "*",
    }  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for rule, marker in rules.items():
        points = [
            (i, value)
            for i, r in enumerate(shown)
            if (value := ratio(run_of(r, rule), best_static(r))) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=rule.replace("_", " "), alpha=0.8)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylim(0.85, 1.25)
    axes.set_ylabel("mean latency / best static")
    axes.set_xticks(range(len(shown)), [str(r["cell"]["name"]) for r in shown], rotation=60)
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------
# The page

BEGIN, END = "<!-- begin: made by `python -m envs.study --report` -->", "<!-- end -->"


def fill_page(parts: Sequence[str], page: Path) -> None:
    """Puts paragraphs between the marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after)


def write_page(results: Sequence[Result], page: Path) -> None:
    """Puts the figures and tables between the marks of a page, and the plot beside it."""
    shown = table(
        ([name, f"{value:.4f}"] for name, value in figures(results).items()), ("figure", "mean")
    )
    parts = [
        shown,
        f"![Mean latency by rule over the best static deployment]({page.stem}.png)",
        cells_table(results),
        "Devices given back (`scaling` against all devices in the first deployment):",
        scaling_table(results),
        "Lost devices, requests that arrive after the loss:",
        loss_table(results),
    ]
    fill_page(parts, page)
    plot(results, page.with_suffix(".png"))
