"""What reports say: sections, tables and plots from findings in logs and from replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from envs.offline.course import Course
from envs.offline.findings import Findings
from envs.offline.gate import Reason
from envs.offline.paired import Gain
from envs.offline.report import Page, Plotted, Section, Table
from envs.recalibration import SWITCH
from policies.ope_replay import configurations_of

COLOURS = ("#1f6feb", "#d9730d", "#2f855a", "#7c3aed")
MAX_SWITCHES = 200  # lines of the ledger


def versions_of(told: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    revision = told["git_revision"] or "unknown"
    return f"{named}; source revision {revision}"


# --------------------------------------------------------------------------------------
# Words


def cells(gain: Any, interval: Any, value: Any, scale: float) -> list[str]:
    """Gain, its interval and value as J; empty where there is none."""
    low_high = f"{scale * interval[0]:+.4f} to {scale * interval[1]:+.4f}" if interval else ""
    return [
        "" if gain is None else f"{scale * gain:+.4f}",
        low_high,
        "" if value is None else f"{scale * value:.4f}",
    ]


def diagnostics(found: Findings) -> list[str]:
    """Sentences on what the numbers stand on."""
    logged, target = found.logged, found.target
    lines = [
        f"{len(found.run.decisions)} decisions in {logged.hours:.2f} h, {len(logged.switches)} "
        f"switches as logged, {len(target.switches)} under {found.question.policy} in the model"
    ]
    if found.generator_refusal:
        lines.append(f"weights are refused: {found.generator_refusal}")
    if (o := found.overlap) is not None:
        lines.append(
            f"overlap: {o.free_share:.0%} of decisions had a choice, {o.deterministic_share:.0%} "
            f"of those were certain; {o.unsupported:.0%} of the policy's mass was never possible; "
            f"{o.effective_windows:.1f} effective windows; largest weight {o.largest_share:.0%}"
        )
    if (c := found.calibration) is not None:
        lines.append(
            f"model: off by {c.bias:+.4f} reward per decision, explains {c.explained:.0%} of how "
            f"rewards change, {c.unknown_share:.0%} of the replay in deployments unknown to the log"
        )
    if found.recalibration is not None:
        served = frozenset().union(*map(configurations_of, logged.keys))
        told = [
            f"{name} {factor:.2f} ± {factor * error:.2f}"
            for name, (factor, error) in found.recalibration.factors().items()
            if name in served or (name == SWITCH and logged.switches)
        ]
        lines.append(f"times over the profile's, fitted to the log: {', '.join(told)}")
    if found.worst is not None:
        lines.append(
            f"worst half hour: {found.worst.ratio:.4f} of the worth of what ran, from "
            f"{found.worst.at_s:g} s"
        )
    if found.forecast.coverage_q90 is not None:
        lines.append(f"forecasts: {found.forecast.coverage_q90:.0%} of rates within their q90")
    return lines


# --------------------------------------------------------------------------------------
# Plots


def _axes(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("hours", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False,
        borderaxespad=0.2, markerscale=2.0,
    )  # fmt: skip


def plot_timeline(courses: Sequence[Course]) -> Plotted:
    """Which deployment served when, one row per deployment."""
    keys = sorted({key for course in courses for key in course.keys})

    def plot(axes: Axes) -> None:
        for number, course in enumerate(courses):
            offset = 0.18 * (number - (len(courses) - 1) / 2)
            rows = np.array([keys.index(key) for key in course.keys]) + offset
            axes.plot(course.at_s / 3600, rows, ".", ms=3.5, color=COLOURS[number % 4],
                      label=course.name)  # fmt: skip
        axes.set_yticks(range(len(keys)), keys)
        axes.set_ylim(-0.6, len(keys) - 0.4)
        _axes(axes, "Deployment that served", "")

    return Plotted("Deployment over time, as logged or replayed, one mark per decision.", plot)


def plot_curves(courses: Sequence[Course], title: str, unit: str, figure: str) -> Plotted:
    """`figure`: latency, goodput or met."""

    bin_s = max(course.bin_s for course in courses)

    def plot(axes: Axes) -> None:
        for number, course in enumerate(courses):
            if figure == "goodput":
                at_s, values = course.goodput(bin_s)
            else:
                figures = course.latency_s if figure == "latency" else course.met
                at_s, values = course.curve(figures, bin_s)
            axes.plot(at_s / 3600, values, color=COLOURS[number % 4], lw=1.3, label=course.name)
        axes.set_ylim(bottom=0)
        _axes(axes, title, unit)

    names = ", ".join(course.name for course in courses)
    return Plotted(f"{title}, in bins of {bin_s:g} s: {names}.", plot)


def plot_forecast(found: Findings) -> Plotted:
    told = found.forecast

    def plot(axes: Axes) -> None:
        axes.plot(told.at_s / 3600, told.actual, color=COLOURS[0], lw=0.8, label="came")
        axes.plot(told.at_s / 3600, told.expected, color=COLOURS[1], lw=0.8, label="expected")
        _axes(axes, "Arrivals", "requests/s")

    return Plotted("Arrivals in the next interval: expected (sum of medians) and what came.", plot)


def courses_plots(courses: Sequence[Course]) -> tuple[Plotted, ...]:
    return (
        plot_curves(courses, "Mean latency of requests that ended", "s", "latency"),
        plot_curves(courses, "Goodput: requests within their service level", "per s", "goodput"),
    )


# --------------------------------------------------------------------------------------
# Sections


def gate_section(reasons: Sequence[Reason] | None) -> tuple[Section, ...]:
    if reasons is None:
        return ()
    passed = all(reason.passed for reason in reasons)
    rows = tuple((r.rule, "passed" if r.passed else "failed", r.text) for r in reasons)
    table = Table(("rule", "result", "why"), rows, 99)
    return (Section("Gate: passed" if passed else "Gate: failed", (), table),)


def ledger_section(course: Course) -> Section:
    """The switches, each with its reason."""
    shown = course.switches[:MAX_SWITCHES]
    columns = {
        "at s": [f"{s.at_s:.0f}" for s in shown],
        "expected s": ["" if s.switch_s is None else f"{s.switch_s:.2f}" for s in shown],
        "probability": ["" if s.probability is None else f"{s.probability:.2f}" for s in shown],
        "switch": [f"{s.before} → {s.after}" for s in shown],
        "why": [s.why for s in shown],
    }
    known = {name: values for name, values in columns.items() if any(values)}
    numbers = len(known.keys() & {"at s", "expected s", "probability"})
    total = (
        f"{len(course.switches)} in {course.hours:.2f} h, {course.switches_per_hour:.2f} an hour"
    )
    left = f"; the first {MAX_SWITCHES} are shown" if len(shown) < len(course.switches) else ""
    rows = tuple(zip(*known.values(), strict=True))
    table = Table(tuple(known), rows, 0, numbers) if rows else None
    return Section(f"Switches: {course.name}", (f"{total}{left}.",), table)


def course_rows(courses: Sequence[Course], scale: float) -> tuple[tuple[str, ...], ...]:
    found = []
    for course in courses:
        arrived = float(course.arrived.sum())
        latency = course.latency_s
        found.append((
            course.name,
            f"{scale * float(course.reward.sum()) / arrived:.4f}" if arrived else "",
            f"{course.latency_mean_s:.3f}",
            f"{float(np.percentile(latency, 99)):.3f}" if len(latency) else "",
            f"{100 * float(course.met.mean()):.2f}" if len(course.met) else "",
            str(len(latency)),
            f"{course.switches_per_hour:.2f}",
        ))  # fmt: skip
    return tuple(found)


COURSE_HEADER = ("", "J", "mean latency s", "p99 s", "SLO %", "finished", "switches/h")


def page_of_findings(
    found: Findings, told: Mapping[str, Any], reasons: Sequence[Reason] | None
) -> Page:
    scale, policy = found.per_request, found.question.policy
    courses = (found.logged, found.modelled, found.target)
    rows = tuple(
        (
            e.estimator + (" *" if e.estimator == found.question.estimator else ""),
            *cells(e.gain, e.gain_interval, e.value, scale),
            e.refusal or e.note,
        )
        for e in found.estimates
    )
    header = ("estimator", "J over what ran", f"{found.question.level:.0%} interval", "J", "says")
    reward_scale = 1.0 * scale * float(found.logged.arrived.mean())
    return Page(
        f"What the logs say about {policy}",
        found.verdict,
        (
            *gate_section(reasons),
            Section(
                "Estimates",
                (f"{found.behaviour} ran. * is the one the verdict stands on.",),
                Table(header, rows, 1, 4),
            ),
            Section("What they stand on", tuple(diagnostics(found))),
            Section(
                "Served",
                ("The model's own figures are uncorrected; only estimates are claims.",),
                Table(COURSE_HEADER, course_rows(courses, reward_scale)),
                courses_plots(courses),
            ),
            Section("Deployments", (), None, (plot_timeline((found.logged, found.target)),)),
            ledger_section(found.logged),
            ledger_section(found.target),
            Section("Forecasts", _forecast_lines(found), None, (plot_forecast(found),)),
            Section("Skipped records", found.run.skipped or ("none",)),
        ),
        str(told["command"]),
        versions_of(told),
    )


def _forecast_lines(found: Findings) -> tuple[str, ...]:
    told = found.forecast
    if told.coverage_q90 is None:
        return ("The logs hold no forecasts.",)
    error = float(np.mean(np.abs(told.actual - told.expected)) / max(told.actual.mean(), 1e-9))
    return (
        f"{told.coverage_q90:.1%} of the rates stayed within their q90 (90 % is right); the mean "
        f"error of the total is {error:.0%} of the mean rate.",
    )


def page_of_policies(
    courses: Sequence[Course],
    gain: Gain,
    told: Mapping[str, Any],
    reasons: Sequence[Reason] | None,
) -> Page:
    """Two policies on the same windows; `courses` of the window in which the first did worst."""
    header = ("policy", "J", f"over {told['b']}", "95 %", "mean latency s", "SLO %", "switches/h")
    rows = tuple(policy_row(name, told["policies"][name]) for name in (told["a"], told["b"]))
    worst = "there is no whole half hour"
    if gain.worst is not None:
        worst = (
            f"{gain.worst.ratio:.4f} of the worth of {told['b']}, (1 + J) / 2, in window "
            f"{gain.worst_window} from {gain.worst.at_s:.0f} s"
        )
    return Page(
        f"{told['a']} beside {told['b']}",
        str(told["verdict"]),
        (
            *gate_section(reasons),
            Section("All windows", tuple(told["notes"]), Table(header, rows)),
            Section(
                f"Window {gain.worst_window}, the worst for {told['a']}",
                (f"Worst half hour: {worst}.",),
                None,
                (*courses_plots(courses), plot_timeline(courses)),
            ),
            *(ledger_section(course) for course in courses),
        ),
        str(told["command"]),
        versions_of(told),
    )


def policy_row(name: str, f: Mapping[str, Any]) -> tuple[str, ...]:
    """Name, J, its gain and interval; then latency, service level and switches."""
    bounds = f["gain_j_interval"]
    return (
        name,
        f"{f['j']:.4f}",
        f"{f['gain_j']:+.4f}",
        f"{bounds[0]:+.4f} to {bounds[1]:+.4f}" if bounds else "",
        f"{f['latency_mean_s']:.3f}",
        f"{100 * f['slo']:.2f}",
        f"{f['switches_per_hour']:.2f}",
    )


def page_of_logs(courses: Sequence[Course], told: Mapping[str, Any]) -> Page:
    """Two logs, each with traffic of its own."""
    named = [
        replace(course, name=name)
        for course, name in zip(courses, (told["a"], told["b"]), strict=True)
    ]
    rows = tuple(
        (
            name,
            str(f["policies"]),
            f"{f['j']:.4f}",
            f"{f['j_interval'][0]:.4f} to {f['j_interval'][1]:.4f}" if f["j_interval"] else "",
            f"{f['latency_mean_s']:.3f}",
            f"{100 * f['slo']:.2f}",
            f"{f['arrivals_per_s']:.2f}",
            f"{f['switches_per_hour']:.2f}",
            f"{f['hours']:.2f}",
        )
        for name, f in told["logs"].items()
    )
    header = (
        "log", "policies", "J", "95 %", "mean latency s", "SLO %", "requests/s", "switches/h", "h"
    )  # fmt: skip
    skipped = tuple(s for f in told["logs"].values() for s in f["skipped"])
    return Page(
        "Two logs",
        str(told["verdict"]),
        (
            Section("Served", (), Table(header, rows, 2), courses_plots(named)),
            Section("Deployments", (), None, (plot_timeline(named),)),
            *(ledger_section(course) for course in named),
            Section("Skipped records", skipped or ("none",)),
        ),
        str(told["command"]),
        versions_of(told),
    )
