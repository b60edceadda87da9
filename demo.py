"""The main job on one machine: `make demo`, or `make demo TRACE=FILE`.

Starts an engine (4 workers, tiny model) and a controller with the shipped policy, replays a window
of a trace against the OpenAI API, then serves the same window with the deployment kept as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from engine.errors import TidewrightError
from envs.showcase import RunReport, ShowcaseConfig, cut_window, run_once
from envs.showcase_report import Showcase, summary_table
from envs.terminal import build_view, switch_text
from envs.traces import load_trace
from envs.workload import Trace, WorkloadConfig, generate

MAX_MODEL_LEN = 512  # tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, help="CSV, gzipped or not (default: the embedded generator)")
    add("--start", type=float, default=0.0, help="of the window in the trace, s (default 0)")
    add("--seconds", type=float, default=75.0, help="length of the replay, s (default 75)")
    add("--speed", type=float, default=1.0, help="trace seconds per replay second (default 1)")
    add("--length-factor", type=float, default=0.1, help="on token counts (default 0.1)")
    add("--policy", type=Path, default=Path("policies/artifacts/demo"), help="checkpoint folder")
    add("--deployment", default="4xtp1pp1", help="to start with (default 4xtp1pp1)")
    add("--seed", type=int, default=0, help="of generator and prompts (default 0)")
    add("--skip-keep", action="store_true", help="leave out the comparison run")
    return parser.parse_args()


def load_window(args: argparse.Namespace, console: Console) -> Trace:
    """The replayed trace; says how it was made."""
    span_s = args.start + args.seconds * args.speed
    generated = WorkloadConfig(mean_rate_per_s=4.0, cycle_s=60.0, regime_s=15.0)
    whole = (
        load_trace(args.trace)
        if args.trace
        else generate(generated, span_s, np.random.default_rng(args.seed))
    )
    trace = cut_window(
        whole, args.start, args.seconds, args.speed, args.length_factor, MAX_MODEL_LEN
    )
    console.print(
        f"{len(trace)} requests in {args.seconds:g} s from {args.trace or 'the generator'}, from "
        f"second {args.start:g} on, {args.speed:g} trace seconds per second; lengths times "
        f"{args.length_factor:g}, at most {MAX_MODEL_LEN} tokens per request.",
        soft_wrap=True,
    )
    return trace


async def run(args: argparse.Namespace, console: Console) -> Showcase:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    trace = load_window(args, console)
    config = ShowcaseConfig(
        policy=args.policy,
        run_dir=Path("runs/demo"),
        engine_args=("--deployment", args.deployment, "--max-model-len", str(MAX_MODEL_LEN)),
        seed=args.seed,
    )

    async def serve(mode: str, title: str) -> RunReport:
        with build_view(console) as view:
            return await run_once(config, trace, mode, title, view)

    steered = await serve("active", "steered by the policy")
    kept = None if args.skip_keep else await serve("off", "the same window, deployment kept")
    return Showcase(steered, kept)


def report(showcase: Showcase, console: Console) -> None:
    console.print(summary_table(showcase))
    for ticket in showcase.steered.switches:
        console.print(switch_text(ticket), markup=False, soft_wrap=True)
    for reason in showcase.steered.reasons:
        console.print(f"not answered: {reason}", markup=False, soft_wrap=True)
    print(json.dumps(showcase.to_json()), flush=True)


def main() -> int:
    args, console = parse_args(), Console()
    try:
        showcase = asyncio.run(run(args, console))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("Stopped; no process is left.")
        return 130
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(showcase, console)
    return 0 if showcase.steered.summary.requests_lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
