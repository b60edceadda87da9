"""What planning a switch costs and what the plan saves: Llama-2-70B shapes, 8 devices per node.

Every transition is planned on 16 to 1024 devices (the same deployment, repeated) and set beside

- same index: new rank i on device i, whatever is there;
- greedy: a replica that keeps its configuration stays, the others take free devices in order, and
  every missing interval comes from the holder with the least to send so far. That is how OServe
  (arXiv 2602.12151, its section on switching) chooses senders; it gives no mapping of ranks to
  devices, so this one is ours;
- reload: every new rank reads its whole slice.

Bytes are counted over all devices. Seconds are the largest load of a port; those of greedy are
computed up to 64 devices. Planning is timed cold: no cache knows the model. It runs on one core,
so that its CPU seconds are what an idle core would take. Ratios are ours over theirs, 1 where both
move nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from engine.cluster import (
    ClusterSpec,
    Deployment,
    KvCostParams,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    TensorSpec,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.pieces import device_groups, divide
from engine.migration.plan import link_seconds, plan_switch
from engine.migration.roles import held_shards, role_table

LAYERS, HIDDEN, INTERMEDIATE, VOCAB, KV_ROWS = 80, 8192, 28672, 32000, 1024
NODE, CHUNK_BYTES = 8, 64 << 20
KV = KvCostParams(50e9, 10_000.0, 0.03)
SIZES = (16, 64, 256, 1024)
GREEDY_SECONDS_UP_TO = 64  # devices
TRANSITIONS = (  # on 16 devices, repeated on more
    ("4xtp4pp1", "2xtp8pp1"),
    ("4xtp4pp1", "1xtp8pp1+2xtp4pp1"),
    ("2xtp8pp1", "4xtp4pp1"),
    ("2xtp8pp1", "1xtp8pp1+2xtp4pp1"),
    ("4xtp4pp1", "4xtp2pp2"),
    ("2xtp8pp1", "1xtp8pp1+2xtp2pp2"),
    ("2xtp4pp2", "2xtp8pp1"),
    ("1xtp8pp1+2xtp4pp1", "1xtp4pp1+2xtp2pp2"),
    ("1xtp8pp2", "2xtp8pp1"),
    ("1xtp8pp1+1xtp4pp1", "1xtp8pp1+2xtp4pp1"),
    ("1xtp8pp1", "2xtp8pp1"),
    ("4xtp4pp1", "3xtp4pp1+1xtp2pp2"),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One transition on one pool. Seconds of greedy are 0 where not computed."""

    num_devices: int
    plan_s: float
    cpu_s: float
    num_transfers: int
    nbytes: int
    bound_bytes: int
    seconds: float
    bound_s: float
    same_index_bytes: int
    greedy_bytes: int
    greedy_s: float
    reload_bytes: int


def llama_70b(name: str) -> ModelSpec:
    tensors = [TensorSpec("embed", (VOCAB, HIDDEN), "embed")]
    for layer in range(LAYERS):
        shapes = {
            "q": ((HIDDEN, HIDDEN), "layer", 0),
            "k": ((KV_ROWS, HIDDEN), "kv", 0),
            "v": ((KV_ROWS, HIDDEN), "kv", 0),
            "o": ((HIDDEN, HIDDEN), "layer", 1),
            "gate": ((INTERMEDIATE, HIDDEN), "layer", 0),
            "up": ((INTERMEDIATE, HIDDEN), "layer", 0),
            "down": ((HIDDEN, INTERMEDIATE), "layer", 1),
            "input_norm": ((HIDDEN,), "layer", None),
            "post_norm": ((HIDDEN,), "layer", None),
        }
        tensors += [TensorSpec(f"{layer}.{n}", s, r, layer, d) for n, (s, r, d) in shapes.items()]
    tensors += [TensorSpec("norm", (HIDDEN,), "norm"), TensorSpec("head", (VOCAB, HIDDEN), "head")]
    return ModelSpec(name, LAYERS, 64, 8, 128, HIDDEN, VOCAB, 4096, 2, tuple(tensors))


def cluster(num_devices: int, name: str) -> ClusterSpec:
    return ClusterSpec(num_devices, NODE, 80 * 10**9, 50e9, 16, llama_70b(name), 256, 8192)


def repeated(key: str, times: int) -> tuple[ParallelConfig, ...]:
    return tuple(c for c in parse_deployment_key(key) for _ in range(times))


def missing_bytes(model: ModelSpec, old: Deployment, new: Deployment) -> int:
    table = role_table(model, {*old.configs, *new.configs})
    groups = device_groups(table, old, new)
    return sum(int(table.missing[g.needed, g.held]) * len(g.devices) for g in groups)


def greedy_mapping(
    old: Deployment, target: tuple[ParallelConfig, ...], num_devices: int
) -> Deployment:
    wanted = Counter(target)
    kept = []
    for replica in old.replicas:
        if wanted[replica.parallel]:
            wanted[replica.parallel] -= 1
            kept.append(replica)
    used = {d for r in kept for d in r.placement.devices}
    free = iter([d for d in range(num_devices) if d not in used])
    coming = [
        Replica(1_000_000 + i, c, Placement(tuple(next(free) for _ in range(c.num_devices))))
        for i, c in enumerate(wanted.elements())
    ]
    return Deployment((*kept, *coming))


