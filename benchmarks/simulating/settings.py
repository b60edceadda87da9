"""What `benchmarks/fidelity.py` runs: pool, deployments, workloads, loads, switches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from switching.model import Shape

from engine.cluster import ParallelConfig, parse_deployment_key
from engine.config import EngineConfig
from envs.workload import Trace

NUM_WORKERS = 4
MODEL = Shape(
    "fidelity-63m",
    hidden_size=768,
    inner_size=2048,
    num_heads=12,
    num_kv_heads=4,
    dtype="bfloat16",
)
DEPLOYMENTS = (
    "1xtp1pp1",
    "2xtp1pp1",
    "4xtp1pp1",
    "1xtp2pp1",
    "2xtp2pp1",
    "1xtp1pp2",
    "1xtp2pp1+2xtp1pp1",
    "1xtp1pp2+1xtp2pp1",
)
SWITCHES = (
    ("2xtp1pp1", "1xtp2pp1"),
    ("1xtp2pp1", "1xtp1pp2"),
    ("1xtp1pp2", "2xtp1pp1"),
    ("4xtp1pp1", "2xtp2pp1"),
    ("1xtp2pp1+2xtp1pp1", "4xtp1pp1"),
    ("2xtp2pp1", "1xtp1pp2+1xtp2pp1"),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths lognormal with these medians and this sigma, cut to their ranges."""

    name: str
    prompt_tokens: int
    output_tokens: int
    sigma: float = 0.6
    prompt_range: tuple[int, int] = (4, 600)
    output_range: tuple[int, int] = (4, 300)

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Trace:
        """Poisson arrivals over `duration_s`."""
        number = rng.poisson(rate_per_s * duration_s)
        arrival_s = np.sort(rng.uniform(0.0, duration_s, number))
        prompt, output = (
            np.clip(np.rint(median * rng.lognormal(0.0, self.sigma, number)), *bounds)
            for median, bounds in (
                (self.prompt_tokens, self.prompt_range),
                (self.output_tokens, self.output_range),
            )
        )
        return Trace(arrival_s, prompt.astype(int), output.astype(int), duration_s)


WORKLOADS = (Workload("chat", 80, 40), Workload("summary", 240, 12), Workload("story", 24, 96))
LOADS = (0.4, 0.8)  # of what the median deployment sustains of that workload, as simulated
SWITCH_WORKLOAD, SWITCH_LOAD = "chat", 0.8


@dataclass(frozen=True, slots=True)
class Settings:
    """`repeats` runs of the engine per cell tell how far it differs from itself."""

    deployments: tuple[str, ...] = DEPLOYMENTS
    workloads: tuple[Workload, ...] = WORKLOADS
    loads: tuple[float, ...] = LOADS
    switches: tuple[tuple[str, str], ...] = SWITCHES
    arrivals_s: float = 12.0
    repeats: int = 2
    groups_per_pass: int = 2  # deployments between two passes of the calibration

    @property
    def configs(self) -> list[ParallelConfig]:
        """Of all replicas."""
        keys = {*self.deployments, *(key for pair in self.switches for key in pair)}
        return sorted({c for key in keys for c in parse_deployment_key(key)})


FULL = Settings()
SMALL = Settings(
    deployments=("1xtp1pp1", "2xtp1pp1", "1xtp2pp1"),
    workloads=WORKLOADS[:1],
    switches=SWITCHES[:1],
    arrivals_s=3.0,
    repeats=2,
)


def engine_config(folder: Path, deployment: str) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        num_workers=NUM_WORKERS,
        deployment=deployment,
        dtype=MODEL.dtype,  # type: ignore[arg-type]
        device_memory_mb=400.0,
        max_model_len=MODEL.max_model_len,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
    )
