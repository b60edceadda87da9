"""What off-policy estimates are worth: gains of policies that did not run, beside the truth.

Truth: the surrogate of four CPU workers with its measured profile; each policy's value is the mean
over fresh windows of traffic, the same for all. Logs: one long window under each of four rules; two
explore as a controller does with --explore 0.05, among near ties, and two take any legal row at 5 %
of their decisions. Targets: five of each, drawn from those POLICIES whose true value is visibly
another, by 5 % of the range of all values: 20 pairs. The estimators' model, and the planner that
shows candidates to all policies, have another profile: steps and switches take 1 to 2 times as long
as in truth, by configuration, and arithmetic 1.2 times as long beside memory. As `evaluate.py ope`
does, the model is first fitted to each log, by factors of steps and switches; "as profiled" is a
replay without that.

The best estimator is chosen on the pairs of two behaviours and reported on those of the others: the
least median error of those that refuse at most a fifth, order policies at all (a Spearman above a
half), and whose 95 % intervals hold the true value of at least 90 % of the logs of a chain. Errors
are of the gain over the behaviour, in per cent of the range. A log's own traffic is not the traffic
that true values are means over: "own" errors are beside the true gain on its own arrivals.
Coverage is that of 95 % intervals on the chain, over many fresh logs of it: of the estimator
chosen, and of the one that `evaluate.py ope` uses unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from evaluating.chain import Chain
from evaluating.world import World
from rich.console import Console
from rich.table import Table

from policies.ope import diagnose, estimate
from policies.ope_estimators import DEFAULT_ESTIMATOR, ESTIMATORS, Evidence, OpeConfig
from policies.ope_interval import Estimate

TRIVIAL, AS_PROFILED = "no_difference", "replay, as profiled"
NAMES = (*ESTIMATORS, AS_PROFILED)
POLICIES = (
    "uneven",
    "one tp4",
    "four",
    "one pp4",
    "scaling",
    "myopic",
    "greedy",
    "hysteresis",
    "myopic, erring 10 %",
    "greedy, erring 20 %",
    "hysteresis, erring 40 %",
    "scaling, erring 80 %",
)
BEHAVIOURS = (
    "scaling, exploring 5 %",
    "hysteresis, erring 5 %",
    "myopic, exploring 5 %",
    "greedy, erring 5 %",
)
TARGETS, VISIBLE = 5, 0.05  # of each log; share of the range that their values differ by
CHOSEN_ON = BEHAVIOURS[:2]  # the others are reported on
GOALS = {
    "rel_err_median_pct": "< 10",
    "spearman": "> 0.9",
    "regret_at_1_pct": "< 2",
    "refused_share": "< 0.2",
    "coverage_95": "0.93-0.97",
}
MAX_REFUSED, MIN_SPEARMAN, MIN_COVERAGE = 0.2, 0.5, 0.9


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    window_s: float = 8 * 3600.0  # of a log
    fresh_s: float = 4 * 3600.0  # of a fresh window
    fresh: int = 8  # windows that a true value is the mean of
    models: int = 2  # drawn from what a log leaves open
    ope: OpeConfig = OpeConfig(window=40, block=80, draws=60)  # noqa: RUF009 (frozen)
    repetitions: int = 1000  # logs of the chain
    trials: int = 200  # other logs of it, by which an estimator may be chosen
    seed: int = 41  # of the logs
    behaviours: tuple[str, ...] = BEHAVIOURS


QUICK = Size(
    window_s=3600.0,
    fresh_s=1800.0,
    fresh=2,
    models=1,
    ope=OpeConfig(window=12, block=32, draws=20),
    repetitions=200,
    trials=100,
    behaviours=BEHAVIOURS[::3],
)


@dataclass(frozen=True)
class Pair:
    """One target on one log: what every estimator says, with and without refusals."""

    behaviour: str
    target: str
    own: float  # true gain on the log's own arrivals
    refusing: dict[str, Estimate]
    insisting: dict[str, Estimate]
    note: str


@lru_cache(maxsize=1)
def world(window_s: float) -> World:
    """One per process."""
    return World(window_s)


def true_value(name: str, size: Size) -> float:
    here = world(size.fresh_s)
    policy = here.policy(name)
    values = [here.true_value(policy, here.trace(7, i), seed=i) for i in range(size.fresh)]
    return float(np.mean(values))


def visible(truth: dict[str, float], behaviours: tuple[str, ...]) -> dict[str, list[str]]:
    """The targets of each behaviour's log."""
    spread, rng = max(truth.values()) - min(truth.values()), np.random.default_rng(5)
    found = {}
    for behaviour in behaviours:
        own = truth[behaviour]
        apart = [name for name in POLICIES if abs(truth[name] - own) >= VISIBLE * spread]
        found[behaviour] = sorted(rng.choice(apart, TARGETS, replace=False).tolist())
    return found


