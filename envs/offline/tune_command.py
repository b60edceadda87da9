"""`python evaluate.py tune`: sets a shipped policy's rule and guard by what would have been best
on your traffic.

Hysteresis is tuned first, then by how much members must prefer another row to overrule it; never
is a choice, and the one that is taken where they gain nothing. All settings meet the same windows.
Use traffic of before the days that you mean to judge the result by.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.config import load_config
from engine.errors import CheckpointError, InvalidRequestError
from envs.offline.files import origin, write_json
from envs.offline.replay_command import add_windows, follow, options_of, summary
from envs.offline.replays import Plan
from envs.study.config import POLICY_STUDY, StudyConfig
from policies.artifact import (
    GUARDED,
    HYSTERESIS,
    Artifact,
    is_artifact,
    read_artifact,
    write_artifact,
)
from policies.guarded import GuardedConfig
from policies.manifest import MANIFEST, WEIGHTS

TUNING = "tuning.json"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python evaluate.py tune",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", type=Path, required=True, metavar="FOLDER", help="shipped policy")
    add("--out", type=Path, required=True, metavar="FOLDER", help="new: the policy as it is set")
    add("--trace", type=Path, help="trace file (default: the embedded generator)")
    add("--load", type=float, help="share of best static capacity (default: trained)")
    add("--seed", type=int, default=0, help="of the resampling (default: 0)")
    add("--processes", type=int, default=0, help="at a time (default: one per core)")
    add(
        "--margins",
        type=float,
        nargs="+",
        help="of members over the rule, to try (default: 30 2 0.5; 30 is never)",
    )
    add(
        "--agreements",
        type=float,
        nargs="+",
        help="shares of the members that must agree, to try (default: the policy's)",
    )
    add_windows(parser)
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    if not is_artifact(args.policy):
        raise CheckpointError(
            f"{args.policy} is no shipped policy with a rule and a guard to set; give a folder "
            "with an artifact.json, such as policies/artifacts/h100-16."
        )
    if args.out.exists() or not args.out.parent.is_dir():
        why = "is there already" if args.out.exists() else "cannot be made: its parent is no folder"
        raise InvalidRequestError(f"{args.out} {why}; give the name of a folder that is not there.")
    before = read_artifact(args.policy)
    study: StudyConfig = load_config(StudyConfig, POLICY_STUDY, {})
    with_rules = [replace(before, hysteresis=rule) for rule in study.tuning.rules()]
    rule, tried_rules = _best(with_rules, HYSTERESIS, args)
    guards = _guards(args, before.guarded, study)
    with_guards = [replace(rule, guarded=guard) for guard in guards]
    guarded, tried_guards = _best(with_guards, GUARDED, args)
    default = HYSTERESIS if guarded.guarded.never_overrules else GUARDED
    tuned = replace(guarded, default=default)
    told = {
        "default": tuned.default,
        "hysteresis": asdict(tuned.hysteresis),
        "guarded": asdict(tuned.guarded),
        "tried": tried_rules + tried_guards,
    } | origin(["tune", *argv])
    _write(args.policy, args.out, tuned, told)
    _show(told["tried"], tuned, args.out)
    print(json.dumps({k: told[k] for k in ("default", "hysteresis", "guarded")}))
    return 0


def _guards(
    args: argparse.Namespace, before: GuardedConfig, study: StudyConfig
) -> list[GuardedConfig]:
    """Settings to try, by margin and then by agreement. Raises InvalidRequestError."""
    margins = args.margins or [g.margin for g in study.tuning.guards(before)]
    agreements = args.agreements or [before.agreement]
    return [GuardedConfig(margin, share) for margin in margins for share in agreements]


def _best(
    variants: Sequence[Artifact], member: str, args: argparse.Namespace
) -> tuple[Artifact, list[dict[str, Any]]]:
    """The variant whose member has the most utility, and what each came to."""
    with TemporaryDirectory() as folder:
        places = [Path(folder, f"{member}{i}") for i in range(len(variants))]
        for place, variant in zip(places, variants, strict=True):
            place.mkdir()
            for name in variant.members:
                (place / name).symlink_to((args.policy / name).resolve())
            write_artifact(place, variant)
        names = tuple(f"{place}:{member}" for place in places)
        options = options_of(args)
        plan = Plan(args.policy, names, options, (args.trace,), (args.load,), (args.seed,))
        jobs = plan.jobs()
        results = follow(jobs, None, args.processes or os.cpu_count() or 1, args.progress)
    found = summary(jobs, results, names)["policies"]
    tried = [
        {
            "policy": member,
            "j": found[name]["j"],
            "switches_per_hour": found[name]["switches_per_hour"],
            **asdict(variant.hysteresis if member == HYSTERESIS else variant.guarded),
        }
        for name, variant in zip(names, variants, strict=True)
    ]
    return variants[max(range(len(variants)), key=lambda i: tried[i]["j"])], tried


def _write(before: Path, out: Path, tuned: Artifact, told: dict[str, Any]) -> None:
    """The whole folder, or none."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name in tuned.members:
        (part / name).mkdir(parents=True)
        for file in (MANIFEST, WEIGHTS):
            shutil.copyfile(before / name / file, part / name / file)
    write_artifact(part, tuned)
    write_json(part / TUNING, told)
    part.rename(out)


def _show(tried: Sequence[dict[str, Any]], tuned: Artifact, out: Path) -> None:
    table = Table("policy", "settings", "J", "switches/h", title=f"{out}: {tuned.default} decides")
    chosen = [asdict(tuned.hysteresis), asdict(tuned.guarded)]
    for row in tried:
        fixed = {"policy", "j", "switches_per_hour"}
        settings = {k: v for k, v in row.items() if k not in fixed}
        told = ", ".join(f"{k} {v:g}" for k, v in settings.items())
        mark = " *" if settings in chosen else ""
        table.add_row(row["policy"], told + mark, f"{row['j']:.4f}", f"{row['switches_per_hour']}")
    Console(width=110).print(table)
