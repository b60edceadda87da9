"""What a token costs outside the model: batch scheduler, messages between processes, sampling over
32,000 logits, and text in the engine process.

The worker runs a model that computes nothing: its logits are drawn once. 1, 32 and 256 sequences
decode at once; the time between the first token of the last sequence and the end of the first one
is divided by the tokens made in it. Worker and engine process work side by side, so their CPU
times are given apart. Figures are medians over rounds; spread is (max - min) / median. HTTP and
JSON are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from engine.build import build_runtime
from engine.config import EngineConfig
from engine.executor import LocalExecutor, WorkerConfig
from engine.facade import EngineCluster
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.text_choice import TextChoice, TextOptions, text_chunks
from engine.tokenizer import Tokenizer

VOCAB, PROMPT_TOKENS, MAX_SEQS = 32_000, 32, 256


def enter_noop(config: WorkerConfig) -> None:
    """A worker whose model gives ready logits: everything else is as in service."""
    import torch

    from engine.model import ShardedModel
    from engine.worker import run_worker

    logits = 3.0 * torch.randn(MAX_SEQS, VOCAB, generator=torch.Generator().manual_seed(0))

    def forward(self: Any, inputs: torch.Tensor, context: Any) -> torch.Tensor:
        return torch.zeros(len(inputs), 1)

    def ready_logits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return logits[: len(hidden)]

    ShardedModel.forward, ShardedModel.logits = forward, ready_logits
    run_worker(config)


def write_model(folder: Path) -> Path:
    """One small layer with the vocabulary of a real model, and a tokenizer for it."""
    import torch
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=16,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {f"Ġw{i:x}": i for i in range(VOCAB)}
    tokenizer = FastTokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


async def measure(
    runtime: EngineRuntime, tokenizer: Tokenizer, count: int, params: SamplingParams
) -> tuple[float, int]:
    """Seconds and tokens of the part during which all `count` sequences decode."""
    wake = asyncio.Event()
    choices = [
        TextChoice(
            runtime.generate(
                f"r{time.monotonic_ns()}", [i % VOCAB] * PROMPT_TOKENS, params, wake=wake
            ),
            tokenizer,
            TextOptions(),
            index=i,
        )
        for i in range(count)
    ]
    started: set[int] = set()
    start_s = end_s = 0.0
    tokens = 0
    async for chunk in text_chunks(choices, wake):
        started.add(chunk.index)
        if len(started) < count:
            continue
        now_s = time.perf_counter()
        if not start_s:
            start_s = now_s
        elif not end_s:
            tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None and not end_s:
            end_s = now_s
    return end_s - start_s, tokens


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_case(
    cluster: EngineCluster, worker: psutil.Process, tokenizer: Tokenizer, case: dict[str, Any]
) -> dict[str, float]:
    """Microseconds per token: wall clock, and CPU of either process over the whole round."""
    params = SamplingParams(ignore_eos=True, **case["params"])
    before = own_cpu_s(), cpu_s(worker)
    work = measure(cluster.runtime, tokenizer, case["count"], params)
    seconds, tokens = cluster.run(work, timeout_s=300.0)
    made = case["count"] * params.max_tokens
    return {
        "wall": 1e6 * seconds / tokens,
        "engine_cpu": 1e6 * (own_cpu_s() - before[0]) / made,
        "worker_cpu": 1e6 * (cpu_s(worker) - before[1]) / made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round, fewer tokens")
    args = parser.parse_args()
    rounds, length = (1, 60) if args.quick else (5, 200)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0, "max_tokens": length},
        "top_p": {"temperature": 0.8, "top_p": 0.9, "max_tokens": length},
    }
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder) / "noop")
        config = EngineConfig(
            model=str(model_dir),
            num_workers=1,
            deployment="1xtp1pp1",
            device_memory_mb=64.0,
            max_model_len=512,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_SEQS * PROMPT_TOKENS,
        )
        executor = LocalExecutor(enter_noop)
        tokenizer = Tokenizer(model_dir)
        results: dict[tuple[str, int], dict[str, float]] = {}
        with EngineCluster(lambda: build_runtime(config, executor)) as cluster:
            worker = psutil.Process(executor.pid(0))
            for name, params in kinds.items():
                for count in (1, 32, 256):
                    case = {"count": count, "params": params}
                    run_case(cluster, worker, tokenizer, case)  # warms up
                    found = [run_case(cluster, worker, tokenizer, case) for _ in range(rounds)]
                    median = {k: statistics.median(f[k] for f in found) for k in found[0]}
                    walls = [f["wall"] for f in found]
                    spread = (max(walls) - min(walls)) / median["wall"]
                    results[name, count] = median | {"spread": spread}
    report(results)


def report(results: dict[tuple[str, int], dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("sampling", "sequences", "us/token", "spread", "worker CPU", "engine CPU")
    for (name, count), row in results.items():
        table.add_row(
            name,
            str(count),
            f"{row['wall']:.1f}",
            f"{row['spread']:.0%}",
            f"{row['worker_cpu']:.1f}",
            f"{row['engine_cpu']:.1f}",
        )
    Console(width=90).print(table)
    line: dict[str, Any] = {"benchmark": "engine_scaling"}
    for (name, count), row in results.items():
        line[f"overhead_us_per_token_{count}_{name}"] = round(row["wall"], 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
