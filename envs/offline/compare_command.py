"""`python evaluate.py compare A B`: two policies on the same traffic, or two logs.

Policies are rules, FOLDERs of checkpoints or FOLDER:MEMBERs of shipped policies; both meet the
same windows on the surrogate, and the difference is paired. Logs are files; their traffic is not
the same, so their difference says what was served, not which policy is better.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.roster import RULES
from engine.errors import InvalidRequestError
from envs.logged import LoggedRun, logged_run, read_parts
from envs.offline.course import Course
from envs.offline.files import check_writable, origin, say, write_json
from envs.offline.findings import course_of_log
from envs.offline.gate import GateFacts, GateRule, Reason, gate_json, judge, read_rule
from envs.offline.ope_command import FAILED_GATE, print_reasons
from envs.offline.paired import Gain
from envs.offline.replay_command import (
    add_windows,
    figures_row,
    follow,
    gain_over,
    ground_of,
    options_of,
    summary,
)
from envs.offline.replays import Plan, course_of_policy, setting_of
from envs.offline.report import write_report
from envs.offline.report_pages import page_of_logs, page_of_policies
from envs.offline.target import load_target
from envs.offline.verdict import pending_verdict
from policies.artifact import is_policy
from policies.ope_interval import interval, standard_errors


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python evaluate.py compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("a", metavar="A", help="a policy, or a decision log")
    add("b", metavar="B", help="another of the same kind; it is what A is compared with")
    add("--ground", type=Path, help="checkpoint that says pool and pipeline (default: A or B)")
    add("--trace", type=Path, help="trace file (default: the embedded generator)")
    add("--load", type=float, help="share of best static capacity (default: trained)")
    add("--seed", type=int, default=0, help="of the resampling (default: 0)")
    add(
        "--gate", type=Path, metavar="RULE.yaml", help="exit status 1 when A does not pass beside B"
    )
    add(
        "--report", type=Path, metavar="FILE.html", help="also write it, with .png and .json beside"
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the result to this file; the gate's verdict to FILE.gate.json beside it",
    )
    add_windows(parser)
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    rule = read_rule(args.gate) if args.gate else None
    for path in filter(None, (args.report, args.json)):
        check_writable(path)
    kinds = [_is_policy(name) for name in (args.a, args.b)]
    if kinds[0] != kinds[1]:
        policy, log = (args.a, args.b) if kinds[0] else (args.b, args.a)
        raise InvalidRequestError(
            f"{policy} is a policy and {log} is none; compare two policies or two logs, or ask "
            f"`evaluate.py ope {log} --policy {policy}`."
        )
    if args.a == args.b:
        raise InvalidRequestError(f"{args.a} is given twice; give two different ones.")
    if rule is not None and not kinds[0]:
        raise InvalidRequestError(
            "a gate needs policies on the same traffic; two logs have traffic of their own."
        )
    made = origin(["compare", *argv])
    return _policies(args, rule, made) if kinds[0] else _logs(args, made)


def _is_policy(name: str) -> bool:
    return name in RULES or is_policy(Path(name.partition(":")[0]))


# --------------------------------------------------------------------------------------
# Policies


def _policies(args: argparse.Namespace, rule: GateRule | None, made: Mapping[str, Any]) -> int:
    names, verdict_file = (args.b, args.a), pending_verdict(args.json, args.a, rule)
    plan = Plan(
        ground_of(args.ground, names),
        names,
        options_of(args),
        (args.trace,),
        (args.load,),
        (args.seed,),
    )
    jobs = plan.jobs()
    results = follow(jobs, None, min(2, len(jobs)), args.progress)
    theirs, ours = results
    gain = gain_over([ours], [theirs], rule.level if rule else 0.95)
    figures = summary(jobs, results, names)["policies"]
    reasons = judge(rule, facts_of(figures, args.a, args.b, gain)) if rule else None
    told = {"a": args.a, "b": args.b, "verdict": verdict(args.a, args.b, gain)}
    told |= {"gain_j": gain.gain_j, "gain_j_interval": gain.interval, "policies": figures}
    told |= dict(made)
    if reasons is not None:
        told["gate"] = gate_json(reasons)
    if args.report:
        setting = setting_of(plan.grounds()[0])
        courses = [course_of_policy(setting, name, gain.worst_window) for name in (args.a, args.b)]
        told["notes"] = list(setting.notes)
        page = page_of_policies(courses, gain, told, reasons)
        write_report(args.report, page, told)
    if verdict_file is not None and reasons is not None:
        verdict_file.write(reasons, made)
    return _finish(args, told, figures_table({n: figures[n] for n in (args.a, args.b)}), reasons)


def verdict(a: str, b: str, gain: Gain) -> str:
    """One sentence."""
    told = f"J {gain.gain_j:+.4f} per request"
    if gain.interval is None:
        return f"{a} beside {b}: {told}; too little traffic for an interval."
    low, high = gain.interval
    told += f" ({low:+.4f} to {high:+.4f})"
    if low > 0 or high < 0:
        return f"{a} is {'better' if low > 0 else 'worse'} than {b} on this traffic: {told}."
    return f"No difference between {a} and {b} is shown on this traffic: {told}."


def facts_of(figures: Mapping[str, Any], a: str, b: str, gain: Gain) -> GateFacts:
    return GateFacts(
        gain.gain_j,
        gain.interval,
        figures[a]["switches_per_hour"],
        None if gain.worst is None else gain.worst.ratio,
        figures[b]["slo"] - figures[a]["slo"],
    )


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("policy", "J", "difference", "95 %", "worst half hour", "mean latency s", "p99 s",
                  "SLO %", "switches/h")  # fmt: skip
    for name, line in figures.items():
        table.add_row(name, *figures_row(line))
    return table


# --------------------------------------------------------------------------------------
# Logs


@dataclass(frozen=True, slots=True, eq=False)
class JudgedLog:
    """What was served, as logged."""

    name: str
    policies: str
    run: LoggedRun
    course: Course
    scale: float  # requests that a reward of 1 stands for

    @property
    def per_request(self) -> float:
        return self.scale / max(float(self.course.arrived.mean()), 1e-9)

    def j(self) -> tuple[float, tuple[float, float] | None]:
        """With a 95 % interval by the block bootstrap; None for a short log."""
        reward, size = self.run.decisions.reward, max(1, round(1200.0 / self.run.grid_s))
        value = self.per_request * float(reward.mean())
        if len(reward) < 4 * size:
            return value, None
        errors = standard_errors(
            lambda index: np.array([reward[index].mean(), 0.0]),
            len(reward), size, 400, np.random.default_rng(0),
        )  # fmt: skip
        error = self.per_request * float(errors[0])
        return value, interval(value, error, len(reward) / size)

    def figures(self) -> dict[str, Any]:
        value, bounds = self.j()
        latency_s, course = self.course.latency_s, self.course
        return {
            "policies": self.policies,
            "j": round(value, 6),
            "j_interval": bounds and [round(b, 6) for b in bounds],
            "latency_mean_s": round(course.latency_mean_s, 6),
            "latency_p99_s": round(float(np.percentile(latency_s, 99)), 6) if len(latency_s) else 0,
            "slo": round(float(course.met.mean()), 6) if len(course.met) else 1.0,
            "finished": len(latency_s),
            "arrivals_per_s": round(
                float(course.arrived.sum()) / max(3600 * course.hours, 1e-9), 4
            ),
            "switches_per_hour": round(course.switches_per_hour, 4),
            "hours": round(course.hours, 4),
            "skipped": list(self.run.skipped),
        }


def judge_log(path: Path, profile: Path | None) -> JudgedLog:
    """Raises InvalidRequestError."""
    parts, skipped = read_parts([path])
    target = load_target("keep", profile, False, parts)
    found = logged_run(parts, skipped, target.reward)
    names = ", ".join(sorted({str(d["policy"]) for part in parts for d, _ in part.steps}))
    course = course_of_log(found, target)
    return JudgedLog(str(path), names, found, course, target.reward.scale_requests)


def _logs(args: argparse.Namespace, made: Mapping[str, Any]) -> int:
    say(args.progress)("reading logs")
    logs = [judge_log(Path(name), args.profile) for name in (args.a, args.b)]
    figures = {log.name: log.figures() for log in logs}
    first, second = (figures[log.name] for log in logs)
    told: dict[str, Any] = {
        "a": args.a,
        "b": args.b,
        "verdict": (
            f"J {first['j']:.4f} in {args.a} and {second['j']:.4f} in {args.b}, at "
            f"{first['arrivals_per_s']:.2f} and {second['arrivals_per_s']:.2f} requests/s: each "
            "had traffic of its own, so this says what was served, not which policy is better; for "
            "that ask `evaluate.py ope` or run `evaluate.py switchback`."
        ),
        "logs": figures,
        **made,
    }
    if args.report:
        write_report(args.report, page_of_logs([log.course for log in logs], told), told)
    return _finish(args, told, logs_table(figures), None)


LOG_COLUMNS = (
    ("policies", "policies"), ("J", "j"), ("mean latency s", "latency_mean_s"),
    ("p99 s", "latency_p99_s"), ("SLO", "slo"), ("requests/s", "arrivals_per_s"),
    ("switches/h", "switches_per_hour"), ("hours", "hours"),
)  # fmt: skip


def logs_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("log", *(title for title, _ in LOG_COLUMNS))
    for name, line in figures.items():
        shown = (line[key] for _, key in LOG_COLUMNS)
        table.add_row(name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in shown))
    return table


def _finish(
    args: argparse.Namespace,
    told: Mapping[str, Any],
    table: Table,
    reasons: tuple[Reason, ...] | None,
) -> int:
    if args.json:
        write_json(args.json, dict(told))
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    console.print(told["verdict"], markup=False)
    print_reasons(console, reasons)
    print(json.dumps(told, allow_nan=False))
    return 0 if reasons is None or all(r.passed for r in reasons) else FAILED_GATE
