"""Train a switching policy: `python train.py --config configs/quick.yaml`.

A run is interrupted with Ctrl-C and gone on with by --resume. The same seed gives the same weights
on one machine; an interrupted and resumed run meets other episodes than one that was not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine.errors import TidewrightError
from envs.experiment_config import ENGINE, SURROGATE, key_value, read_config
from envs.fleet import run_seeds
from envs.search import PRUNERS, SAMPLERS, SearchOptions, optimize
from envs.training import RunOptions, run_training


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", "--conf-file", type=Path, required=True, help="YAML, flat or keyed by env id")
    add("--env", choices=(SURROGATE, ENGINE), default=SURROGATE, help="(default: %(default)s)")
    add("--env-kwargs", type=key_value, nargs="+", default=[], help="engine options, as KEY:VALUE")
    add("-n", "--n-timesteps", type=int, help="decisions in all (default: the config's)")
    add("--seed", type=int, help="of everything (default: the config's)")
    add("--seeds", type=int, default=1, help="how many, from the seed on, with curves and bands")
    add("-f", "--log-folder", type=Path, default=Path("runs"), help="of runs (default: runs)")
    add("--out", type=Path, help="run folder (default: LOG_FOLDER/CONFIG-seedN)")
    add("-tb", "--tensorboard-log", type=Path, help="folder (default: in the run's)")
    add("-i", "--trained-agent", type=Path, help="checkpoint to go on from: all but its episodes")
    add("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    add("--save-freq", type=int, default=0, help="decisions between saves; 0: at the end alone")
    add("--eval-freq", type=int, help="decisions between validations; 0: keep the last policy")
    add("--eval-episodes", type=int, help="windows of each trace to validate on")
    add("--num-threads", type=int, default=1, help="of torch (default: 1)")
    add("--trace", type=str, help="trace file in place of the config's traffic")
    add("--traces", type=str, help="folder of the config's trace files")
    add("-P", "--progress", action=argparse.BooleanOptionalAction, default=True)
    add("--ray", metavar="ADDRESS", help="Ray cluster for seeds and trials; 'local': a new one")
    add("-optimize", "--optimize", action="store_true", help="search hyper-parameters by Optuna")
    add("--n-trials", type=int, default=20, help="in all; a study in storage goes on")
    add("--sampler", choices=SAMPLERS, default="tpe")
    add("--pruner", choices=PRUNERS, default="median", help="none prunes with --ray")
    add("--storage", help="of the study (default: SQLite in the run folder)")
    add("--study-name", default="tidewright")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    overrides = {
        "seed": args.seed,
        "ppo.n_timesteps": args.n_timesteps,
        "workload.trace": args.trace,
        "workload.folder": args.traces,
        "evaluation.eval_freq": args.eval_freq,
        "evaluation.eval_episodes": args.eval_episodes,
    }
    config = read_config(args.config, overrides, args.env)
    options = RunOptions(
        out=args.out or args.log_folder / f"{args.config.stem}-seed{config.seed}",
        env_id=args.env,
        engine=dict(args.env_kwargs),
        trained_agent=args.trained_agent,
        resume=args.resume,
        save_freq=args.save_freq,
        tensorboard=args.tensorboard_log,
        num_threads=args.num_threads,
        progress=args.progress,
    )
    if args.optimize:
        names = (args.n_trials, args.sampler, args.pruner, args.storage, args.study_name)
        summary, interrupted = optimize(config, options, SearchOptions(*names), args.ray)
    elif args.seeds != 1 or args.ray is not None:
        summary, interrupted = run_seeds(config, options, args.seeds, args.ray)
    else:
        found = run_training(config, options)
        summary, interrupted = found.summary, found.interrupted
    print(json.dumps(summary))
    return 130 if interrupted else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse(argv))
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
