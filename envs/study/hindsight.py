"""What hindsight makes of a cell's windows: the beam, and whole courses refined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from controller.decision import plan_to
from engine.cluster import (
    ClusterSnapshot,
    SwitchPlan,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError
from envs.columns import ColumnLedger
from envs.lookahead import future_of
from envs.study.scores import WindowRecord, total_latency_s, total_utility
from envs.study.world import World, best_for
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import Trace
from policies.base import TrafficColumns, request_seconds
from policies.oracle import Course, RefineConfig, beam_search, refine, wanted_of
from policies.oracle import World as Search

HINDSIGHT = "hindsight"  # begins the names of refined runs
By = Literal["utility", "latency"]
NUM_LEADERS = 2  # known courses whose deployments may be chosen, too


def refined_name(by: By) -> str:
    """Of a run."""
    return f"{HINDSIGHT} by {by}"


def deployments(world: World, statics: Sequence[str], number: int) -> tuple[str, ...]:
    """Where all rules start, the fastest at almost no load, and the best of `statics`."""
    part = world.parts[0]
    fastest = best_for((world.fast_planner,), replace(part, rates=0.01 * part.rates))[0]
    return tuple(dict.fromkeys([world.initial_key, fastest, *statics]))[:number]


def beam_windows(
    world: World, windows: Sequence[Trace], keys: tuple[str, ...]
) -> list[WindowRecord]:
    """Each window by the beam search, over these deployments."""
    found = []
    for window in windows:
        if len(window):
            search, until_s = _search(world, window, keys, world.config.by), window.duration_s
            course = beam_search(_start(world), search, until_s, world.config.beam)
            found.append(_record(world, window, course))
    return found


def refined_windows(
    world: World,
    keys: tuple[str, ...],
    known: Sequence[Sequence[WindowRecord]],
    by: By,
    config: RefineConfig,
) -> list[WindowRecord]:
    """Of each window a course that starts with the best of what is `known`: records of rules, of
    all windows each."""
    found = []
    for given in zip(*known, strict=True):
        window = given[0].trace
        ranked = sorted(given, key=lambda record: badness(world, record, by))
        visited = [
            k for r in ranked[:NUM_LEADERS] for k in (r.first_key, *(k for _, k in r.switches))
        ]
        search = _search(world, window, tuple(dict.fromkeys([*keys, *visited])), by)
        until_s, step_s = window.duration_s, config.step_s
        firsts = [wanted_of(key, (), until_s, step_s) for key in search.keys]
        firsts += [wanted_of(r.first_key, r.switches, until_s, step_s) for r in ranked]

        def total(course: Course, window: Trace = window) -> float:
            return badness(world, _record(world, window, course), by)

        course = refine(_start(world), search, until_s, config, firsts, total)
        found.append(_record(world, window, course))
    return found


def best_windows(
    world: World, known: Sequence[Sequence[WindowRecord]], by: By
) -> list[WindowRecord]:
    """The best record of each window."""
    return [
        min(given, key=lambda record: badness(world, record, by))
        for given in zip(*known, strict=True)
    ]


def badness(world: World, record: WindowRecord, by: By) -> float:
    """Of a window."""
    if by == "latency":
        return total_latency_s(record)
    return -total_utility(world.objectives.reward, record)


def _start(world: World) -> SurrogateCluster:
    deployment = dense_deployment(parse_deployment_key(world.initial_key))
    return SurrogateCluster(world.cluster, deployment, columns=True)


def _search(world: World, window: Trace, keys: tuple[str, ...], by: By) -> Search:
    def plan(snapshot: ClusterSnapshot, key: str) -> SwitchPlan | None:
        target, name = parse_deployment_key(key), f"hindsight-{snapshot.now_s:g}"
        try:
            return plan_to(world.cluster, snapshot, target, name)
        except InfeasibleError:
            return None

    ledger = ColumnLedger(world.objectives.reward, window, 0.0)
    cost = ledger.loss if by == "utility" else request_seconds
    return Search(keys, plan, lambda a, b: future_of(window, 0.0, a, b), cost)


def _record(world: World, window: Trace, course: Course) -> WindowRecord:
    return WindowRecord(
        window,
        TrafficColumns.join(list(course.traffic)),
        window.duration_s,
        world.cell.devices * window.duration_s,
        world.initial_key,
        course.switches,
        0.0,
    )
