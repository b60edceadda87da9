"""The parts of environments over the surrogate and over the real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from controller.decision import DecisionPipeline
from controller.slo import read_slo
from engine.build import build_runtime
from engine.cluster import ClusterSpec, dense_deployment, parse_deployment_key
from engine.config import EngineConfig, validate
from engine.errors import InvalidRequestError
from engine.facade import EngineCluster
from engine.profile import ProfiledCluster
from envs.reward import RewardConfig, reward_config
from envs.serving_env import EnvParts, MakeTrace
from envs.surrogate.cluster import SurrogateCluster

DEFAULT_PROFILE = Path(__file__).parents[1] / "configs" / "profiles" / "tiny_llama_cpu4.json"
MakeKey = str | Callable[[np.random.Generator], str]  # of the first deployment of an episode


def _key(initial_key: MakeKey, rng: np.random.Generator) -> str:
    return initial_key if isinstance(initial_key, str) else initial_key(rng)


def surrogate_parts(
    pipeline: DecisionPipeline,
    make_trace: MakeTrace,
    initial_key: MakeKey,
    reward: RewardConfig | None = None,
    spread: float | Callable[[np.random.Generator], float] = 0.0,
    columns: bool = False,
    kind: type[SurrogateCluster] = SurrogateCluster,
) -> EnvParts:
    """Parts of an environment over the surrogate of the pipeline's cluster.

    `spread` is that of `SurrogateCluster`, or draws it. `columns` is the fast path for training:
    no object per request, hence no outcomes to evaluate.
    """
    cluster = pipeline.cluster

    def make_cluster(rng: np.random.Generator) -> SurrogateCluster:
        initial = dense_deployment(parse_deployment_key(_key(initial_key, rng)))
        width = spread(rng) if callable(spread) else spread
        seed = int(rng.integers(2**31))
        return kind(cluster, initial, seed=seed, spread=width, columns=columns)

    return EnvParts(pipeline, make_cluster, make_trace, reward or default_reward(cluster), columns)


def engine_parts(
    pipeline: DecisionPipeline,
    make_trace: MakeTrace,
    initial_key: MakeKey,
    options: Mapping[str, Any],
    reward: RewardConfig | None = None,
) -> EnvParts:
    """Parts of an environment over a real engine of the pool that the pipeline was profiled on.

    Each episode starts an engine of its own and ends it. `options` are fields of `EngineConfig`
    beside those that the profile fixes.
    """
    cluster = pipeline.cluster
    engine_config(cluster.spec, "", options)  # refuses wrong options before an engine is started

    def make_cluster(rng: np.random.Generator) -> EngineCluster:
        config = engine_config(cluster.spec, _key(initial_key, rng), options)
        engine = EngineCluster(lambda: build_runtime(config))
        try:
            _check_model(cluster.spec, engine.spec)
        except InvalidRequestError:
            engine.close()
            raise
        return engine

    return EnvParts(pipeline, make_cluster, make_trace, reward or default_reward(cluster))


def default_reward(cluster: ProfiledCluster) -> RewardConfig:
    """With the utility of configs/slo.yaml, no objective, and lone requests as references."""
    return reward_config(cluster, read_slo().utility.spec)


def engine_config(spec: ClusterSpec, deployment: str, options: Mapping[str, Any]) -> EngineConfig:
    """An engine of that pool. Raises InvalidRequestError."""
    pool: dict[str, Any] = {
        "num_workers": spec.num_devices,
        "device_memory_mb": spec.device_memory_bytes / 1e6,
        "link_gb_per_s": spec.link_bytes_per_s / 1e9,
        "block_size": spec.block_size,
        "max_model_len": spec.model.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "deployment": deployment,
    }
    fixed = sorted(pool.keys() & options.keys())
    if fixed:
        raise InvalidRequestError(
            f"the engine's {', '.join(fixed)} are those of the profile (deployment: env.initial); "
            "leave them out, or give another profile."
        )
    return validate(EngineConfig, pool | dict(options), "the engine's options")


def _check_model(profiled: ClusterSpec, running: ClusterSpec) -> None:
    for name in ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "vocab_size"):
        want, got = getattr(profiled.model, name), getattr(running.model, name)
        if want != got:
            raise InvalidRequestError(
                f"the engine's model {running.model.name} has {name} {got}, the profiled "
                f"{profiled.model.name} has {want}; give the model of the profile, or its profile."
            )
