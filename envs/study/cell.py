"""Runs one cell: statics, tuning, the ladder, hindsight and the bounds; gives JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from engine.errors import InvalidRequestError
from envs.study.bounds import bounds
from envs.study.config import Cell, StudyConfig
from envs.study.hindsight import (
    HINDSIGHT,
    By,
    beam_windows,
    best_windows,
    deployments,
    refined_name,
    refined_windows,
)
from envs.study.rules import (
    LEARNED,
    Rule,
    alone,
    guarded_rule,
    hysteresis_rule,
    ladder,
    static_pipeline,
    static_policy,
)
from envs.study.scores import RunScore, WindowRecord, arrived_since, score_run
from envs.study.world import (
    World,
    best_for,
    build_world,
    lost_at_s,
    mean_latency_s,
    run_windows,
    shares_of_types,
)
from envs.traffic import homogeneous_keys
from envs.workload import Trace
from policies.baselines import HysteresisConfig
from policies.guarded import GuardedConfig

Report = Callable[[str], None]


def run_cell(config: StudyConfig, cell: Cell, traces: Path, report: Report) -> dict[str, Any]:
    """Everything that the study says about a cell. Raises TidewrightErrors."""
    began_s = time.perf_counter()
    world = build_world(config, cell, traces)
    statics = _statics(world, report)
    tuned = _tune(world, report)
    runs = [*statics, *_run_rules(world, ladder(world, tuned), report)]
    guarded, learned = _learned(world, tuned, report) if cell.policy else (None, [])
    runs += learned
    if guarded and config.refine and not cell.lost_devices:
        runs += _refined(world, tuned, guarded, statics, report)
    training: dict[str, float] = {}
    if cell.ladder == "full" or cell.beam:
        report("beam")
        runs.append(_beam(world, world.test, statics))
        if cell.policy is not None:
            report("headroom on training days")
            training = _training_headroom(world, tuned, statics)
    return {
        "cell": cell.model_dump(mode="json"),
        "capacity": _capacity(world),
        "rate_factor": round(world.factor, 5),
        "peak_per_s": round(max(float(part.rates.sum()) for part in world.parts), 4),
        "requests": sum(map(len, world.test)),
        "seconds": sum(w.duration_s for w in world.test),
        "types": [asdict(t) for t in world.typing.types],
        "shares": shares_of_types(world, world.test),
        "initial": world.initial_key,
        "hysteresis": asdict(tuned),
        "guarded": asdict(guarded) if guarded else None,
        "bounds": bounds(world),
        "training": training,
        "runs": [run.to_json() for run in runs],
        "took_s": round(time.perf_counter() - began_s, 1),
    }


def run_anew(
    config: StudyConfig,
    before: Mapping[str, Any],
    traces: Path,
    names: Sequence[str],
    report: Report,
) -> dict[str, Any]:
    """The result of a cell with these rules of its ladder, or hindsight, run anew, or without any
    its learned policies; all else stays. Raises TidewrightErrors."""
    began_s = time.perf_counter()
    world = build_world(config, Cell.model_validate(before["cell"]), traces)
    tuned = HysteresisConfig(**before["hysteresis"])
    changed: dict[str, Any] = {}
    if names:
        of_ladder = {rule.name: rule for rule in ladder(world, tuned)}
        can_refine = config.refine and before["guarded"] and not world.cell.lost_devices
        possible = [*of_ladder, HINDSIGHT] if can_refine else [*of_ladder]
        if unknown := [name for name in names if name not in possible]:
            raise InvalidRequestError(
                f"the ladder of cell {world.cell.name} has no rule {', '.join(unknown)}; expected "
                f"of {', '.join(possible)}."
            )
        rules = [of_ladder[name] for name in names if name in of_ladder]
        scores = _run_rules(world, rules, report)
        if HINDSIGHT in names:
            statics = [RunScore(**r) for r in before["runs"] if "static" in r["detail"]]
            guarded = GuardedConfig(**before["guarded"])
            scores += _refined(world, tuned, guarded, statics, report)
        again = {score.rule for score in scores}
        others = [r for r in before["runs"] if r["rule"] not in again]
    else:
        guarded, scores = _learned(world, tuned, report)
        changed["guarded"] = asdict(guarded)
        others = [r for r in before["runs"] if r["detail"].get("meaning") not in LEARNED]
    changed["runs"] = others + [run.to_json() for run in scores]
    changed["took_s"] = round(before["took_s"] + time.perf_counter() - began_s, 1)
    return {**before, **changed}


def _learned(
    world: World, tuned: HysteresisConfig, report: Report
) -> tuple[GuardedConfig, list[RunScore]]:
    """How the guarded policy was set, and the scores of each seed and of all together."""
    guarded = _tune_guarded(world, tuned, report)
    rules = [*alone(world), guarded_rule(world, tuned, guarded)]
    return guarded, _run_rules(world, rules, report)


def _run_rules(world: World, rules: Sequence[Rule], report: Report) -> list[RunScore]:
    scores = []
    for rule in rules:
        report(rule.name)
        pipeline = rule.pipeline(world)
        records = run_windows(world, world.test, rule.policy, pipeline, kind=rule.cluster)
        scores.append(_score(world, rule.name, records, {"meaning": rule.meaning}))
    return scores


def _score(
    world: World, name: str, records: Sequence[WindowRecord], detail: dict[str, Any] | None = None
) -> RunScore:
    if world.cell.lost_devices:
        records = [arrived_since(r, lost_at_s(r.trace)) for r in records]
    return score_run(name, records, world.objectives, world.typing, detail)


def _capacity(world: World) -> dict[str, Any]:
    """Peak loads, by the planner: of the best equal replicas, of the best static deployment, and
    with a switch wherever another is better, at no cost."""
    equal = {key: world.peak_loads[key] for key in homogeneous_keys(world.planner)}
    best_equal = min(equal, key=lambda key: equal[key])
    best = min(world.peak_loads, key=lambda key: world.peak_loads[key])
    return {
        "equal": {"key": best_equal, "load": round(equal[best_equal], 5)},
        "static": {"key": best, "load": round(world.peak_loads[best], 5)},
        "moving": {"load": round(world.moving_load, 5)},
    }


# --------------------------------------------------------------------------------------
# Static deployments


def promising(world: World) -> tuple[list[str], list[str]]:
    """Deployments worth simulating, the least estimated latency first: equal ones, and unequal
    ones that are best for some part of the windows."""
    equal, planners = homogeneous_keys(world.planner), (world.planner, world.fast_planner)
    lightest = min(world.peak_loads, key=lambda key: world.peak_loads[key])
    found = {lightest, *(key for part in world.parts for key in best_for(planners, part))}

    def cost(key: str) -> float:
        return mean_latency_s(world.planner, world.parts, key)

    unequal = sorted(sorted(found - set(equal)), key=cost)[: world.config.num_unequal]
    return sorted(equal, key=cost)[: world.config.num_equal], unequal


def _statics(world: World, report: Report) -> list[RunScore]:
    """The promising deployments, kept throughout; the best unequal one also without types."""
    scores = []
    for kind, keys in zip(("equal", "unequal"), promising(world), strict=True):
        for key in keys:
            report(f"static {key}")
            records = run_windows(world, world.test, static_policy(), static_pipeline(world), key)
            scores.append(_score(world, f"static {key}", records, {"static": kind, "key": key}))
    best = min(
        (s for s in scores if s.detail["static"] == "unequal"),
        key=lambda s: s.latency_s,
        default=None,
    )
    if best is not None:
        key = best.detail["key"]
        pipeline = static_pipeline(world, by_load=True)
        records = run_windows(world, world.test, static_policy(), pipeline, key)
        detail = {"static": "by_load", "key": key}
        scores.append(_score(world, f"static {key} by load", records, detail))
    return scores


def _on_tuning_windows(world: World, rule: Rule) -> RunScore:
    records = run_windows(world, world.training, rule.policy, rule.pipeline(world))
    return _score(world, rule.name, records)


def _tune(world: World, report: Report) -> HysteresisConfig:
    """The settings of hysteresis that are best on the tuning windows."""

    def badness(setting: HysteresisConfig) -> float:
        report(f"tuning hysteresis {setting.horizon_s:g} s, {setting.num_ticks}")
        return _badness(world, _on_tuning_windows(world, hysteresis_rule(setting)))

    return min(world.config.tuning.rules(), key=badness)


def _tune_guarded(world: World, tuned: HysteresisConfig, report: Report) -> GuardedConfig:
    """The settings of the guarded policy over the tuned rule that are best on the same windows."""
    settings = world.config.tuning.guards(world.config.guarded)

    def badness(setting: GuardedConfig) -> float:
        report(f"tuning guarded {setting.margin:g}")
        return _badness(world, _on_tuning_windows(world, guarded_rule(world, tuned, setting)))

    return min(settings, key=badness) if len(settings) > 1 else settings[0]


def _badness(world: World, score: RunScore, by: By | None = None) -> float:
    """By what the study is, unless it is said."""
    return -score.utility if (by or world.config.by) == "utility" else score.latency_s


# --------------------------------------------------------------------------------------
# Hindsight


def _training_headroom(
    world: World, tuned: HysteresisConfig, statics: Sequence[RunScore]
) -> dict[str, float]:
    """Utility of hysteresis and of the beam on the tuning windows."""
    by_rule = _on_tuning_windows(world, hysteresis_rule(tuned))
    beam = _beam(world, world.training, statics)
    return {"hysteresis": round(by_rule.utility, 5), "beam": round(beam.utility, 5)}


def _beam(world: World, windows: Sequence[Trace], statics: Sequence[RunScore]) -> RunScore:
    keys = _ranked_deployments(world, statics, world.config.beam_deployments)
    records = beam_windows(world, windows, keys)
    return _score(world, "beam", records, {"meaning": "with hindsight", "keys": list(keys)})


def _ranked_deployments(
    world: World, statics: Sequence[RunScore], number: int, by: By | None = None
) -> tuple[str, ...]:
    """Those that hindsight chooses from."""
    ranked = sorted(statics, key=lambda s: _badness(world, s, by))
    keys = [str(s.detail["key"]) for s in ranked if s.detail["static"] != "by_load"]
    return deployments(world, keys, number)


def _refined(
    world: World,
    tuned: HysteresisConfig,
    guarded: GuardedConfig,
    statics: Sequence[RunScore],
    report: Report,
) -> list[RunScore]:
    """The best courses that are found from those of all rules, learned policies and static
    deployments, by utility and by latency."""
    config = world.config.refine
    assert config is not None, "asked for"
    report(f"{HINDSIGHT}: what is known")
    known: list[Sequence[WindowRecord]] = []
    for rule in [*ladder(world, tuned), *alone(world), guarded_rule(world, tuned, guarded)]:
        pipeline = rule.pipeline(world)
        known.append(run_windows(world, world.test, rule.policy, pipeline, kind=rule.cluster))
    for run in statics:
        pipeline = static_pipeline(world, by_load=run.detail["static"] == "by_load")
        known.append(run_windows(world, world.test, static_policy(), pipeline, run.detail["key"]))
    for by in get_args(By):
        report(refined_name(by))
        keys = _ranked_deployments(world, statics, config.deployments, by)
        known.append(refined_windows(world, keys, known, by, config))
    detail = {"meaning": "whole courses refined, with hindsight"}
    return [
        _score(world, refined_name(by), best_windows(world, known, by), detail)
        for by in get_args(By)
    ]
