"""`python -m envs.fit_gpu --profiles DIR`: fits GPU profiles to published operator timings.

Reads the operator timings of Vidur (github.com/microsoft/vidur, data/profiling, MIT licence) as
compute_NODE_MODEL_mlp.csv.gz and network_NODE_dgx_{all_reduce,send_recv}.csv.gz; writes a profile
per node and model and `gpu_residuals.{json,md}`, what the fits are worth.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.architectures import Sizes
from engine.profile import ProfiledCluster
from engine.shards import num_kv_blocks
from engine.step_fit import Residual
from envs.surrogate.gpu import (
    KINDS,
    Curve,
    Floats,
    Roofline,
    fit_curve,
    fit_roofline,
    operator_work,
)
from envs.surrogate.gpu_profile import ACCELERATORS, DEGREES, MODELS, GpuNode, gpu_profile

MEASURED = {
    "h100": ("Llama-2-7b-hf", "Llama-2-70b-hf"),
    "a100": ("Meta-Llama-3-8B", "Meta-Llama-3-70B"),
}
MAX_TOKENS = 4096  # longer steps are not modelled
MS = 1e-3


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one kind of operator of one model: columns of equal length."""

    tp: Floats
    tokens: Floats
    flops: Floats
    nbytes: Floats
    times_s: Floats


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def read_operators(path: Path) -> dict[str, Measured]:
    """Median times by kind of operator."""
    rows = [r for r in _rows(path) if float(r["num_tokens"]) <= MAX_TOKENS]
    return {kind: _measured(rows, kind) for kind in KINDS}


