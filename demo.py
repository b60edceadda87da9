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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from envs.showcase import TrainedPool
    from envs.showcase_report import Showcase
    from envs.workload import Trace


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, help="CSV, gzipped or not (default: the embedded generator)")
    add("--start", type=float, default=0.0, help="of the window in the trace, s (default 0)")
    add("--seconds", type=float, default=60.0, help="length of the replay, s (default 60)")
    add("--speed", type=float, default=1.0, help="trace seconds per replay second (default 1)")
    add("--length-factor", type=float, default=0.2, help="on token counts (default 0.2)")
    add("--policy", type=Path, default=Path("policies/artifacts/demo"), help="checkpoint folder")
    add("--deployment", help="to start with and to keep (default: the one for the mean load)")
    add("--seed", type=int, default=0, help="of generator and prompts (default 0)")
    add("--skip-keep", action="store_true", help="leave out the comparison run")
    return parser.parse_args()


def load_window(args: argparse.Namespace, max_tokens: int, console: Console) -> Trace:
    """The replayed trace; says how it was made."""
    from envs.showcase import cut_window, demo_traffic
    from envs.traces import load_trace

    span_s = args.start + args.seconds * args.speed
    whole = load_trace(args.trace) if args.trace else demo_traffic(span_s, args.seed)
    trace = cut_window(whole, args.start, args.seconds, args.speed, args.length_factor, max_tokens)
    console.print(
        f"{len(trace)} requests in {args.seconds:g} s from {args.trace or 'the generator'}, from "
        f"second {args.start:g} on, {args.speed:g} trace seconds per second; lengths times "
        f"{args.length_factor:g}, at most {max_tokens} tokens per request.",
        soft_wrap=True,
    )
    return trace


async def run(
    args: argparse.Namespace, pool: TrainedPool, trace: Trace, console: Console
) -> Showcase:
    from envs.showcase import RunReport, ShowcaseConfig, run_once
    from envs.showcase_report import Showcase
    from envs.terminal import build_view

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    config = ShowcaseConfig(
        policy=args.policy,
        run_dir=Path("runs/demo"),
        engine_args=pool.engine_args(args.deployment),
        seed=args.seed,
    )

    async def serve(mode: str, title: str) -> RunReport:
        with build_view(console) as view:
            return await run_once(config, trace, mode, title, view)

    steered = await serve("active", "steered by the policy")
    kept = None if args.skip_keep else await serve("off", "the same window, deployment kept")
    return Showcase(steered, kept)


def main() -> int:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # until `run` has something to end
    from rich.console import Console

    from engine.errors import TidewrightError
    from envs.showcase import read_trained_pool
    from envs.showcase_report import print_report

    console = Console()
    try:
        pool = read_trained_pool(args.policy)
        trace = load_window(args, pool.max_model_len, console)
        showcase = asyncio.run(run(args, pool, trace, console))
    except asyncio.CancelledError:
        console.print("Stopped; no process is left.")
        return 130
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(showcase, console)
    print(json.dumps(showcase.to_json()), flush=True)
    return 0 if showcase.steered.summary.requests_lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
