"""`python evaluate.py ope`: what logs of the running system say of a policy that did not run.

It replays the logged arrivals in a model of the system and corrects by what was logged; beside
that, estimators that need no model. A number comes with an interval, or is refused with the
reason. J is the mean utility of a request, from -1 to 1 (configs/slo.yaml).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from controller.roster import RULES
from envs.offline.files import check_writable, origin, say, write_json
from envs.offline.findings import Findings, Question, find
from envs.offline.gate import GateFacts, GateRule, Reason, gate_json, judge, read_rule
from envs.offline.report import write_report
from envs.offline.report_pages import cells, diagnostics, page_of_findings
from envs.offline.verdict import pending_verdict
from policies.ope_estimators import DEFAULT_ESTIMATOR, ESTIMATORS

FAILED_GATE = 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python evaluate.py ope",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("logs", type=Path, nargs="+", metavar="LOG", help="decision logs of `python -m controller`")
    add(
        "--policy",
        required=True,
        metavar="CHECKPOINT|RULE",
        help=f"folder of a checkpoint, FOLDER:MEMBER of a shipped policy, or {', '.join(RULES)}",
    )
    add_question(parser)
    add("--gate", type=Path, metavar="RULE.yaml", help="exit status 1 when it does not pass")
    add(
        "--report", type=Path, metavar="FILE.html", help="also write it, with .png and .json beside"
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the result to this file; the gate's verdict to FILE.gate.json beside it",
    )
    add("-P", "--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def add_question(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--profile", type=Path, help="measured cluster JSON (default: the checkpoint's; rules: CPU)"
    )
    add("--sampled", action="store_true", help="the policy draws (default: most probable action)")
    add(
        "--estimator",
        default=DEFAULT_ESTIMATOR,
        metavar="NAME",
        help=f"whose number counts: {', '.join(ESTIMATORS)}\n(default: {DEFAULT_ESTIMATOR})",
    )
    add("--effect-s", type=float, default=600.0, help="how long a decision matters (default: 600)")
    add("--block-s", type=float, default=1200.0, help="drawn together, longer (default: 1200)")
    add("--level", type=float, default=0.95, help="of intervals (default: 0.95)")
    add("--draws", type=int, default=200, help="of the bootstrap (default: 200)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add(
        "--recalibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first set the profile's step and switch times right by the log (default: do)",
    )


def question_of(args: argparse.Namespace, policy: str, rule: GateRule | None = None) -> Question:
    return Question(
        logs=tuple(args.logs),
        policy=policy,
        profile=args.profile,
        sampled=args.sampled,
        estimator=args.estimator,
        effect_s=args.effect_s,
        block_s=args.block_s,
        level=rule.level if rule is not None else args.level,
        draws=args.draws,
        seed=args.seed,
        recalibrate=args.recalibrate,
    )


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    rule = read_rule(args.gate) if args.gate else None
    for path in filter(None, (args.report, args.json)):
        check_writable(path)
    verdict = pending_verdict(args.json, args.policy, rule)
    found = find(question_of(args, args.policy, rule), say(args.progress))
    reasons = judge(rule, facts_of(found)) if rule is not None else None
    made = origin(["ope", *argv])
    told = found.to_json() | made
    if reasons is not None:
        told["gate"] = gate_json(reasons)
    if args.report:
        write_report(args.report, page_of_findings(found, told, reasons), told)
    if args.json:
        write_json(args.json, told)
    if verdict is not None and reasons is not None:
        verdict.write(reasons, made)
    show(found, reasons)
    print(json.dumps(told, allow_nan=False))
    return 0 if reasons is None or all(r.passed for r in reasons) else FAILED_GATE


def facts_of(found: Findings) -> GateFacts:
    """Service levels are compared within the model, where both are known."""
    main, scale = found.main, found.per_request
    interval = main.gain_interval
    met = [c.met.mean() if len(c.met) else None for c in (found.modelled, found.target)]
    return GateFacts(
        None if main.gain is None else scale * main.gain,
        None if interval is None else (scale * interval[0], scale * interval[1]),
        found.target.switches_per_hour,
        None if found.worst is None else found.worst.ratio,
        None if met[0] is None or met[1] is None else float(met[0] - met[1]),
        main.refusal or main.note,
    )


def show(found: Findings, reasons: tuple[Reason, ...] | None) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    for sentence in found.run.skipped:
        console.print(f"skipped: {sentence}", markup=False)
    table = Table("estimator", "J over what ran", "interval", "J", "says", title_justify="left")
    scale = found.per_request
    for e in found.estimates:
        mark = " *" if e.estimator == found.question.estimator else ""
        table.add_row(e.estimator + mark, *cells(e.gain, e.gain_interval, e.value, scale),
                      e.refusal or e.note)  # fmt: skip
    console.print(table)
    for line in diagnostics(found):
        console.print(line, markup=False)
    console.print(found.verdict, markup=False)
    print_reasons(console, reasons)


def print_reasons(console: Console, reasons: tuple[Reason, ...] | None) -> None:
    for reason in reasons or ():
        word = "passed" if reason.passed else "FAILED"
        console.print(f"gate {reason.rule}: {word}: {reason.text}", markup=False)