def _measured(rows: Iterable[Mapping[str, str]], kind: str) -> Measured:
    found = []
    for row in rows:
        time_s = float(row[f"time_stats.{kind}.median"]) * MS
        heads, hidden, vocab = (int(row[k]) for k in ("n_head", "n_embd", "vocab_size"))
        kv, inner = int(row["n_kv_head"]), int(row["n_expanded_embd"])
        sizes = Sizes(1, heads, kv, hidden // heads, hidden, inner, vocab, MAX_TOKENS)
        tp, tokens = int(row["num_tensor_parallel_workers"]), float(row["num_tokens"])
        flops, nbytes = operator_work(kind, sizes, row["use_gated_mlp"] == "True", tp, tokens)
        found.append((tp, tokens, float(flops), float(nbytes), time_s))
    return Measured(*np.array(found).T)


def read_collective(path: Path, workers: int, devices_per_node: int) -> tuple[Floats, Floats]:
    """(bytes, median seconds) of one collective among that many devices."""
    name = "send_recv" if "send_recv" in path.name else "all_reduce"
    rows = [
        (float(r["size"]), float(r[f"time_stats.{name}.median"]) * MS)
        for r in _rows(path)
        if (int(r["num_workers"]), int(r["devices_per_node"])) == (workers, devices_per_node)
    ]
    sizes, times = np.array(rows).T
    return sizes, times


def fit_operators(models: Iterable[Mapping[str, Measured]]) -> dict[str, Roofline]:
    """One roofline per kind, to the measurements of all these models together."""
    models = list(models)
    return {
        kind: fit_roofline(
            *(
                np.concatenate([getattr(m[kind], column) for m in models])
                for column in ("flops", "nbytes", "times_s")
            )
        )
        for kind in KINDS
    }


def errors(predicted: Floats, measured: Floats) -> dict[str, float]:
    """The `Residual` as the report has it."""
    residual = asdict(Residual.of(predicted, measured))
    return {name: round(value, 4) for name, value in residual.items()}


def residuals(model: Mapping[str, Measured], fitted: Mapping[str, Roofline]) -> dict[str, Any]:
    """Errors by kind and tp, and of the sum of all kinds at each (tp, tokens) ("layer")."""
    table: dict[str, Any] = {}
    totals: dict[tuple[float, float], Floats] = {}
    for kind, m in model.items():
        predicted = fitted[kind].seconds(m.flops, m.nbytes)
        table[kind] = {
            f"tp{tp}": errors(predicted[m.tp == tp], m.times_s[m.tp == tp]) for tp in DEGREES
        }
        for tp, tokens, *times in zip(m.tp, m.tokens, predicted, m.times_s, strict=True):
            totals[tp, tokens] = totals.get((tp, tokens), np.zeros(2)) + np.array(times)
    table["layer"] = {
        f"tp{tp}": errors(*np.array([t for key, t in totals.items() if key[0] == tp]).T)
        for tp in DEGREES
    }
    return table


def fit_node(folder: Path, name: str) -> tuple[GpuNode, dict[str, Any]]:
    """The fitted node and its residuals."""
    models = {
        model: read_operators(folder / f"compute_{name}_{model}_mlp.csv.gz")
        for model in MEASURED[name]
    }
    fitted = fit_operators(models.values())
    report: dict[str, Any] = {"operators": {}, "left_out": {}, "collectives": {}}
    for model, measured in models.items():
        others = fit_operators(m for other, m in models.items() if other != model)
        report["operators"][model] = residuals(measured, fitted)
        report["left_out"][model] = residuals(measured, others)

    def curve(kind: str, workers: int) -> Curve:
        path = folder / f"network_{name}_dgx_{kind}.csv.gz"
        sizes, times = read_collective(path, workers, workers)
        found = fit_curve(sizes.tolist(), times.tolist())
        report["collectives"][f"{kind} {workers}"] = errors(found.seconds(sizes), times)
        return found

    all_reduce = {tp: curve("all_reduce", tp) for tp in DEGREES[1:]}
    return GpuNode(ACCELERATORS[name], fitted, all_reduce, curve("send_recv", 2)), report


def kv_tokens(cluster: ProfiledCluster) -> dict[str, int]:
    """By configuration: tokens whose keys and values one replica holds."""
    spec = cluster.spec
    return {c.key: num_kv_blocks(spec, c) * spec.block_size for c in cluster.profile.configs}


def markdown(report: Mapping[str, Any]) -> str:
    """Tables for people; percent, |error| as p50 / p90."""
    lines = [
        "# Residuals of the GPU fits",
        "",
        "Written by `python -m envs.fit_gpu`. Percent of |predicted / measured - 1|, median / 90th "
        "percentile, over 1 to 4096 tokens. *Left out*: the model was predicted from the other "
        "measured one of its node. *Layer* is the sum of its operators.",
    ]
    header = ["| operator | " + " | ".join(f"tp {tp}" for tp in DEGREES) + " |"]
    header.append("|---" * (len(DEGREES) + 1) + "|")
    for node, parts in report.items():
        for model, table in parts["operators"].items():
            lines += ["", f"## {node}: {model}", "", *header]
            rows = [*table.items(), ("layer, left out", parts["left_out"][model]["layer"])]
            lines += [_line(name, row.values()) for name, row in rows]
        lines += ["", f"## {node}: messages", "", "| collective, devices | error |", "|---|---|"]
        lines += [_line(name, [row]) for name, row in parts["collectives"].items()]
        lines += [
            "",
            f"## {node}: KV capacity",
            "",
            "| model | tokens a replica holds |",
            "|---|---|",
        ]
        for model, capacity in parts["kv_tokens"].items():
            cells = ", ".join(f"{key}: {tokens}" for key, tokens in capacity.items())
            lines.append(f"| {model} | {cells} |")
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Iterable[Mapping[str, float]]) -> str:
    return (
        f"| {name} | "
        + " | ".join(f"{100 * c['p50']:.1f} / {100 * c['p90']:.1f}" for c in cells)
        + " |"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m envs.fit_gpu", description="Fit GPU profiles.")
    parser.add_argument("--profiles", type=Path, required=True, help="folder of measured timings")
    parser.add_argument("--out", type=Path, default=Path("configs/profiles"), help="folder")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {}
    try:
        for name in MEASURED:
            node, report[name] = fit_node(args.profiles, name)
            report[name]["kv_tokens"] = {}
            for model in MODELS:
                cluster = gpu_profile(node, model)
                path = args.out / f"{name}-{model}.json"
                report[name]["kv_tokens"][model] = kv_tokens(cluster)
                path.write_text(json.dumps(cluster.to_json(), separators=(",", ":")) + "\n")
                print(f"{path}: {', '.join(c.key for c in cluster.profile.configs)}")
    except OSError as error:
        parser.exit(2, f"error: cannot read the timings: {error}\n")
    (args.out / "gpu_residuals.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "gpu_residuals.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