def greedy_seconds(spec: ClusterSpec, old: Deployment, new: Deployment) -> float:
    """Largest port load when every tensor's interval comes from its least-loaded holder."""
    table = role_table(spec.model, {*old.configs, *new.configs})
    groups = device_groups(table, old, new)
    sent = np.zeros(spec.num_devices)
    received = np.zeros(spec.num_devices)
    for piece in divide(table, groups):
        holders = np.array([d for g in piece.holders for d in groups[g].devices])
        for c, start, stop in piece.intervals:
            nbytes = (stop - start) * table.classes[c].row_bytes
            for target in [d for g in piece.needers for d in groups[g].devices]:
                for _ in table.classes[c].tensors:
                    source = holders[np.argmin(sent[holders])]
                    sent[source] += nbytes
                    received[target] += nbytes
    return float(max(sent.max(), received.max())) / spec.link_bytes_per_s


def measure(num_devices: int, old_key: str, new_key: str, rounds: int) -> Figures:
    times = num_devices // 16
    target = repeated(new_key, times)
    spec = cluster(num_devices, "70B")
    current = dense_deployment(repeated(old_key, times))
    walls_s, cpus_s = [], []
    for attempt in range(rounds):
        model = replace(spec.model, name=f"70B {num_devices} {old_key} {new_key} {attempt}")
        fresh = replace(spec, model=model)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        plan = plan_switch(fresh, current, 0, target, KV, chunk_bytes=CHUNK_BYTES)
        walls_s.append(time.perf_counter() - wall_s)
        cpus_s.append(time.process_time() - cpu_s)
    mapped = greedy_mapping(current, target, num_devices)
    with_greedy = num_devices <= GREEDY_SECONDS_UP_TO
    needed = held_shards(spec.model, plan.target)
    return Figures(
        num_devices,
        float(np.median(walls_s)),
        float(np.median(cpus_s)),
        len(plan.transfers),
        plan.weight_bytes,
        plan.lower_bound_bytes,
        link_seconds(plan.transfers, spec.link_bytes_per_s),
        plan.lower_bound_s,
        missing_bytes(spec.model, current, dense_deployment(target)),
        missing_bytes(spec.model, current, mapped),
        greedy_seconds(spec, current, mapped) if with_greedy else 0.0,
        sum(s.nbytes for shards in needed.values() for s in shards.values()),
    )


def ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else 1.0


def summarise(found: list[Figures]) -> dict[str, object]:
    """The figures of one pool size, over its transitions."""
    plan_ms = [1000 * f.plan_s for f in found]
    with_greedy = [f for f in found if f.greedy_s]
    figures: dict[str, object] = {
        "plan_ms_p50": round(float(np.median(plan_ms)), 1),
        "plan_ms_max": round(max(plan_ms), 1),
        "plan_cpu_ms_p50": round(1000 * float(np.median([f.cpu_s for f in found])), 1),
        "plan_cpu_ms_max": round(1000 * max(f.cpu_s for f in found), 1),
        "transfers_max": max(f.num_transfers for f in found),
        "bytes_over_bound_max": round(max(ratio(f.nbytes, f.bound_bytes) for f in found), 6),
        "makespan_over_bound_max": round(max(ratio(f.seconds, f.bound_s) for f in found), 4),
    }
    for name, theirs in (
        ("greedy", [f.greedy_bytes for f in found]),
        ("same_index", [f.same_index_bytes for f in found]),
        ("reload", [f.reload_bytes for f in found]),
    ):
        ratios = [ratio(f.nbytes, other) for f, other in zip(found, theirs, strict=True)]
        figures[f"bytes_ratio_vs_{name}_p50"] = round(float(np.median(ratios)), 4)
        figures[f"bytes_ratio_vs_{name}_max"] = round(max(ratios), 4)
    if with_greedy:
        ratios = [ratio(f.seconds, f.greedy_s) for f in with_greedy]
        figures["makespan_ratio_vs_greedy_p50"] = round(float(np.median(ratios)), 4)
    return figures


def show(results: dict[tuple[int, str, str], Figures]) -> None:
    columns = "devices, from, to, plan ms, GB, bound, greedy, same index, reload"
    table = Table(*columns.split(", "), "s", "bound s", "greedy s")
    for (size, old, new), f in results.items():
        nbytes = (f.nbytes, f.bound_bytes, f.greedy_bytes, f.same_index_bytes, f.reload_bytes)
        seconds = (
            f"{f.seconds:.3f}",
            f"{f.bound_s:.3f}",
            f"{f.greedy_s:.3f}" if f.greedy_s else "",
        )
        table.add_row(
            str(size), old, new, f"{1000 * f.plan_s:.0f}", *(f"{n / 1e9:.0f}" for n in nbytes),
            *seconds,
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    args = parser.parse_args()
    rounds = 1 if args.quick else 5
    results = {
        (size, old, new): measure(size, old, new, rounds)
        for size in SIZES
        for old, new in TRANSITIONS
    }
    show(results)
    everything = list(results.values())
    sizes = {size: summarise([f for f in everything if f.num_devices == size]) for size in SIZES}
    overall = summarise(everything)
    merged = results[16, "4xtp4pp1", "2xtp8pp1"]
    figures = {
        "benchmark": "migration_plan",
        "plan_ms_1024": sizes[1024]["plan_ms_p50"],
        "plan_ms_1024_max": sizes[1024]["plan_ms_max"],
        "plan_cpu_ms_1024": sizes[1024]["plan_cpu_ms_p50"],
        "bytes_ratio_vs_greedy_p50": overall["bytes_ratio_vs_greedy_p50"],
        "bytes_ratio_vs_same_index_p50": overall["bytes_ratio_vs_same_index_p50"],
        "bytes_4xtp4_to_2xtp8_on_16": merged.nbytes,
        "sizes": sizes,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
