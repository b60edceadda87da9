"""Judge a policy off-line, against rules, on a trace: `python evaluate.py --policy CHECKPOINT`.

Every policy meets the same windows of traffic on the surrogate. The trace's days are cut, lengths
scaled to the model's context, and the rate resampled to a share of best static capacity.
Commands in place of options, each with its own --help:
  ope LOG... --policy P     what logs of the running system say of a policy that was not running
  compare A B               two policies on the same windows, or two logs
  explain LOG --tick T      why a logged decision was made, and what came of it
  replay --policy P...      policies x traces x loads x seeds on all cores, resumable
  tune --policy FOLDER      sets rule and guard of a shipped policy by what is best on your traffic
  switchback plan|analyse   an experiment on the running system
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine.errors import TidewrightError
from envs.comparison import compare, print_tables, reporter
from envs.experiment_config import ENGINE, SURROGATE, key_value
from envs.offline.compare_command import run as run_compare
from envs.offline.explain_command import run as run_explain
from envs.offline.ope_command import run as run_ope
from envs.offline.replay_command import run as run_replay
from envs.offline.tune_command import run as run_tune
from envs.setting import SettingOptions, build_setting
from envs.switchback_command import run as run_switchback

COMMANDS = {
    "compare": run_compare,
    "ope": run_ope,
    "explain": run_explain,
    "replay": run_replay,
    "switchback": run_switchback,
    "tune": run_tune,
}


HELP_ENV = f"{ENGINE}: on a real engine too, in real time (default: %(default)s)"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python evaluate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--policy", type=Path, required=True, help="checkpoint of train.py, or shipped policy")
    add("--member", default="", help="of a shipped policy: guarded, hysteresis, seed0, ...")
    add("--env", choices=(SURROGATE, ENGINE), default=SURROGATE, help=HELP_ENV)
    add("--env-kwargs", type=key_value, nargs="+", default=[], help="engine options, as KEY:VALUE")
    add("--trace", type=Path, help="trace file, plain or gzip'd (default: embedded generator)")
    add("--days", help="first-last day of the trace, 86400 s each, from 1 (default: all)")
    add("--load", type=float, help="share of best static capacity (default: as trained)")
    add("--length-factor", type=float, help="multiplies lengths (default: as trained)")
    add("--profile", type=Path, help="measured cluster JSON (default: as trained)")
    add("--initial", help="first deployment, e.g. 4xtp1pp1 (default: the checkpoint's)")
    add("--windows", type=int, default=6, help="windows, evenly spaced (default: 6)")
    add("--window-s", type=float, default=3600.0, help="seconds of a window (default: 3600)")
    add("--seeds", type=int, nargs="+", default=[0], help="of the resampling (default: 0)")
    add("--json", type=Path, help="also write the result to this file")
    add("-P", "--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    options = SettingOptions(
        trace=args.trace,
        days=args.days,
        load=args.load,
        length_factor=args.length_factor,
        profile=args.profile,
        member=args.member,
        initial=args.initial,
        num_windows=args.windows,
        window_s=args.window_s,
        seeds=tuple(args.seeds),
    )
    setting = build_setting(args.policy, options)
    found = compare(
        setting.policy,
        setting.pipeline,
        setting.windows,
        setting.reward,
        setting.initial_key,
        reporter(args.progress),
        dict(args.env_kwargs) if args.env == ENGINE else None,
    )
    print("\n".join(setting.notes))
    print_tables(found)
    summary = json.dumps(setting.facts | found.to_json())
    if args.json is not None:
        args.json.write_text(summary + "\n")
    print(summary)
    return 0


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    try:
        if given and given[0] in COMMANDS:
            return COMMANDS[given[0]](given[1:])
        return run(parse(given))
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
