"""What `benchmarks/switch.py` runs: deployments, load, lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from switching.load import LoadSpec
from switching.model import LARGE, SMALL, Shape

NUM_WORKERS = 4
WALK = (
    "4xtp1pp1",
    "1xtp2pp1+2xtp1pp1",
    "2xtp2pp1",
    "1xtp4pp1",
    "2xtp2pp1",
    "1xtp2pp1+2xtp1pp1",
    "4xtp1pp1",
    "1xtp1pp4",
    "1xtp1pp2+2xtp1pp1",
    "2xtp1pp2",
    "1xtp2pp1+1xtp1pp2",
    "1xtp2pp2",
    "4xtp1pp1",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how much. `reloaded` are circles of steps of the walk, by index, `restarted`
    single ones; when `enough_s` have passed, none of either begins but the first."""

    shape: Shape = LARGE
    device_memory_mb: float = 2600.0
    load: LoadSpec = field(default_factory=LoadSpec)
    walk: tuple[str, ...] = WALK
    reloaded: tuple[tuple[int, ...], ...] = ((0, 5), (2, 3))
    restarted: tuple[int, ...] = (0, 3)
    enough_s: float = 480.0
    steady_s: float = 6.0
    settle_s: float = 1.5
    ring_bytes: int = 64 << 20


QUICK = Settings(
    shape=SMALL,
    device_memory_mb=200.0,
    load=LoadSpec(num_streams=8, output_tokens=(100, 200)),
    walk=(WALK[0], WALK[1], WALK[2], WALK[1], WALK[0]),
    reloaded=((0, 3),),
    restarted=(0,),
    enough_s=45.0,
    steady_s=1.5,
    settle_s=0.5,
    ring_bytes=16 << 20,
)


def engine_config(settings: Settings, folder: Path, deployment: str) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        num_workers=NUM_WORKERS,
        deployment=deployment,
        dtype=settings.shape.dtype,  # type: ignore[arg-type]
        device_memory_mb=settings.device_memory_mb,
        max_model_len=settings.shape.max_model_len,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
