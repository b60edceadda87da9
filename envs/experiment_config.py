"""ExperimentConfig: what one YAML file in configs/ says, read and checked."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from controller.build import PREDICTORS
from controller.decision import DecisionConfig
from engine.cluster import SloSpec
from engine.config import validate
from engine.errors import InvalidRequestError
from envs.ablated import Hidden
from envs.build import DEFAULT_PROFILE
from envs.scenarios import ScenarioConfig
from envs.traffic import Shaping
from envs.workload import WorkloadConfig
from policies.cloning import CloningConfig
from policies.ppo import PpoConfig

ANY = "any"
SURROGATE, ENGINE = "tidewright/Surrogate-v0", "tidewright/Engine-v0"  # as Gymnasium knows them


def key_value(text: str) -> tuple[str, Any]:
    """KEY:VALUE of an option of the command line; values are read as YAML."""
    key, found, value = text.partition(":")
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY:VALUE")
    return key, yaml.safe_load(value)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkloadSection(_Section):
    """Traffic: a trace file, or the embedded generator."""

    trace: Path | None = Field(default=None, description="trace file; null: the embedded generator")
    traces: tuple[Path, ...] = Field(
        default=(), description="several in its place: an episode draws one"
    )
    folder: Path = Field(default=Path(), description="that trace files are looked for in")
    days: tuple[int, int] | None = Field(default=None, description="first, last; from 1")
    length_factor: float = Field(default=1.0, gt=0, description="multiplies lengths in tokens")
    load: tuple[float, float] = Field(
        default=(0.7, 0.7),
        description="range; mean, as share of best static capacity; drawn per episode",
    )
    num_types: int = Field(default=4, ge=1, description="workload types")
    generator: WorkloadConfig = Field(
        default_factory=WorkloadConfig, description="its mean rate is set by `load`"
    )

    @property
    def shaping(self) -> Shaping:
        return Shaping(self.days, self.length_factor)

    @property
    def files(self) -> tuple[Path, ...]:
        """Trace files; none: the embedded generator."""
        names = self.traces or ((self.trace,) if self.trace else ())
        return tuple(self.folder / name for name in names)

    @property
    def mean_load(self) -> float:
        return sum(self.load) / 2


class EnvSection(_Section):
    """Training environments."""

    num_envs: int = Field(default=16, ge=1, description="stepped together")
    num_threads: int = Field(
        default=1, ge=1, description="that step them; more pay for large pools and heavy traffic"
    )
    num_workers: int = Field(
        default=0, ge=0, description="processes that step them, each its part; 0: the learner's own"
    )
    episode_s: float = Field(default=3600.0, gt=0, description="seconds of an episode")
    spread: float = Field(default=0.1, ge=0, description="of step and switch times, in ln")
    initial: str | tuple[str, ...] = Field(
        default=ANY, description="first deployment; of several, or of 'any', an episode draws one"
    )
    device_hour_cost: float = Field(
        default=0.0, ge=0, description="reward that a device in use costs per hour"
    )


class EvaluationSection(_Section):
    """Validation, during training and at its end, on traffic of its own seed."""

    days: tuple[int, int] | None = Field(
        default=None, description="of the traces; null: the days of training"
    )
    loads: tuple[float, ...] = Field(
        default=(), description="mean of the windows together; empty: the middle of workload.load"
    )
    num_windows: int = Field(default=3, ge=1, description="of each trace and load")
    window_s: float = Field(default=1800.0, gt=0, description="seconds of a window")
    seed: int = Field(default=1_000_003, ge=0)
    eval_freq: int = Field(
        default=0, ge=0, description="decisions between choices of the best policy; 0: the last"
    )
    eval_episodes: int | None = Field(
        default=None, ge=1, description="windows of each trace to choose by; null: num_windows"
    )
    patience: int = Field(
        default=0, ge=0, description="choices without gain after which training stops; 0: never"
    )


class ExperimentConfig(_Section):
    """One published experiment: one YAML file in configs/."""

    profile: Path = Field(default=DEFAULT_PROFILE, description="measured cluster JSON")
    num_devices: int | None = Field(default=None, ge=1, description="null: the profile's")
    workload: WorkloadSection = Field(default_factory=WorkloadSection)
    decision: DecisionConfig = DecisionConfig()
    scenario: ScenarioConfig | None = Field(
        default=None,
        description="ranges drawn per episode; of its traffic, traces take levels and bursts alone",
    )
    hide: tuple[Hidden, ...] = Field(
        default=(), description="from the policy, for ablations: see envs/ablated.py"
    )
    predictor: str = Field(default="ewma4", description=f"one of {PREDICTORS}")
    slo: SloSpec | str = Field(
        default="interactive", description="a class of configs/slo.yaml, or targets in seconds"
    )
    env: EnvSection = Field(default_factory=EnvSection)
    cloning: CloningConfig = CloningConfig()
    ppo: PpoConfig = PpoConfig()
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    seed: int = Field(default=0, ge=0)


# --------------------------------------------------------------------------------------
# Reading


def read_config(
    path: Path, overrides: Mapping[str, Any], env_id: str = SURROGATE
) -> ExperimentConfig:
    """An ExperimentConfig from YAML; overrides are by dotted key, None overrides nothing.

    The file holds one experiment, or one for each environment, keyed by its id as in rl-zoo3.
    Raises InvalidRequestError in one sentence: unreadable file, unknown key, or wrong value.
    """
    values = _of_env(_read_yaml(path), path, env_id)
    check_keys(ExperimentConfig, values, str(path))
    given: dict[str, Any] = {}
    for key, value in overrides.items():
        if value is not None:
            _set(given, key.split("."), value)
    check_keys(ExperimentConfig, given, "the settings")
    values = _merged(values, given)
    config = validate(ExperimentConfig, values, str(path))
    if config.ppo.group_size < 1 or config.env.num_envs % config.ppo.group_size:
        raise InvalidRequestError(
            f"env.num_envs must be a multiple of ppo.group_size in {path}, got "
            f"{config.env.num_envs} and {config.ppo.group_size}."
        )
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"config {path} is not YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise InvalidRequestError(f"config {path} must hold keys and values, such as 'seed: 0'.")
    return values


def _of_env(values: dict[str, Any], path: Path, env_id: str) -> dict[str, Any]:
    """The experiment itself, where the file is keyed by environment."""
    if not any("/" in str(key) for key in values):
        return values
    found = values.get(env_id)
    if not isinstance(found, dict):
        raise InvalidRequestError(
            f"config {path} has settings for {', '.join(map(str, values))}, none for {env_id}; "
            "choose one of them with --env, or add it."
        )
    return found


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` with what is given in their place, at any depth."""
    merged = dict(values)
    for key, value in given.items():
        old = merged.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def check_keys(kind: type[Any], values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuse keys that `kind` (a pydantic model or a dataclass) does not have, at any depth."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    else:
        names = list(kind.model_fields)
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}."
            raise InvalidRequestError(f"unknown key {prefix + str(key)!r} in {where}; {hint}")
        inner = hints[key]
        if isinstance(inner, types.UnionType):  # of a section and None
            inner = typing.get_args(inner)[0]
        section = isinstance(inner, type) and (
            dataclasses.is_dataclass(inner) or issubclass(inner, BaseModel)
        )
        if isinstance(value, dict) and section:
            check_keys(inner, value, where, f"{prefix}{key}.")
