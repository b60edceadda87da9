"""Memory of the workers beside the bytes of their slices: weights are held once, outside a switch.

Two random models, one twice as large as the other, each served before a live switch, after its
rollback, after the switch, and after the way back, under some traffic. The overhead of a worker is
its PSS less the bytes of its weight slice and those pages of its KV cache that are in memory (a
cache takes them as it is written). A second copy of the weights would make
it grow with the model; `growth` is the largest such slope seen, 1.0 for one copy too many.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from engine.build import build_runtime
from engine.cluster import KvCostParams, SwitchPhase, parse_deployment_key
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.migration.plan import plan_switch
from engine.request import SamplingParams
from engine.shards import rank_shards

START, TARGET = "4xtp1pp1", "2xtp2pp1"
MAX_MODEL_LEN, NUM_KV_TOKENS = 256, 512
MIGRATE = KvCostParams(1e9, 1.0, 0.01)
ANONYMOUS = "/dev/zero"  # what Linux calls the mappings of `engine.memory.lazy_zeros`
STATES = ("started", "after rollback", "after switch", "after switch back")


@dataclass(frozen=True, slots=True)
class Reading:
    """Of all workers in one state: megabytes (1e6), means."""

    pss_mb: float
    rss_mb: float
    slice_mb: float
    kv_mb: float

    @property
    def overhead_mb(self) -> float:
        return self.pss_mb - self.slice_mb - self.kv_mb


def write_model(folder: Path, num_layers: int) -> Path:
    """A Llama with random weights, 13 MB per layer and 16 MB of embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_MODEL_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read_memory(cluster: EngineCluster) -> Reading:
    """PSS and RSS of every worker, the bytes that its rank must hold, and those of its KV cache."""
    runtime, spec, rows = cluster.runtime, cluster.spec, []
    for replica in cluster.snapshot().deployment.replicas:
        for rank, device in enumerate(replica.placement.devices):
            process = psutil.Process(runtime._executor.pid(device))
            memory = process.memory_full_info()
            maps = process.memory_maps(grouped=True)
            kv = sum(m.pss for m in maps if m.path.startswith(ANONYMOUS))
            weights = sum(s.nbytes for s in rank_shards(spec.model, replica.parallel, rank))
            rows.append((memory.pss, memory.rss, weights, kv))
    return Reading(*(np.mean(rows, axis=0) / 1e6).tolist())


async def serve(cluster: EngineCluster, name: str) -> None:
    """Requests on every replica, to their end."""
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    prompt = list(range(1, 65))
    streams = [cluster.runtime.generate(f"{name}-{i}", prompt, params) for i in range(8)]
    for stream in streams:
        async for _ in stream:
            pass


def switch(cluster: EngineCluster, key: str, fail: bool) -> None:
    """A live switch to `key`; with `fail` it rolls back when everything has been moved."""

    def failpoint(name: str) -> None:
        if fail and name == "before_verify":
            raise RuntimeError("asked to fail")

    async def run() -> SwitchPhase:
        runtime = cluster.runtime
        configs = parse_deployment_key(key)
        plan = plan_switch(runtime.spec, runtime.deployment, runtime.epoch, configs, MIGRATE)
        return (await runtime.ended(runtime.apply(plan).ticket_id)).phase

    cluster.runtime.failpoint = failpoint
    phase = cluster.run(run(), 300)
    expected = SwitchPhase.ROLLED_BACK if fail else SwitchPhase.DONE
    if phase is not expected:
        raise RuntimeError(f"the switch to {key} ended as {phase}, expected {expected}")


def measure(model_dir: Path, memory_mb: float) -> list[Reading]:
    """One reading per state."""
    config = EngineConfig(
        model=str(model_dir),
        num_workers=4,
        deployment=START,
        device_memory_mb=memory_mb,
        max_model_len=MAX_MODEL_LEN,
    )
    readings = []
    with EngineCluster(lambda: build_runtime(config)) as cluster:
        for state, key, fail in zip(
            STATES, ("", TARGET, TARGET, START), (False, True, False, False), strict=True
        ):
            if key:
                switch(cluster, key, fail)
            cluster.run(serve(cluster, state), 300)
            readings.append(read_memory(cluster))
    return readings


def growth(small: Reading, large: Reading) -> float:
    """Bytes of overhead per byte of slice."""
    return (large.overhead_mb - small.overhead_mb) / (large.slice_mb - small.slice_mb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="models of 53 and 90 MB")
    args = parser.parse_args()
    layers = (3, 6) if args.quick else (7, 14)
    results: list[list[Reading]] = []
    with tempfile.TemporaryDirectory(prefix="tw-memory-") as folder:
        for num_layers in layers:
            model_dir = write_model(Path(folder) / f"layers-{num_layers}", num_layers)
            file_mb = (model_dir / "model.safetensors").stat().st_size / 1e6
            kv_mb = num_layers * 2 * 512 * 4 * NUM_KV_TOKENS / 1e6
            results.append(measure(model_dir, file_mb + kv_mb + 1.0))
    table = Table("model MB", "state", "PSS MB", "RSS MB", "slice MB", "KV MB", "overhead MB")
    for readings in results:
        for state, r in zip(STATES, readings, strict=True):
            cells = (r.pss_mb, r.rss_mb, r.slice_mb, r.kv_mb, r.overhead_mb)
            table.add_row(f"{readings[0].slice_mb:.0f}", state, *(f"{c:.1f}" for c in cells))
    Console().print(table)
    slopes = [growth(small, large) for small, large in zip(*results, strict=True)]
    figures = {
        "benchmark": "engine_memory",
        "overhead_mb_per_worker": round(max(r.overhead_mb for r in results[1]), 1),
        "weights_held_twice": max(slopes) > 0.5,
        "growth": round(max(slopes), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
