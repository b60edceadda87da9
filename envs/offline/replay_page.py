"""The report of a replay: policies beside the first, and the windows they did worst in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from envs.offline.course import Course
from envs.offline.paired import value_j
from envs.offline.replays import Job, course_of_policy, rewards_of, setting_of
from envs.offline.report import Page, Plotted, Section, Table
from envs.offline.report_pages import (
    COLOURS,
    COURSE_HEADER,
    course_rows,
    courses_plots,
    ledger_section,
    plot_timeline,
    policy_row,
    versions_of,
)

Result = dict[str, Any]
REGRETS = {"regret_to_best_static_j": "regret to static", "regret_to_best_j": "to best"}
MAX_ROWS = 60  # windows told of
MAX_DRILLED = 4  # policies whose worst window is run again


@dataclass(frozen=True, slots=True)
class WindowGain:
    """One window of one policy beside the first policy's."""

    job: Job
    number: int
    j: float
    over_first: float
    slo: float  # share of requests
    switches: int

    @property
    def cell(self) -> str:
        return cell_name(self.job)


def cell_name(job: Job) -> str:
    options = job.ground.options
    trace = options.trace.name if options.trace is not None else "generator"
    load = "as trained" if options.load is None else f"{options.load:g}"
    return f"{trace}, load {load}, seed {options.seeds[0]}"


def window_gains(
    jobs: Sequence[Job], results: Sequence[Result], first: str
) -> dict[str, list[WindowGain]]:
    """Of each policy, in the order of the jobs."""
    beside = {
        job.ground: rewards_of(r)
        for job, r in zip(jobs, results, strict=True)
        if job.policy == first
    }
    found: dict[str, list[WindowGain]] = {}
    for job, result in zip(jobs, results, strict=True):
        scale = float(result["scale_requests"])
        sides = zip(result["windows"], rewards_of(result), beside[job.ground], strict=True)
        for number, (window, ours, theirs) in enumerate(sides):
            j = value_j([ours], scale)
            slo = window["slo"] / max(float(ours.arrived.sum()), 1.0)
            told = WindowGain(
                *(job, number, j, j - value_j([theirs], scale), slo, window["switches"])
            )
            found.setdefault(job.policy, []).append(told)
    return found


def verdict_of(told: Mapping[str, Any]) -> str:
    """One sentence."""
    parts = []
    for name, figures in told["policies"].items():
        if name == told["beside"]:
            continue
        gain, interval = figures["gain_j"], figures["gain_j_interval"]
        if interval is None:
            parts.append(f"{name} J {gain:+.4f}, too little traffic for an interval")
            continue
        low, high = interval
        word = "better" if low > 0 else "worse" if high < 0 else "not shown to differ"
        parts.append(f"{name} {word}: J {gain:+.4f} per request ({low:+.4f} to {high:+.4f})")
    if not parts:
        return f"{told['beside']} alone: J {told['policies'][told['beside']]['j']:.4f} per request."
    return f"Beside {told['beside']}: {'; '.join(parts)}."


def page_of_replay(jobs: Sequence[Job], results: Sequence[Result], told: Mapping[str, Any]) -> Page:
    """Runs the worst windows again, for their course. Raises TidewrightErrors."""
    first, named = str(told["beside"]), tuple(told["policies"])
    gains = window_gains(jobs, results, first)
    others = [name for name in named if name != first]
    worst = [min(gains[name], key=lambda w: w.over_first) for name in others or [first]]
    hours = f"{told['simulated_hours']:g} hours were simulated, statics included."
    return Page(
        f"Replay: {', '.join(named)}",
        verdict_of(told),
        (
            Section("All windows", (hours, *_regret_lines(told)), _policies_table(told)),
            Section("Cell by cell", (), _cells_table(named, gains)),
            Section(
                "Window by window",
                (f"Where each policy did worst beside {first} first.",),
                _windows_table([w for name in others or [first] for w in gains[name]]),
                (_plot_windows({name: gains[name] for name in others}, first),) if others else (),
            ),
            *(s for found in worst[:MAX_DRILLED] for s in _drilled(found, first)),
        ),
        str(told["command"]),
        versions_of(told),
    )


