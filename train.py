"""Train a switching policy on the surrogate: `python train.py --config configs/quick.yaml`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from engine.errors import TidewrightError
from envs.comparison import compare, print_table, reporter
from envs.experiment import build_experiment, build_venv
from envs.experiment_config import read_config
from policies.checkpoint import save_checkpoint
from policies.ppo import train


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python train.py", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="experiment YAML")
    parser.add_argument("--seed", type=int, help="of everything (default: the config's)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG-seedN)")
    parser.add_argument("--n-timesteps", type=int, help="decisions (default: the config's)")
    parser.add_argument("--trace", type=str, help="trace file in place of the config's traffic")
    parser.add_argument("--traces", type=str, help="folder of the config's trace files")
    parser.add_argument("-P", "--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    overrides = {
        "seed": args.seed,
        "ppo.n_timesteps": args.n_timesteps,
        "workload.trace": args.trace,
        "workload.folder": args.traces,
    }
    config = read_config(args.config, overrides)
    out = args.out or Path("runs") / f"{args.config.stem}-seed{config.seed}"
    experiment = build_experiment(config)
    pipeline = experiment.pipeline()
    venv = build_venv(experiment)
    result = train(
        venv,
        config.ppo,
        pipeline.observation_spec,
        config.seed,
        log_dir=out / "tensorboard",
        progress=args.progress,
    )
    venv.close()
    facts = experiment.facts() | {
        "training": dataclasses.asdict(config.ppo),
        "num_timesteps": result.num_timesteps,
        "wall_s": round(result.wall_s, 1),
        "interrupted": result.interrupted,
        "reward_curve": result.reward_curve,
    }
    folder = save_checkpoint(out / "policy", result.policy, result.optimizer_state, facts)
    print(f"{result.num_timesteps} decisions in {result.wall_s:.0f} s; checkpoint: {folder}")
    if result.interrupted:
        return 130
    section, load = config.evaluation, config.workload.mean_load
    found = compare(
        result.policy,
        pipeline,
        experiment.validation_windows(),
        experiment.reward,
        experiment.default_key,
        reporter(args.progress),
    )
    print_table(found, f"{section.num_windows} windows of {section.window_s:g} s at load {load:g}")
    summary = found.to_json() | {
        "checkpoint": str(folder),
        "seed": config.seed,
        "num_timesteps": result.num_timesteps,
        "train_s": round(result.wall_s, 1),
    }
    (out / "result.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse(argv))
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
