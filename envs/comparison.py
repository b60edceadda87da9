"""The table that train.py and evaluate.py print: a policy against rules on the same windows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from controller.decision import DecisionPipeline
from envs.experiment import build_evaluation
from envs.reward import RewardConfig
from envs.traffic import static_keys
from envs.workload import Trace
from policies.base import Policy
from policies.baselines import HysteresisPolicy, KeepPolicy, MyopicPolicy
from policies.evaluation import Score, evaluate, rank_static

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores on the same windows. `statics` are all deployments kept throughout, best first."""

    scores: tuple[Score, ...]  # keep, best static in hindsight, myopic, hysteresis, the policy
    statics: tuple[Score, ...]
    initial_key: str

    def to_json(self) -> dict[str, Any]:
        return {
            "initial": self.initial_key,
            "best_static": self.statics[0].policy,
            "policies": {s.policy.split(" ")[0]: s.to_json() for s in self.scores},
            "statics": {s.policy: [s.mean_reward, s.latency_s] for s in self.statics},
        }


def compare(
    policy: Policy,
    pipeline: DecisionPipeline,
    windows: tuple[Trace, ...],
    reward: RewardConfig,
    initial_key: str,
    report: Report = lambda name: None,
) -> Comparison:
    """Every rule and the policy from `initial_key`; every static deployment from itself.

    All act through the same mask and guardrails; `keep` is the initial deployment kept.
    """
    spec = pipeline.observation_spec
    ground = build_evaluation(pipeline, windows, reward, initial_key)
    statics = rank_static(ground, static_keys(pipeline.planner), report)
    rules: dict[str, Policy] = {
        "keep": KeepPolicy(),
        "myopic": MyopicPolicy(spec),
        "hysteresis": HysteresisPolicy(spec),
        policy.name: policy,
    }
    keep, *others = evaluate(ground, rules, report)
    best = Score(**(statics[0].to_json() | {"policy": f"static {statics[0].policy}"}))
    return Comparison((keep, best, *others), statics, initial_key)


def reporter(enabled: bool) -> Report:
    """Says on stderr which run has started."""

    def say(name: str) -> None:
        if enabled:
            print(f"evaluating {name}", file=sys.stderr, flush=True)

    return say


COLUMNS: tuple[tuple[str, Callable[[Score], str]], ...] = (
    ("mean latency s", lambda s: f"{s.latency_s:.3f}"),
    ("p99 latency s", lambda s: f"{s.latency_p99_s:.2f}"),
    ("TTFT p99 s", lambda s: f"{s.ttft_p99_s:.3f}"),
    ("TPOT p99 ms", lambda s: f"{1e3 * s.tpot_p99_s:.1f}"),
    ("SLO %", lambda s: f"{100 * s.slo_attainment:.2f}"),
    ("reward", lambda s: f"{s.mean_reward:.4f}"),
    ("switches", lambda s: str(s.switches)),
    ("finished", lambda s: str(s.finished)),
    ("unfinished", lambda s: str(s.unfinished)),
    ("rejected", lambda s: str(s.rejected)),
)


def print_table(comparison: Comparison, title: str, console: Console | None = None) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for name, _ in COLUMNS:
        table.add_column(name, justify="right")
    for line in comparison.scores:
        table.add_row(line.policy, *(show(line) for _, show in COLUMNS))
    width = None if sys.stdout.isatty() else 140
    (console or Console(width=width)).print(table)
