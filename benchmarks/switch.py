"""Live switches under load, beside the same transitions by reload and by restart.

A random-weight Llama of 1.1 GB on four workers; streams of requests run at any time. Twelve live
switches between nine deployments, each after a window of steady load. Clients are in the engine's
process and note when each token reaches them. An affected request is one whose replica goes; its
gap is the one up to its first token from another replica. Bytes over a link are counted where
workers send them; the least bytes and the most loaded port come from code apart from the planner's
(switching/bound.py). A port's bandwidth is what raw gloo sends between as many pairs of other
processes reach just before the switch, while the load runs on the same cores. Reload: the replicas
that go are dropped and the new ones loaded from disk, in living processes. Restart: a new engine
process, with the same requests. Either ends, like a switch, when the last affected request has its
next token: that span is compared as `speedup_vs_`; how long that request waits between two tokens
meanwhile, as `longest_gap_ratio_`. Ratios of gaps and percentiles are over all transitions taken
together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from switching.bound import Checkpoint, least_bytes, port_load, roles_of
from switching.load import Load
from switching.model import make_model
from switching.ports import Ports
from switching.reload import drop_page_cache, reload_replicas, restart, warm_page_cache
from switching.report import print_tables, summarise
from switching.settings import NUM_WORKERS, QUICK, Settings, engine_config
from switching.transition import (
    Bench,
    Passage,
    Steady,
    WeightTraffic,
    observe,
    pass_by,
    spread,
    switch_live,
)

from engine.build import build_runtime
from engine.cluster import KvCostParams, dense_deployment, parse_deployment_key
from engine.facade import EngineCluster
from engine.request import SamplingParams

WARM_UP_S = 120.0

# ------------------------------------------------------------------------------------
# Live switches


def build_bench(settings: Settings, cluster: EngineCluster, folder: Path, ports: Ports) -> Bench:
    """Starts the load, lets it become steady, and measures what binds requests."""
    load, traffic = Load(cluster.runtime, settings.load), WeightTraffic()
    traffic.watch(cluster.runtime)
    cluster.run(load.start())
    deadline_s = time.monotonic() + WARM_UP_S
    while not all(c.token_s for c in load.clients[: settings.load.num_streams]):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the first requests had no token within {WARM_UP_S} s")
        time.sleep(0.1)
    link = ports.bytes_per_s(NUM_WORKERS, settings.ring_bytes)
    unknown = KvCostParams(link, 1.0, 1.0)
    bench = Bench(cluster, load, folder, traffic, unknown, link)
    steady = observe(bench, settings.steady_s)
    bench.kv = KvCostParams(link, load.prefill_tokens_per_s(), steady.step_s)
    return bench


def measure_switch(bench: Bench, key: str, settings: Settings, ports: Ports) -> dict[str, Any]:
    """One live switch after a window of steady load; the row of the JSON file."""
    before, checkpoint = bench.runtime.deployment, Checkpoint.read(bench.folder)
    steady = observe(bench, settings.steady_s)
    plan, plan_ms = bench.plan(key)
    current, target = roles_of(before, NUM_WORKERS), roles_of(plan.target, NUM_WORKERS)
    least = least_bytes(checkpoint, current, plan.target.configs)
    heaviest = port_load(checkpoint, current, target)
    port_bytes_per_s = None
    if heaviest.num_receivers:
        port_bytes_per_s = ports.bytes_per_s(heaviest.num_receivers, settings.ring_bytes)
        bench.link_bytes_per_s = port_bytes_per_s
        plan, _ = bench.plan(key)  # with the bandwidth of just now, in its prediction
        time.sleep(settings.settle_s)
    bench.traffic.take()
    passage = switch_live(bench, plan)
    traffic, ticket = bench.traffic.take(), passage.ticket
    assert ticket is not None
    moved = traffic.sent_bytes or ticket.weight_bytes
    bound_s = heaviest.nbytes / port_bytes_per_s if port_bytes_per_s else 0.0
    kept = [r.replica_id for r in before.replicas if r in plan.target.replicas]
    leaving = [r.replica_id for r in before.replicas if r.replica_id not in kept]
    return {
        "from": before.key,
        "to": plan.target.key,
        "mode": str(getattr(ticket, "mode", "live")),
        "replicas_kept": len(kept),
        "plan_ms": plan_ms,
        "phase_s": dict(ticket.phase_s),
        "weight_bytes": moved,
        "weight_bytes_least": least,
        "bytes_over_bound": moved / least if least else float(max(moved, 1)),
        "ticket_moved_bytes": ticket.moved_bytes,
        "kv_bytes": ticket.kv_bytes,
        "kv_rounds": ticket.num_kv_rounds,
        "migrated": ticket.num_migrated,
        "recomputed": ticket.num_recomputed,
        "drained": ticket.num_drained,
        "port_bytes_per_s": port_bytes_per_s,
        "receivers": heaviest.num_receivers,
        "port_bytes": heaviest.nbytes,
        "makespan_s": traffic.makespan_s if least else None,
        "makespan_bound_s": bound_s if least else None,
        "makespan_over_bound": traffic.makespan_s / bound_s if least else None,
        "predicted_s": plan.predicted_s,
        "pause_s": ticket.pause_s,
        "step_s": steady.step_s,
        **passage_figures(passage, steady, leaving, kept),
    }


def passage_figures(
    passage: Passage, steady: Steady, leaving: list[int], kept: list[int]
) -> dict[str, Any]:
    """What clients saw of a transition, beside the steady load just before."""
    return {
        "seconds": passage.seconds,
        "affected": passage.num_affected,
        "pauses_s": passage.pauses_s,
        "gap_affected_s": spread(passage.pauses_s),
        "gaps_until_next_token_affected_s": spread(passage.gaps_affected_s),
        "gap_affected_steady_s": spread(steady.of(leaving)),
        "gaps_unaffected_s": passage.gaps_unaffected_s,
        "gap_unaffected_s": spread(passage.gaps_unaffected_s),
        "gaps_unaffected_steady_s": steady.of(kept),
        "gap_unaffected_steady_s": spread(steady.of(kept)),
        "tokens": passage.num_tokens,
        "before_commit_s": passage.commit_s - passage.command_s,
        "after_commit_s": passage.end_s - passage.commit_s,
        "tokens_per_s_before": steady.tokens_per_s,
    }


def walk(bench: Bench, settings: Settings, ports: Ports) -> list[dict[str, Any]]:
    """All live switches. What the throughput would have been without the switch: that of before up
    to the commit, that of after from there on."""
    rows: list[dict[str, Any]] = []
    for key in settings.walk[1:]:
        rows.append(measure_switch(bench, key, settings, ports))
        row = rows[-1]
        print(f"{row['from']} -> {row['to']}: {row['seconds']:.2f} s", file=sys.stderr, flush=True)
        time.sleep(settings.settle_s)
    rates = [row["tokens_per_s_before"] for row in rows[1:]]
    rates.append(observe(bench, settings.steady_s).tokens_per_s)
    for row, after in zip(rows, rates, strict=True):
        expected = row["tokens_per_s_before"] * row["before_commit_s"]
        expected += after * row["after_commit_s"]
        row["tokens_per_s_after"] = after
        row["throughput_lost_frac"] = 1.0 - row["tokens"] / expected
    return rows


# ------------------------------------------------------------------------------------
# The same without a live switch


def reload_circles(
    bench: Bench, settings: Settings, rows: list[dict[str, Any]], enough_at_s: float
) -> None:
    """Adds `reload_warm` and `reload_dropped` to the rows chosen for it: to those of the first
    circle, and to others while there is time."""
    for number, circle in enumerate(settings.reloaded):
        if number and time.monotonic() > enough_at_s:
            return
        if bench.runtime.deployment.key != settings.walk[circle[0]]:
            switch_live(bench, bench.plan(settings.walk[circle[0]])[0])
        for kind, prepare in (("warm", warm_page_cache), ("dropped", drop_page_cache)):
            for index in circle:
                time.sleep(settings.settle_s)
                share = prepare(bench.folder)
                figures = reload_once(bench, settings, index, f"reload-{kind}-{index}")
                rows[index][f"reload_{kind}"] = figures | {"cached_before": share}


def reload_once(bench: Bench, settings: Settings, index: int, nonce: str) -> dict[str, Any]:
    """The step `index` of the walk as a reload."""
    steady = observe(bench, settings.steady_s / 2)
    before, plan = bench.runtime.deployment, bench.plan(settings.walk[index + 1])[0]
    passage = pass_by(bench, plan.target, partial(reload_replicas, bench.runtime, plan, nonce))
    kept = [r.replica_id for r in before.replicas if r in plan.target.replicas]
    leaving = [r.replica_id for r in before.replicas if r.replica_id not in kept]
    print(f"{nonce}: {passage.seconds:.2f} s", file=sys.stderr, flush=True)
    return passage_figures(passage, steady, leaving, kept)


def restart_all(
    settings: Settings,
    folder: Path,
    rows: list[dict[str, Any]],
    quick: bool,
    enough_at_s: float,
) -> None:
    """Adds `restart` to the rows chosen for it: every request is affected, at half its length.
    As with reloads, the first is always made."""
    prompts, outputs = settings.load.prompt_tokens, settings.load.output_tokens
    context = sum(prompts) // 2 + sum(outputs) // 4
    for number, index in enumerate(settings.restarted):
        if number and time.monotonic() > enough_at_s:
            return
        target = dense_deployment(parse_deployment_key(settings.walk[index + 1]))
        warm_page_cache(folder)
        contexts = [context] * settings.load.num_streams
        rows[index]["restart"] = restart(Path(__file__), folder, target, contexts, quick)
        print(f"restart: {rows[index]['restart']}", file=sys.stderr, flush=True)


def run_restarted(arguments: dict[str, Any]) -> None:
    """The new process: serve one token for every context; prints when the first and the last came,
    on the system's monotonic clock."""
    settings = QUICK if arguments["quick"] else Settings()
    config = engine_config(settings, make_model(settings.shape), arguments["deployment"])
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    with EngineCluster(lambda: build_runtime(config)) as cluster:

        async def token_s(index: int, length: int) -> float:
            prompt = [(7 * i + 31 * index) % settings.shape.vocab_size for i in range(length)]
            async for _ in cluster.runtime.generate(f"r{index}", prompt, params):
                continue
            return time.monotonic()

        async def serve() -> list[float]:
            return await asyncio.gather(
                *(token_s(i, length) for i, length in enumerate(arguments["contexts"]))
            )

        times = cluster.run(serve(), 240.0)
    print(json.dumps([min(times), max(times)]))


# ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="51 MB, four switches, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, per transition")
    parser.add_argument("--restarted", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restarted:
        run_restarted(json.loads(args.restarted))
        return
    settings = QUICK if args.quick else Settings()
    folder = make_model(settings.shape)
    config = engine_config(settings, folder, settings.walk[0])
    enough_at_s = time.monotonic() + settings.enough_s
    load_average = os.getloadavg()[0]  # of whatever else this machine does
    ports = Ports(NUM_WORKERS)
    try:
        with EngineCluster(lambda: build_runtime(config)) as cluster:
            bench = build_bench(settings, cluster, folder, ports)
            rows = walk(bench, settings, ports)
            reload_circles(bench, settings, rows, enough_at_s)
            cluster.run(bench.load.stop())
            lost, ended = bench.load.num_lost(), bench.load.num_ended()
    finally:
        ports.close()
    restart_all(settings, folder, rows, args.quick, enough_at_s)
    summary = summarise(rows, lost)
    if args.json:
        facts = {
            "summary": summary,
            "requests_ended": ended,
            "model_bytes": sum(Checkpoint.read(folder).nbytes.values()),
            "load_average_before": load_average,
        }
        args.json.write_text(json.dumps(facts | {"transitions": rows}, indent=1))
    print_tables(rows, ended)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
