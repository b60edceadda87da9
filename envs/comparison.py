"""The table that train.py and evaluate.py print: a policy against rules on the same windows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from policies.evaluation import Score, evaluate, rank_static, score

Report = Callable[[str], None]
CONTRASTED = ("mean_reward", "latency_s")  # figures of a score


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores on the same windows. `statics` are all deployments kept throughout, best first."""

    scores: tuple[Score, ...]  # keep, best static in hindsight, myopic, hysteresis, the policy
    statics: tuple[Score, ...]  # on the surrogate
    initial_key: str
    on_engine: tuple[Score, ...] = ()  # as `scores`, where a real engine was asked for

    def to_json(self) -> dict[str, Any]:
        found = {
            "initial": self.initial_key,
            "best_static": self.statics[0].policy,
            "policies": _by_policy(self.scores),
            "statics": {s.policy: [s.mean_reward, s.latency_s] for s in self.statics},
        }
        if self.on_engine:
            found |= {"engine": _by_policy(self.on_engine), "contrast": self.contrast()}
        return found

    def contrast(self) -> dict[str, Any]:
        """How often two policies differ to the same side on engine and surrogate."""
        return {
            figure: _alike(
                [getattr(s, figure) for s in self.on_engine],
                [getattr(s, figure) for s in self.scores],
            )
            for figure in CONTRASTED
        }


def _by_policy(scores: Sequence[Score]) -> dict[str, Any]:
    return {s.policy.split(" ")[0]: s.to_json() for s in scores}


def _alike(real: Sequence[float], simulated: Sequence[float]) -> dict[str, int]:
    """Over pairs of policies that differ on both: how many there are, how many of them alike."""
    products = [
        (real[i] - real[j]) * (simulated[i] - simulated[j])
        for i, j in itertools.combinations(range(len(real)), 2)
    ]
    return {"pairs": sum(p != 0 for p in products), "alike": sum(p > 0 for p in products)}


def compare(
    policy: Policy,
    pipeline: DecisionPipeline,
    windows: tuple[Trace, ...],
    reward: RewardConfig,
    initial_key: str,
    report: Report = lambda name: None,
    engine: Mapping[str, Any] | None = None,
) -> Comparison:
    """Every rule and the policy from `initial_key`; every static deployment from itself.

    All act through the same mask and guardrails; `keep` is the initial deployment kept. `engine`:
    options of a real one, on which all but the other statics run too, in real time.
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
    key = statics[0].policy
    best = replace(statics[0], policy=f"static {key}")
    scores = (keep, best, *others)
    if engine is None:
        return Comparison(scores, statics, initial_key)
    real = build_evaluation(pipeline, windows, reward, initial_key, engine)
    keep, *others = evaluate(real, rules, lambda name: report(f"{name} on the engine"))
    report(f"{best.policy} on the engine")
    best = score(best.policy, real.run(KeepPolicy(), key))
    return Comparison(scores, statics, initial_key, (keep, best, *others))


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


def print_tables(comparison: Comparison) -> None:
    """On the surrogate, and where there is one on the engine."""
    title = f"from {comparison.initial_key}"
    if not comparison.on_engine:
        print_table(comparison.scores, title)
        return
    print_table(comparison.scores, f"{title}, on the surrogate")
    print_table(comparison.on_engine, f"{title}, on the engine")
    for figure, found in comparison.contrast().items():
        said = f"{found['alike']} of {found['pairs']} pairs of policies"
        print(f"{figure}: {said} differ to the same side on both")


def print_table(scores: Sequence[Score], title: str, console: Console | None = None) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for name, _ in COLUMNS:
        table.add_column(name, justify="right")
    for line in scores:
        table.add_row(line.policy, *(show(line) for _, show in COLUMNS))
    width = None if sys.stdout.isatty() else 140
    (console or Console(width=width)).print(table)