def evaluate_log(behaviour: str, targets: list[str], size: Size) -> list[Pair]:
    """A log of one behaviour, and every estimate of its targets."""
    here = world(size.window_s)
    log = here.log(here.policy(behaviour), size.seed, BEHAVIOURS.index(behaviour))
    found = here.recalibration(log, size.ope.window)
    rng = np.random.default_rng(0)
    models = [here.model, found.cluster, *(found.draw(rng) for _ in range(size.models))]
    logged = [here.logged_run(log, model) for model in models]
    pairs = []
    for target in targets:
        policy = here.policy(target)
        wanted = log.target(policy)
        runs = [
            here.target_run(log, policy, model, np.random.default_rng(i))
            for i, model in enumerate(models)
        ]
        profiled, fitted, *drawn = zip(logged, runs, strict=True)
        raw = Evidence(log.decisions, wanted, profiled[0], profiled[1:])
        evidence = Evidence(log.decisions, wanted, fitted[0], fitted[1:], tuple(drawn))
        asked = [(name, name, evidence) for name in ESTIMATORS]
        asked.append((AS_PROFILED, "replay", raw))
        answers = [
            {
                label: estimate(name, given, size.ope, np.random.default_rng(0), refuse)
                for label, name, given in asked
            }
            for refuse in (True, False)
        ]
        own = here.target_run(log, policy, here.truth, np.random.default_rng(9)).reward.mean()
        own -= log.decisions.reward.mean()
        told = note(evidence, size.ope)
        pairs.append(Pair(behaviour, target, float(own), answers[0], answers[1], told))
    return pairs


def note(evidence: Evidence, config: OpeConfig) -> str:
    weights, model = diagnose(evidence, config)
    assert weights is not None
    assert model is not None
    return (
        f"{weights.effective_windows:.1f} windows, {weights.free_share:.0%} free, model "
        f"explains {model.explained:.0%}, {model.unknown_share:.0%} unknown, "
        f"{model.untried_share:.0%} untried, error {model.error:.3f}"
    )


# --------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class Scores:
    """Of one estimator on some pairs; percentages of the range of values."""

    error: float  # median over pairs with a number
    own: float  # the same, beside the true gain on the log's own arrivals
    refused: float
    spearman: float  # mean over behaviours, of all their policies
    regret: float  # mean over behaviours, of the one that looks best
    covered: float  # of the pairs' intervals


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(np.float64)


def score(name: str, pairs: list[Pair], truth: dict[str, float], refuse: bool = True) -> Scores:
    spread = max(truth.values()) - min(truth.values())
    errors, owned, covered, orders, regrets = [], [], [], [], []
    for behaviour in sorted({pair.behaviour for pair in pairs}):
        guessed, known = [0.0], [truth[behaviour]]
        of_log = [p for p in pairs if p.behaviour == behaviour]
        best = max(truth[n] for n in (behaviour, *(p.target for p in of_log)))
        for pair in of_log:
            answer = (pair.refusing if refuse else pair.insisting)[name]
            if answer.gain is None:
                continue
            gain = truth[pair.target] - truth[behaviour]
            errors.append(abs(answer.gain - gain) / spread)
            owned.append(abs(answer.gain - pair.own) / spread)
            if answer.gain_interval is not None:
                covered.append(answer.gain_interval[0] <= gain <= answer.gain_interval[1])
            guessed.append(answer.gain)
            known.append(truth[pair.target])
        if len(guessed) > 2 and np.ptp(guessed) > 0:
            orders.append(float(np.corrcoef(ranks(guessed), ranks(known))[0, 1]))
        regrets.append((best - known[int(np.argmax(guessed))]) / spread)
    return Scores(
        100 * float(np.median(errors)) if errors else float("nan"),
        100 * float(np.median(owned)) if owned else float("nan"),
        1 - len(errors) / len(pairs),
        float(np.mean(orders)) if orders else float("nan"),
        100 * float(np.mean(regrets)),
        float(np.mean(covered)) if covered else float("nan"),
    )


def orderly(pairs: list[Pair], truth: dict[str, float]) -> dict[str, float]:
    """Estimators that answer often enough and order policies at all, and their errors."""
    scores = {name: score(name, pairs, truth) for name in NAMES}
    return {
        name: found.error
        for name, found in scores.items()
        if found.refused <= MAX_REFUSED and found.spearman > MIN_SPEARMAN
    }


# --------------------------------------------------------------------------------------
# Coverage

LOG_CHAIN, TARGET_CHAIN = np.array([[0.4, 0.6], [0.6, 0.4]]), np.array([[0.2, 0.8], [0.75, 0.25]])
WRONG = Chain(serve=((0.7, 0.1), (-0.9, 0.6)), switch_cost=0.0)
CHAIN_OPE = OpeConfig(window=8, block=40, draws=60)
DECISIONS, CHAIN_RUNS = 1600, 4


