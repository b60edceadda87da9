"""The environments that Gymnasium knows by name: the entry points of `tidewright/*-v0`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.build import DEFAULT_PROFILE
from envs.experiment import Experiment, build_engine_env, build_env, build_experiment
from envs.experiment_config import read_config
from envs.serving_env import ServingEnv
from envs.vector_env import ServingVectorEnv

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "quick.yaml"
Settings = Mapping[str, Any]


def load_experiment(config: str | Path | None, settings: Settings | None) -> Experiment:
    """An experiment from its YAML (none: configs/quick.yaml), with settings by dotted key that go
    before the file, such as {"env.episode_s": 600.0}. Raises InvalidRequestError."""
    given = dict(settings or {})
    if config is None:
        given = {"profile": DEFAULT_PROFILE} | given  # wherever the process was started
    return build_experiment(read_config(Path(config or DEFAULT_CONFIG), given))


def make_surrogate(
    config: str | Path | None = None,
    settings: Settings | None = None,
    columns: bool = False,
    render_mode: str | None = None,
) -> ServingEnv:
    """`tidewright/Surrogate-v0`: the configuration's traffic on the simulated engine.

    With `columns` it is faster and `info` has `traffic` (arrays) in place of `outcomes`.
    """
    experiment = load_experiment(config, settings)
    return build_env(experiment, columns=columns, render_mode=render_mode)


def make_surrogate_vector(
    num_envs: int,
    config: str | Path | None = None,
    settings: Settings | None = None,
    columns: bool = True,
    render_mode: str | None = None,
    num_threads: int = 1,
) -> ServingVectorEnv:
    """`tidewright/Surrogate-v0` for `gymnasium.make_vec`: `num_envs` surrogates in one process,
    stepped by `num_threads`. With `columns`, `info` tells nothing of single requests."""
    experiment = load_experiment(config, settings)
    planner = experiment.pipeline().planner
    envs = [
        build_env(experiment, planner, columns=columns, render_mode=render_mode)
        for _ in range(num_envs)
    ]
    return ServingVectorEnv(envs, num_threads)


def make_engine(
    config: str | Path | None = None,
    settings: Settings | None = None,
    options: Mapping[str, Any] | None = None,
    render_mode: str | None = None,
) -> ServingEnv:
    """`tidewright/Engine-v0`: the same on a real engine with worker processes, in real time.

    `options` are fields of `engine.config.EngineConfig`, such as {"model": "FOLDER"}; the pool's
    are those of the profile. Close the environment: its workers end with it.
    """
    return build_engine_env(load_experiment(config, settings), options or {}, render_mode)
