"""The main job on one machine: `make demo`, `make demo TRACE=FILE` or `make demo MODEL=smollm2`.

Starts an engine (tiny model, one replica over 4 workers) and a controller with the shipped policy,
replays a window of a trace against the OpenAI API, then serves the same window with the deployment
kept as it was. The controller is held for the first 10 s: it watches traffic before it acts.
With --model smollm2 it asks chat questions instead and shows some answers; a rule decides.
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

    from envs.chat import ChatTrace
    from envs.showcase import ShowcaseConfig
    from envs.showcase_report import Showcase
    from envs.workload import Trace

SMOLLM2_PROFILE = Path("configs/profiles/smollm2_cpu4.json")
SMOLLM2_DEPLOYMENT = "4xtp1pp1"
RULE = "hysteresis"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=("tiny", "smollm2"), default="tiny", help="(default tiny)")
    add("--trace", type=Path, help="a trace file, gzipped or not (default: the embedded generator)")
    add("--start", type=float, default=0.0, help="of the window in the trace, s (default 0)")
    add("--seconds", type=float, default=60.0, help="length of the replay, s (default 60)")
    add("--speed", type=float, default=1.0, help="trace seconds per replay second (default 1)")
    add("--length-factor", type=float, default=0.2, help="on token counts (default 0.2)")
    add("--policy", type=Path, default=Path("policies/artifacts/demo"), help="checkpoint folder")
    add(
        "--deployment",
        help="to start with and to keep (default: one replica over all devices; with smollm2 "
        f"{SMOLLM2_DEPLOYMENT})",
    )
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
        f"{args.length_factor:g}, at most {max_tokens} tokens per request"
        + (f"; {whole.num_failed} failed requests left out." if whole.num_failed else "."),
        soft_wrap=True,
    )
    return trace


def tiny_showcase(
    args: argparse.Namespace, console: Console
) -> tuple[ShowcaseConfig, Trace | ChatTrace]:
    """The tiny model on the pool that the policy was trained for."""
    from envs.showcase import ShowcaseConfig, read_trained_pool

    pool = read_trained_pool(args.policy)
    config = ShowcaseConfig(
        policy=args.policy,
        run_dir=Path("runs/demo"),
        engine_args=pool.engine_args(args.deployment or f"1xtp{pool.num_workers}pp1"),
        seed=args.seed,
    )
    return config, load_window(args, pool.max_model_len, console)


def chat_showcase(
    args: argparse.Namespace, console: Console
) -> tuple[ShowcaseConfig, Trace | ChatTrace]:
    """SmolLM2 on the pool its step times were measured on. Raises CheckpointError."""
    from engine.build import resolve_model
    from engine.errors import InvalidRequestError
    from envs.chat import chat_traffic
    from envs.showcase import ShowcaseConfig, measured_pool

    if args.trace is not None:
        raise InvalidRequestError(
            "a trace has lengths but no words; leave out --trace, or --model smollm2."
        )
    resolve_model(args.model)  # before anything is started
    pool = measured_pool(SMOLLM2_PROFILE, SMOLLM2_DEPLOYMENT)
    chat = chat_traffic(args.seconds, args.seed)
    console.print(
        f"{len(chat.questions)} chat requests in {args.seconds:g} s: quick questions, then "
        "passages to summarise, then long answers. The shipped policy was trained on step times "
        f"of the tiny model, so the {RULE} rule decides here, on those of this one "
        f"({SMOLLM2_PROFILE}).",
        soft_wrap=True,
    )
    config = ShowcaseConfig(
        policy=args.policy,
        run_dir=Path("runs/demo-smollm2"),
        engine_args=(
            *("--model", args.model, "--dtype", "bfloat16"),
            *pool.engine_args(args.deployment),
        ),
        controller_args=("--rule", RULE, "--profile", str(SMOLLM2_PROFILE)),
        seed=args.seed,
    )
    return config, chat


async def run(
    config: ShowcaseConfig, traffic: Trace | ChatTrace, keep: bool, console: Console
) -> Showcase:
    from envs.showcase import RunReport, run_once
    from envs.showcase_report import Showcase
    from envs.terminal import build_view

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    steered_by = "a rule" if "--rule" in config.controller_args else "the policy"

    async def serve(mode: str, title: str) -> RunReport:
        with build_view(console) as view:
            return await run_once(config, traffic, mode, title, view)

    steered = await serve("active", f"steered by {steered_by}")
    kept = await serve("off", "the same window, deployment kept") if keep else None
    return Showcase(steered, kept)


def main() -> int:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # until `run` has something to end
    from rich.console import Console

    from engine.errors import TidewrightError
    from envs.showcase_report import print_report

    console = Console()
    try:
        prepare = tiny_showcase if args.model == "tiny" else chat_showcase
        config, traffic = prepare(args, console)
        showcase = asyncio.run(run(config, traffic, not args.skip_keep, console))
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