def coverage(name: str, first: int, number: int) -> tuple[int, int]:
    """Intervals that hold the true gain, and all intervals, over that many logs of the chain."""
    chain, rng = Chain(), np.random.default_rng((3, first))
    gain = chain.value(TARGET_CHAIN) - chain.value(LOG_CHAIN)
    loads = chain.loads(number, DECISIONS, rng)
    logged = chain.simulate(LOG_CHAIN, loads, rng)
    targets = [chain.simulate(TARGET_CHAIN, loads, rng) for _ in range(CHAIN_RUNS)]
    held = given = 0
    for run in range(number):
        evidence = Evidence(
            logged.log(run, LOG_CHAIN),
            logged.target(run, TARGET_CHAIN),
            logged.model_run(run, WRONG),
            tuple(t.model_run(run, WRONG) for t in targets),
        )
        name = "replay" if name == AS_PROFILED else name
        found = estimate(name, evidence, CHAIN_OPE, np.random.default_rng(run)).gain_interval
        given += found is not None
        held += found is not None and found[0] <= gain <= found[1]
    return held, given


# --------------------------------------------------------------------------------------
# The whole


def show(pairs: list[Pair], truth: dict[str, float], chosen: str, console: Console) -> None:
    table = Table("behaviour", "target", "true gain", "own", *NAMES, "diagnostics")
    for pair in pairs:
        gain = truth[pair.target] - truth[pair.behaviour]
        told = [
            f"{a.gain:+.3f}{'' if pair.refusing[n].gain is not None else ' (refused)'}"
            for n, a in pair.insisting.items()
        ]
        table.add_row(
            pair.behaviour, pair.target, f"{gain:+.3f}", f"{pair.own:+.3f}", *told, pair.note
        )
    console.print(table)
    table = Table(
        "estimator",
        "error %",
        "own error %",
        "refused",
        "Spearman",
        "regret@1 %",
        "pairs covered",
        "without refusal: error %",
        "Spearman",
        "regret@1 %",
    )
    for name in NAMES:
        kept, all_of = score(name, pairs, truth), score(name, pairs, truth, refuse=False)
        table.add_row(
            name + (" *" if name == chosen else ""),
            f"{kept.error:.1f}", f"{kept.own:.1f}", f"{kept.refused:.2f}", f"{kept.spearman:.2f}",
            f"{kept.regret:.1f}", f"{kept.covered:.2f}",
            f"{all_of.error:.1f}", f"{all_of.spearman:.2f}", f"{all_of.regret:.1f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two logs, short and few windows")
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=Size.seed, help=f"of logs; default {Size.seed}")
    args = parser.parse_args()
    size = replace(QUICK if args.quick else Size(), seed=args.seed)
    console, begun_s = Console(width=200), time.monotonic()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        names = sorted({*POLICIES, *size.behaviours})
        truth = dict(zip(names, pool.map(true_value, names, [size] * len(names)), strict=True))
        targets = visible(truth, size.behaviours)
        logs = [pool.submit(evaluate_log, *asked, size) for asked in targets.items()]
        pairs = [pair for log in logs for pair in log.result()]

        def covered(name: str, first: int, number: int) -> float:
            part = max(number // 20, 1)
            parts = [
                pool.submit(coverage, name, at, part) for at in range(first, first + number, part)
            ]
            held, given = np.sum([p.result() for p in parts], axis=0)
            return float(held / max(given, 1))

        errors = orderly([p for p in pairs if p.behaviour in CHOSEN_ON], truth)
        tried = {name: covered(name, size.repetitions, size.trials) for name in errors}
        usable = [name for name in errors if tried[name] >= MIN_COVERAGE]
        chosen = min(usable or [DEFAULT_ESTIMATOR], key=lambda name: errors.get(name, np.inf))
        coverages = {n: covered(n, 0, size.repetitions) for n in {chosen, DEFAULT_ESTIMATOR}}
    reported = [p for p in pairs if p.behaviour not in CHOSEN_ON]
    told = ", ".join(f"{name} {share:.3f}" for name, share in tried.items())
    console.print(f"intervals that hold, of estimators that order policies: {told}")
    console.print(f"true values: {', '.join(f'{k} {v:.3f}' for k, v in sorted(truth.items()))}")
    show(reported, truth, chosen, console)
    best, trivial = score(chosen, reported, truth), score(TRIVIAL, reported, truth)
    result: dict[str, Any] = {
        "benchmark": "ope",
        "seed": size.seed,
        "best_estimator": chosen,
        "rel_err_median_pct": round(best.error, 2),
        "rel_err_own_pct": round(best.own, 2),
        "rel_err_trivial_pct": round(trivial.error, 2),
        "spearman": round(best.spearman, 3),
        "regret_at_1_pct": round(best.regret, 2),
        "refused_share": round(best.refused, 3),
        "coverage_95": round(coverages[chosen], 4),
        "coverage_95_default": round(coverages[DEFAULT_ESTIMATOR], 4),
        "coverage_repetitions": size.repetitions,
        "coverage_95_pairs": round(best.covered, 3),
        "pairs": len(reported),
        "seconds": round(time.monotonic() - begun_s),
    }
    table = Table("figure", "value", "goal")
    for key, value in result.items():
        table.add_row(key, str(value), GOALS.get(key, ""))
    console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