def _regret_lines(told: Mapping[str, Any]) -> tuple[str, ...]:
    figures = told["policies"][told["beside"]]
    lines = []
    if "regret_to_best_static_j" in figures:
        lines.append("Best static: the deployment that was best for a cell in hindsight.")
    if "regret_to_best_j" in figures:
        lines.append("Best: whatever of all that was replayed did best in a cell, in hindsight.")
    return tuple(lines)


def _policies_table(told: Mapping[str, Any]) -> Table:
    shown = {k: v for k, v in REGRETS.items() if k in told["policies"][told["beside"]]}
    header = ("policy", "J", f"over {told['beside']}", "95 %", *shown.values(), "mean latency s",
              "SLO %", "switches/h")  # fmt: skip
    rows = []
    for name, f in told["policies"].items():
        row = policy_row(name, f)
        regrets = (_with_bounds(f[key], f[f"{key}_interval"]) for key in shown)
        rows.append((*row[:4], *regrets, *row[4:]))
    return Table(header, tuple(rows))


def _with_bounds(value: float, bounds: Sequence[float] | None) -> str:
    return f"{value:+.4f}" + (f" ({bounds[0]:+.4f} to {bounds[1]:+.4f})" if bounds else "")


def _cells_table(named: Sequence[str], gains: Mapping[str, Sequence[WindowGain]]) -> Table:
    """Means of windows, which are equally long."""
    rows = []
    for name in named:
        by_cell: dict[str, list[WindowGain]] = {}
        for window in gains[name]:
            by_cell.setdefault(window.cell, []).append(window)
        for cell, windows in by_cell.items():
            j, over = (np.mean([getattr(w, key) for w in windows]) for key in ("j", "over_first"))
            switches = sum(w.switches for w in windows)
            rows.append((name, cell, f"{j:.4f}", f"{over:+.4f}", str(switches)))
    return Table(("policy", "cell", "J", "over the first", "switches"), tuple(rows), 2)


def _windows_table(windows: Sequence[WindowGain]) -> Table:
    shown = sorted(windows, key=lambda w: w.over_first)[:MAX_ROWS]
    rows = tuple(
        (
            w.job.policy,
            w.cell,
            str(w.number),
            f"{w.j:.4f}",
            f"{w.over_first:+.4f}",
            f"{100 * w.slo:.2f}",
            str(w.switches),
        )
        for w in shown
    )
    header = ("policy", "cell", "window", "J", "over the first", "SLO %", "switches")
    return Table(header, rows, 2)


def _plot_windows(gains: Mapping[str, Sequence[WindowGain]], first: str) -> Plotted:
    def plot(axes: Axes) -> None:
        for number, (name, windows) in enumerate(gains.items()):
            values = [w.over_first for w in windows]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(range(len(values)), values, "o-", ms=3, lw=0.8, color=colour, label=name)
        axes.axhline(0, color="#8a97a5", lw=0.8)
        axes.set_title(f"J over {first}", loc="left", fontsize=10)
        axes.set_xlabel("window, all cells one after another", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)

    return Plotted(f"J of each window over {first}'s in the same window, cell after cell.", plot)


def _drilled(found: WindowGain, first: str) -> tuple[Section, ...]:
    """The course of a window under a policy and under the first."""
    setting = setting_of(found.job.ground)
    names = dict.fromkeys((found.job.policy, first))
    courses: list[Course] = [course_of_policy(setting, name, found.number) for name in names]
    plots = (*courses_plots(courses), plot_timeline(courses))
    rows = course_rows(courses, setting.reward.scale_requests)
    told = f"{found.cell}: J {found.over_first:+.4f} over {first}'s."
    heading = f"Window {found.number}, the worst for {found.job.policy}"
    return (
        Section(heading, (told, *setting.notes), Table(COURSE_HEADER, rows), plots),
        ledger_section(courses[0]),
    )
