"""What a plan costs and what it is worth: exact planner, OServe's search, every deployment in turn.

H100s with the step times of configs/profiles, 4, 8 or 16 workload types (k-means on the lengths of
the embedded generator, cut to the model's context), mixes drawn from Dirichlet(0.6) with the
planner's floor. All solvers get the same instances in one run on one machine:

- exact: the mixed-integer programme (`controller.milp`);
- oserve: the flow-guided search of arXiv 2602.12151, written anew (`controller.flow_search`), its
  flow compiled by scipy and each deployment judged once; `oserve_exact` judges by the exact
  assignment, as a flow would whose requests may need other units at every replica;
- exhaustive: every deployment, by the exact assignment.

Headroom is the multiple of the rates that the deployment can serve with the best routing; that of
the search by its own flow's routing is told apart. Ratios are the exact planner's over the other's,
the worse of the MILP and of the planner's own answer (`Planner.optimum`). Up to 32 devices that one
comes from a library, which is listed with a pool's first question (`listing_ms_16`); how long it
takes for a mix from then on is `planned_ms_16_p50`, and the speedup is the search's median time
over that; `speedup_of_milp_vs_oserve_16` is over the MILP's. `library_ms` is the median time of one
tick's candidates (`Planner.propose`) on 16 devices while traffic drifts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from controller.build import load_profiled_cluster
from controller.deployments import counts_of
from controller.flow_search import search_deployment, solve_search
from controller.milp import solve_milp
from controller.planner import Planner
from controller.predictor import Forecast
from controller.solvers import headrooms, solve_exhaustive
from engine.cluster import ClusterSnapshot, Routing, WorkloadTyping, dense_deployment
from engine.profile import ProfiledCluster
from envs.slo_rates import default_typing

Floats = NDArray[np.float64]
PROFILES = Path(__file__).parents[1] / "configs" / "profiles"
MODELS = ("h100-llama-2-70b", "h100-llama-30b", "h100-opt-66b")
SIZES, COMPARED, TYPES = (8, 16, 64, 256, 1024, 4096), (8, 16), (4, 8, 16)
MIXES, QUICK_MIXES, SPREAD = 20, 4, 0.6
TICKS, TICK_DEVICES, TICK_TYPES, DRIFT = 200, 16, 4, 0.1
GOALS = {
    "solve_ms_16_p50": 20.0,
    "solve_ms_1024_p50": 50.0,
    "solve_ms_4096_max": 500.0,
    "gap_to_exhaustive_max": 0.0,
    "speedup_vs_oserve_16": 100.0,
    "headroom_vs_oserve_min": 1.0,
    "library_ms": 0.2,
}


@dataclass(frozen=True, slots=True)
class Found:
    """One instance. The comparison is nan where it was not made."""

    devices: int
    types: int
    exact_ms: float
    oserve_ms: float = float("nan")
    exhaustive_ms: float = float("nan")
    gap: float = float("nan")  # how much more headroom exhaustive finds, relative
    vs_oserve: float = float("nan")
    vs_own_routing: float = float("nan")
    search_ms: float = float("nan")  # of oserve_exact
    vs_search: float = float("nan")
    planned_ms: float = float("nan")


def build_planner(cluster: ProfiledCluster, devices: int, typing: WorkloadTyping) -> Planner:
    return Planner(replace(cluster, spec=replace(cluster.spec, num_devices=devices)), typing)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Milliseconds, and what it returned."""
    begun_s = time.perf_counter()
    found = function(*arguments)
    return 1000 * (time.perf_counter() - begun_s), found


