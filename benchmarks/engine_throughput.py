"""Output tokens per second of one replica against transformers and vLLM on the same CPU threads.

64 requests are there at once, greedy, no stop token: 32-512 input and 16-128 output tokens each,
drawn once. Every engine runs in a process of its own and is warmed up with a few requests first;
loading is not timed. Tokens that a static batch makes for a request that has already ended do not
count. Rounds alternate between the engines; figures are medians, spread is (max - min) / median.

vLLM is measured where its interpreter is given: --vllm-python VENV/bin/python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "benchmarks"
STATIC_BATCH = 16
VOCAB = {"llama": 32_000, "qwen": 151_936}
Requests = list[tuple[list[int], int]]  # (prompt, output tokens)


def make_requests(vocab: int, count: int, seed: int) -> Requests:
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(10, vocab) for _ in range(draw.randint(32, 512))],
            draw.randint(16, 128),
        )
        for _ in range(count)
    ]


def make_model(shape: str, dtype: str) -> Path:
    """A checkpoint with random weights, made when missing."""
    folder = CACHE / f"{shape}-{dtype}"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config: Any
    if shape == "llama":
        config = LlamaConfig(
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=1408,
            vocab_size=VOCAB[shape],
            max_position_embeddings=2048,
        )
    else:  # Qwen2.5-0.5B
        config = Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=VOCAB[shape],
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------
# The engines: each returns a function that serves all requests and returns their tokens


def serve_ours(folder: Path, dtype: str, threads: int) -> Callable[[Requests], list[list[int]]]:
    import asyncio

    from engine.build import build_runtime
    from engine.config import EngineConfig
    from engine.facade import EngineCluster
    from engine.request import SamplingParams

    config = EngineConfig(
        model=str(folder),
        num_workers=1,
        deployment="1xtp1pp1",
        dtype=dtype,  # type: ignore[arg-type]
        device_memory_mb=8000.0 if "qwen" in folder.name else 2000.0,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        threads_per_worker=threads,
        enable_prefix_caching=False,
    )
    cluster = EngineCluster(lambda: build_runtime(config))

    async def collect(stream: Any) -> list[int]:
        return [token async for chunk in stream for token in chunk.token_ids]

    async def generate(requests: Requests) -> list[list[int]]:
        streams = [
            cluster.runtime.generate(
                f"r{time.monotonic_ns()}-{i}",
                prompt,
                SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
            )
            for i, (prompt, length) in enumerate(requests)
        ]
        return list(await asyncio.gather(*(collect(s) for s in streams)))

    return lambda requests: cluster.run(generate(requests), timeout_s=3600.0)


def _transformers_model(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval()


def serve_hf_static(folder: Path, dtype: str, threads: int) -> Callable[[Requests], Any]:
    import torch

    model = _transformers_model(folder, dtype)

    def batch(requests: Requests) -> list[list[int]]:
        width = max(len(prompt) for prompt, _ in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(requests):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        longest = max(length for _, length in requests)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        made = out[:, width:].tolist()
        return [row[:length] for row, (_, length) in zip(made, requests, strict=True)]

    def serve(requests: Requests) -> list[list[int]]:
        batches = [requests[at : at + STATIC_BATCH] for at in range(0, len(requests), STATIC_BATCH)]
        return [tokens for part in batches for tokens in batch(part)]

    return serve


def serve_hf_cb(folder: Path, dtype: str, threads: int) -> Callable[[Requests], Any]:
    from transformers import GenerationConfig

    model = _transformers_model(folder, dtype)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128)

    def serve(requests: Requests) -> list[list[int]]:
        manager = model.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            names = [
                manager.add_request(prompt, request_id=f"r{i}", max_new_tokens=length)
                for i, (prompt, length) in enumerate(requests)
            ]
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                output = manager.get_result(timeout=600)
                if output is None:
                    raise RuntimeError("continuous batching gave no result within 600 s")
                if output.is_finished():
                    done[output.request_id] = list(output.generated_tokens)
            return [done[name] for name in names]
        finally:
            manager.stop(block=True)

    return serve


def serve_vllm(folder: Path, dtype: str, threads: int) -> Callable[[Requests], Any]:
    import vllm

    llm = vllm.LLM(
        str(folder),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def serve(requests: Requests) -> list[list[int]]:
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False
            )
            for _, length in requests
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return serve


ENGINES: dict[str, Callable[[Path, str, int], Callable[[Requests], Any]]] = {
    "ours": serve_ours,
    "hf_static": serve_hf_static,
    "hf_cb": serve_hf_cb,
    "vllm_cpu": serve_vllm,
}


def run_engine(name: str, folder: Path, dtype: str, threads: int) -> None:
    """The child process: warm up, say ready, then one timed round per line of input."""
    real_stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    if name != "vllm_cpu":
        import torch

        torch.set_num_threads(threads)
    vocab = VOCAB[folder.name.split("-")[0]]
    serve = ENGINES[name](folder, dtype, threads)
    serve([(prompt, 4) for prompt, _ in make_requests(vocab, 8, seed=1)])
    print("ready", file=real_stdout, flush=True)
    for line in sys.stdin:
        requests = make_requests(vocab, int(line), seed=0)
        start_s = time.perf_counter()
        outputs = serve(requests)
        seconds = time.perf_counter() - start_s
        assert [len(out) for out in outputs] == [length for _, length in requests], name
        print(json.dumps({"s": seconds, "outputs": outputs}), file=real_stdout, flush=True)
    os._exit(0)  # some of these libraries keep threads that never end


class Engine:
    """One child process. Owns it; `close` ends it."""

    def __init__(self, name: str, python: str, folder: Path, dtype: str, threads: int) -> None:
        command = [python, __file__, "--engine", name, "--folder", str(folder), "--dtype", dtype]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": "" if name == "vllm_cpu" else str(ROOT),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind" if threads == 1 else f"0-{threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.name = name
        self._log = (CACHE / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=CACHE,  # vLLM's own interpreter must not find this project's packages
        )
        if self._read() != "ready":
            raise RuntimeError(f"{name} did not start; see {self._log.name}")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def round(self, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._read()
        if not line:
            raise RuntimeError(f"{self.name} ended; see {self._log.name}")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def compare(
    shape: str, dtype: str, threads: int, rounds: int, count: int, vllm_python: str | None
) -> dict[str, dict[str, float]]:
    """Median tokens/s, spread, and the share of requests whose tokens equal ours, by engine."""
    folder = make_model(shape, dtype)
    names = [name for name in ENGINES if name != "vllm_cpu" or vllm_python]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    outputs: dict[str, list[list[int]]] = {}
    for name in names:  # one process at a time: idle engines still hold memory and spin
        python = vllm_python if name == "vllm_cpu" and vllm_python else sys.executable
        engine = Engine(name, python, folder, dtype, threads)
        try:
            for _ in range(rounds):
                result = engine.round(count)
                outputs[name] = result["outputs"]
                speeds[name].append(sum(map(len, result["outputs"])) / result["s"])
        finally:
            engine.close()
    return {
        name: {
            "tok_s": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "same_as_ours": sum(a == b for a, b in zip(outputs[name], outputs["ours"], strict=True))
            / count,
        }
        for name, values in speeds.items()
    }


def print_table(results: dict[tuple[str, str], dict[str, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "dtype", "engine", "tok/s", "spread", "ours / it", "same tokens as ours")
    for (shape, dtype), engines in results.items():
        for name, figures in engines.items():
            table.add_row(
                shape,
                dtype,
                name,
                f"{figures['tok_s']:.0f}",
                f"{figures['spread']:.0%}",
                f"{engines['ours']['tok_s'] / figures['tok_s']:.2f}",
                f"{figures['same_as_ours']:.0%}",
            )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 requests, one round, 60M bf16")
    parser.add_argument("--vllm-python", help="interpreter of a venv that has vllm-cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=list(VOCAB), default=["llama", "qwen"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(args.engine, args.folder, args.dtype, args.threads)
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    shapes, dtypes = args.shapes, args.dtypes
    rounds, count = args.rounds, 64
    if args.quick:
        shapes, dtypes, rounds, count = ["llama"], ["bfloat16"], 1, 16
    results = {}
    for shape in shapes:
        repeat = 1 if shape == "qwen" else rounds
        for dtype in dtypes:
            results[shape, dtype] = compare(
                shape, dtype, args.threads, repeat, count, args.vllm_python
            )
    print_table(results)
    main_case = results[shapes[0], dtypes[0]]

    def ratio(engines: dict[str, dict[str, float]], name: str) -> float | None:
        if name not in engines:
            return None
        return round(engines["ours"]["tok_s"] / engines[name]["tok_s"], 3)

    line: dict[str, Any] = {
        "benchmark": "engine_throughput",
        "ours_tok_s": round(main_case["ours"]["tok_s"], 1),
    }
    line |= {f"{name}_ratio": ratio(main_case, name) for name in ENGINES if name != "ours"}
    for (shape, dtype), engines in results.items():
        line[f"{shape}_{dtype}"] = {
            "ours_tok_s": round(engines["ours"]["tok_s"], 1),
            **{f"{name}_ratio": ratio(engines, name) for name in ENGINES if name != "ours"},
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
