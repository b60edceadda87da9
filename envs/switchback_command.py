"""`python evaluate.py switchback`: plans an experiment on the running system, and analyses it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from controller.build import load_profiled_cluster
from engine.errors import InvalidRequestError
from envs.build import DEFAULT_PROFILE, default_reward
from envs.logged import read_logs
from policies.switchback import (
    Plan,
    SwitchbackConfig,
    analyse,
    blocks_needed,
    detectable,
    dumps,
    loads,
    plan,
    sign_of,
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python evaluate.py switchback", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("plan", help="draw whose turn it is when")
    make.add_argument("--out", type=Path, required=True, help="file for the plan, JSON")
    make.add_argument("--blocks", type=int, help="an even number (default: 24)")
    make.add_argument("--shortest-s", type=float, default=1200.0, help="default: 1200")
    make.add_argument("--longest-s", type=float, default=1800.0, help="default: 1800")
    make.add_argument(
        "--burn-in-s", type=float, default=600.0, help="of each block, not counted (default: 600)"
    )
    make.add_argument("--seed", type=int, default=0, help="default: 0")
    make.add_argument(
        "--spread", type=float, help="of block means of one policy, reward per interval"
    )
    make.add_argument(
        "--difference", type=float, help="to be found with 80 %%, in place of --blocks"
    )
    judge = commands.add_parser("analyse", help="what the logs of the experiment say")
    judge.add_argument("--plan", type=Path, required=True, help="file that `plan` wrote")
    judge.add_argument("--log", type=Path, nargs="+", required=True, help="decision logs")
    judge.add_argument(
        "--start-s", type=float, default=0.0, help="when it began, on the engine's clock"
    )
    judge.add_argument(
        "--profile", type=Path, default=DEFAULT_PROFILE, help="measured cluster JSON, for rewards"
    )
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Raises TidewrightErrors."""
    args = parse(argv)
    return _plan(args) if args.command == "plan" else _analyse(args)


def _number_of_blocks(args: argparse.Namespace) -> int:
    if args.difference is None:
        return 24 if args.blocks is None else int(args.blocks)
    if args.spread is None or args.blocks is not None:
        raise InvalidRequestError("--difference needs --spread, and takes the place of --blocks.")
    return blocks_needed(args.difference, args.spread)


def _plan(args: argparse.Namespace) -> int:
    config = SwitchbackConfig(
        _number_of_blocks(args), args.shortest_s, args.longest_s, args.burn_in_s, args.seed
    )
    found = plan(config)
    try:
        args.out.write_text(dumps(found))
    except OSError as error:
        raise InvalidRequestError(
            f"plan {args.out} cannot be written: {error.strerror}."
        ) from error
    table = Table("block", "policy", "from s", "counts from s", "to s")
    for number, block in enumerate(found.blocks, start=1):
        times = (block.begin_s, block.count_from_s, block.end_s)
        table.add_row(str(number), block.arm, *(f"{t:.0f}" for t in times))
    Console().print(table)
    facts = {"plan": str(args.out), "blocks": len(found.blocks), "duration_s": found.duration_s}
    if args.spread is not None:
        facts["detectable"] = round(detectable(found, args.spread), 6)
    print(json.dumps(facts))
    return 0


def _read_plan(path: Path) -> Plan:
    try:
        return loads(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"plan {path} cannot be read: {error.strerror}.") from error


def _analyse(args: argparse.Namespace) -> int:
    made = _read_plan(args.plan)
    logged = read_logs(args.log, default_reward(load_profiled_cluster(args.profile)))
    for sentence in logged.skipped:
        print(f"skipped: {sentence}", file=sys.stderr)
    log = logged.decisions
    result = analyse(made, log.at_s - args.start_s, log.reward, logged.grid_s)
    print(sign_of(result))
    bounds = [b if abs(b) < float("inf") else None for b in result.interval]
    print(json.dumps(result.to_json() | {"interval": bounds}))
    return 0