def measure(planner: Planner, mixes: list[Floats]) -> list[Found]:
    """One solver after the other, each on all the mixes."""
    service, sizes = planner.service_rates(), [c.num_devices for c in planner.configs]
    devices, rho = planner.cluster.spec.num_devices, planner.config.max_utilisation
    scorer = planner.scorer
    every = [scorer.rates(scorer.rates_key(mix)) / service for mix in mixes]
    instances = [(loads, sizes, devices, rho) for loads in every]
    exact = [timed(solve_milp, *instance) for instance in instances]
    results = [Found(devices, len(mix), ms) for mix, (ms, _) in zip(mixes, exact, strict=True)]
    if devices not in COMPARED:
        return results
    planned = [timed(planner.optimum, mix) for mix in mixes]
    flows = [
        timed(search_deployment, *instance, np.random.default_rng(seed))
        for seed, instance in enumerate(instances)
    ]
    searched = [timed(solve_search, *instance, seed) for seed, instance in enumerate(instances)]
    exhaustive = [timed(solve_exhaustive, *instance) for instance in instances]
    for i, loads in enumerate(every):
        (planned_ms, configs), (oserve_ms, plan) = planned[i], flows[i]
        answers = exact[i][1], counts_of(configs, planner.configs), plan.counts
        candidates = [*answers, searched[i][1], exhaustive[i][1]]
        milp, library, theirs, search, most = headrooms(loads, candidates, rho).tolist()
        ours = min(milp, library)
        results[i] = replace(
            results[i],
            oserve_ms=oserve_ms,
            exhaustive_ms=exhaustive[i][0],
            gap=most / ours - 1.0,
            vs_oserve=ours / theirs,
            vs_own_routing=ours / plan.assignment.theta,
            search_ms=searched[i][0],
            vs_search=ours / search,
            planned_ms=planned_ms,
        )
    return results


def measure_ticks(planner: Planner, ticks: int) -> float:
    """Median ms of `propose` at rates that drift by DRIFT a tick, so that few are seen again."""
    rng = np.random.default_rng(0)
    rates = np.full(len(planner.service_rates()[0]), 1.0)
    deployment = dense_deployment(planner.optimum(rates))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    snapshot = ClusterSnapshot(0.0, 0, deployment, routing, (), None)
    found_ms = []
    for _ in range(ticks):
        rates = rates * np.exp(DRIFT * rng.standard_normal(len(rates)))
        mid, high = tuple(rates.tolist()), tuple((1.3 * rates).tolist())
        forecast = Forecast(mid, mid, high, (0.0,) * len(mid))
        found_ms.append(timed(planner.propose, snapshot, forecast)[0])
    return float(np.median(found_ms))


def summarise(found: list[Found]) -> dict[str, object]:
    """The figures of some instances."""
    exact_ms = [f.exact_ms for f in found]
    figures: dict[str, object] = {
        "solve_ms_p50": round(float(np.median(exact_ms)), 2),
        "solve_ms_max": round(max(exact_ms), 2),
    }
    compared = [f for f in found if f.devices in COMPARED]
    if compared:
        ratios = np.array([f.vs_oserve for f in compared])
        own = np.array([f.vs_own_routing for f in compared])
        searched = np.array([f.vs_search for f in compared])
        figures |= {
            "oserve_ms_p50": round(float(np.median([f.oserve_ms for f in compared])), 2),
            "oserve_ms_max": round(max(f.oserve_ms for f in compared), 2),
            "exhaustive_ms_p50": round(float(np.median([f.exhaustive_ms for f in compared])), 2),
            "gap_to_exhaustive_max": round(max(f.gap for f in compared), 6),
            "headroom_vs_oserve_mean": round(float(ratios.mean()), 4),
            "headroom_vs_oserve_min": round(float(ratios.min()), 6),
            "headroom_vs_oserve_max": round(float(ratios.max()), 4),
            "headroom_vs_oserve_own_routing_mean": round(float(own.mean()), 4),
            "oserve_exact_ms_p50": round(float(np.median([f.search_ms for f in compared])), 2),
            "headroom_vs_oserve_exact_mean": round(float(searched.mean()), 4),
            "headroom_vs_oserve_exact_min": round(float(searched.min()), 6),
            "headroom_vs_oserve_exact_max": round(float(searched.max()), 4),
        }
    return figures


