"""Wires an `EngineRuntime` from an `EngineConfig`: the one place where its parts are chosen."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.channel import ChannelConfig
from engine.cluster import ClusterSpec, Deployment, dense_deployment, parse_deployment_key
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequestError
from engine.executor import Executor, LocalExecutor, WorkerConfig
from engine.migration.plan import check_memory, place
from engine.runtime import EngineRuntime, make_run_dir
from engine.sockets import make_curve_keys
from engine.tiny_model import cached_tiny_model
from engine.weights import read_config, read_model_spec
from engine.worker_pool import RecoveryConfig

DEFAULT_CACHE_DIR = Path(".cache/models")
DEMO_MODEL = "smollm2-135m-instruct"  # folder there that engine.demo_model writes


def resolve_model(model: str, seed: int = 0) -> Path:
    """Folder of the checkpoint. "tiny" is the embedded random-weight model, made when missing;
    "smollm2" is the one that `make model` writes: CheckpointError when it has not."""
    if model == "tiny":
        return cached_tiny_model(DEFAULT_CACHE_DIR, seed)
    if model != "smollm2":
        return Path(model)
    folder = DEFAULT_CACHE_DIR / DEMO_MODEL
    if not folder.is_dir():
        raise CheckpointError(f"model smollm2 is not at {folder} yet; run 'make model' once.")
    return folder


def build_cluster_spec(config: EngineConfig, model_dir: Path) -> ClusterSpec:
    """The static facts. Raises CheckpointError for a broken checkpoint."""
    model = read_model_spec(model_dir, config.dtype)
    if config.max_model_len is not None:
        if config.max_model_len > model.max_model_len:
            raise InvalidRequestError(
                f"max_model_len is {config.max_model_len}, {model.name} ends at "
                f"{model.max_model_len}; lower it."
            )
        model = replace(model, max_model_len=config.max_model_len)
    headroom_mb = config.switch_headroom_mb
    if headroom_mb is None and config.device != "cpu":
        headroom_mb = 0.0
    return ClusterSpec(
        num_devices=config.num_workers,
        devices_per_node=config.devices_per_node or config.num_workers,
        device_memory_bytes=round(config.device_memory_mb * 1e6 * config.gpu_memory_utilization),
        link_bytes_per_s=config.link_gb_per_s * 1e9,
        block_size=config.block_size,
        model=model,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        switch_headroom_bytes=None if headroom_mb is None else round(headroom_mb * 1e6),
    )


def _eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Of config.json and, as chat models may name more there, of generation_config.json."""
    found: list[int] = []
    generation = model_dir / "generation_config.json"
    configs = [read_config(model_dir)]
    configs += [json.loads(generation.read_text())] if generation.is_file() else []
    for config in configs:
        eos = config.get("eos_token_id")
        found += eos if isinstance(eos, list) else [] if eos is None else [int(eos)]
    return tuple(dict.fromkeys(found))


def _profile(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path} cannot be read: {error}.") from error
    return data


def build_channel_config(config: EngineConfig) -> ChannelConfig:
    """`ipc://` for local workers; `tcp://` with fresh CURVE keys for those of Ray. Raises
    InvalidRequestError for an address that nobody can connect to."""
    if config.executor == "local":
        return ChannelConfig(heartbeat_timeout_s=config.heartbeat_timeout_s)
    if config.channel_host in ("", "*", "0.0.0.0", "::"):
        raise InvalidRequestError(
            f"channel_host is {config.channel_host!r}, which is no address to connect to; give "
            "one of this machine's own."
        )
    keys = None if config.trusted_network else make_curve_keys()
    return ChannelConfig(config.channel_host, keys, config.heartbeat_timeout_s)


def build_executor(config: EngineConfig) -> Executor:
    """Where workers run. Raises InvalidRequestError when Ray is asked for and not installed."""
    if config.executor == "local":
        return LocalExecutor()
    if importlib.util.find_spec("ray") is None:
        raise InvalidRequestError(
            "executor is 'ray', but Ray is not installed; pip install 'tidewright[ray]'."
        )
    from engine.ray_executor import RayConfig, RayExecutor

    per_node = config.devices_per_node or config.num_workers
    resource = "GPU" if config.device == "cuda" else "CPU"
    return RayExecutor(RayConfig(config.ray_address, per_node, resource))


def build_runtime(config: EngineConfig, executor: Executor | None = None) -> EngineRuntime:
    """A runtime that is not started yet, on the given executor or the configuration's. Raises what
    makes the configuration impossible."""
    model_dir = resolve_model(config.model, config.seed)
    spec = build_cluster_spec(config, model_dir)
    configs = parse_deployment_key(config.deployment)
    spec.check(configs)
    for parallel in set(configs):
        check_memory(spec, parallel)
    profile = _profile(config.profile)
    executor, channel = executor or build_executor(config), build_channel_config(config)
    run_dir = make_run_dir()
    workers = [
        WorkerConfig(
            device=device,
            run_dir=str(run_dir),
            model_dir=str(model_dir.resolve()),
            dtype=config.dtype,
            torch_device=config.device,
            block_size=config.block_size,
            max_model_len=spec.model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=_eos_token_ids(model_dir),
            enable_prefix_caching=config.enable_prefix_caching,
            num_threads=config.threads_per_worker,
            switch_bytes_per_s=config.switch_bandwidth_mb_per_s * 1e6,
            host=channel.host,
            keys=channel.keys,
        )
        for device in range(config.num_workers)
    ]
    several = spec.devices_per_node < spec.num_devices
    return EngineRuntime(
        spec,
        place(spec, Deployment(()), configs) if several else dense_deployment(configs),
        executor,
        workers,
        run_dir,
        config.max_queue,
        profile,
        channel,
        RecoveryConfig(heal_timeout_s=config.heal_timeout_s),
    )