def show(results: dict[tuple[str, int, int], list[Found]]) -> None:
    columns = "model, devices, types, exact ms, max, oserve ms, oserve_exact ms, exhaustive ms"
    columns += ", vs oserve, max, vs oserve_exact, gap"
    table = Table(*columns.split(", "))
    for (model, devices, types), found in results.items():
        figures = summarise(found)
        names = ("solve_ms_p50", "solve_ms_max", "oserve_ms_p50", "oserve_exact_ms_p50")
        names += ("exhaustive_ms_p50", "headroom_vs_oserve_mean", "headroom_vs_oserve_max")
        names += ("headroom_vs_oserve_exact_mean", "gap_to_exhaustive_max")
        table.add_row(model, str(devices), str(types), *(str(figures.get(n, "")) for n in names))
    Console(width=140).print(table)


def show_goals(figures: dict[str, object]) -> None:
    table = Table("figure", "found", "goal")
    for name, goal in GOALS.items():
        table.add_row(name, str(figures[name]), f"{goal:g}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, four mixes instead of 20")
    args = parser.parse_args()
    models, mixes = (MODELS[:1], QUICK_MIXES) if args.quick else (MODELS, MIXES)
    results: dict[tuple[str, int, int], list[Found]] = {}
    listing_ms: list[float] = []  # on TICK_DEVICES
    clusters = {model: load_profiled_cluster(PROFILES / f"{model}.json") for model in models}
    for model, cluster in clusters.items():
        for types in TYPES:
            typing = default_typing(cluster, types)
            drawn = list(np.random.default_rng(types).dirichlet(np.full(types, SPREAD), mixes))
            for devices in SIZES:
                planner = build_planner(cluster, devices, typing)
                if not results:
                    measure(planner, drawn[:1])  # imports and first calls are not timed
                first_ms, _ = timed(planner.optimum, np.full(types, 1.0))
                listing_ms += [first_ms] if devices == TICK_DEVICES else []
                results[model, devices, types] = measure(planner, drawn)
    show(results)
    everything = [f for found in results.values() for f in found]
    sizes = {s: summarise([f for f in everything if f.devices == s]) for s in SIZES}
    overall = summarise(everything)
    first = clusters[MODELS[0]]
    ticking = build_planner(first, TICK_DEVICES, default_typing(first, TICK_TYPES))
    milp_ms, planned_ms, oserve_ms = (
        float(np.median([getattr(f, name) for f in everything if f.devices == 16]))
        for name in ("exact_ms", "planned_ms", "oserve_ms")
    )
    figures = {
        "benchmark": "planner",
        "solve_ms_16_p50": sizes[16]["solve_ms_p50"],
        "solve_ms_1024_p50": sizes[1024]["solve_ms_p50"],
        "solve_ms_4096_max": sizes[4096]["solve_ms_max"],
        "gap_to_exhaustive_max": overall["gap_to_exhaustive_max"],
        "oserve_ms_16_p50": sizes[16]["oserve_ms_p50"],
        "planned_ms_16_p50": round(planned_ms, 4),
        "listing_ms_16": round(float(np.median(listing_ms)), 2),
        "speedup_vs_oserve_16": round(oserve_ms / planned_ms, 2),
        "speedup_of_milp_vs_oserve_16": round(oserve_ms / milp_ms, 2),
        "headroom_vs_oserve_mean": overall["headroom_vs_oserve_mean"],
        "headroom_vs_oserve_min": overall["headroom_vs_oserve_min"],
        "oserve_exact_ms_16_p50": sizes[16]["oserve_exact_ms_p50"],
        "headroom_vs_oserve_exact_mean": overall["headroom_vs_oserve_exact_mean"],
        "headroom_vs_oserve_exact_min": overall["headroom_vs_oserve_exact_min"],
        "library_ms": round(measure_ticks(ticking, TICKS // 4 if args.quick else TICKS), 3),
        "sizes": sizes,
    }
    show_goals(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
