"""One training run from its configuration to a folder: clone, train, choose, compare, write.

A run's folder: policy/ (the best by validation), last/ (to go on from), prior/ (what it started
from, if anything), demonstrations.safetensors, tensorboard/, learning_curve.png, result.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from controller.decision import DecisionPipeline
from engine.errors import InvalidRequestError
from envs.build import surrogate_parts
from envs.comparison import compare, print_table, reporter
from envs.demonstrations import demonstrations
from envs.expectations import measure_expected
from envs.experiment import (
    Experiment,
    build_engine_env,
    build_experiment,
    build_venv,
    initial_keys,
)
from envs.experiment_config import ENGINE, SURROGATE, ExperimentConfig
from envs.serving_env import ServingEnv
from envs.vec_env import ServingVecEnv
from envs.workload import Trace
from policies.base import ObservationSpec, Policy
from policies.checkpoint import add_facts, load_optimizer, load_policy, save_checkpoint
from policies.cloning import clone
from policies.curves import plot_curves
from policies.manifest import load_manifest
from policies.ppo import PpoPolicy
from policies.training import LearningState, TrainingResult, Watch, state_from_json, train

BEST, LAST, PRIOR = "policy", "last", "prior"  # checkpoints in the folder of a run
RESULT = "result.json"  # beside them, when it has gone through
NO_OPTIMIZER: dict[str, Any] = {"state": {}, "param_groups": []}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is carried out; what it learns is in its ExperimentConfig."""

    out: Path  # folder of the run
    env_id: str = SURROGATE
    engine: Mapping[str, Any] = field(default_factory=dict)  # fields of EngineConfig, for ENGINE
    trained_agent: Path | None = None  # checkpoint to go on from
    resume: bool = False  # go on from the last checkpoint of `out`
    save_freq: int = 0  # decisions between saves of last/; 0: at the end alone
    tensorboard: Path | None = None  # None: in `out`
    num_threads: int = 1  # of torch
    progress: bool = False
    compare: bool = True  # with rules, at the end


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it."""

    summary: dict[str, Any]  # plain JSON
    state: LearningState
    interrupted: bool


@dataclass(frozen=True, slots=True)
class _Start:
    state: LearningState | None = None
    prior: PpoPolicy | None = None
    cloning: Mapping[str, Any] | None = None  # how well the prior imitates

    @property
    def num_timesteps(self) -> int:
        return self.state.num_timesteps if self.state is not None else 0


def run_training(
    config: ExperimentConfig,
    options: RunOptions,
    scored: Callable[[int, float], bool] | None = None,
) -> Run:
    """Train by `config`; `scored` is told of validations and may stop the run. Raises
    TidewrightErrors; a KeyboardInterrupt before training begins leaves nothing behind."""
    if options.env_id == ENGINE:
        config = _for_engine(config)
    experiment = build_experiment(config)
    spec = experiment.pipeline().observation_spec
    start = _start(experiment, options, spec)
    result = _train(experiment, options, spec, start, scored)
    state = result.state
    curves = {"episode reward": [state.reward_curve], "validation": [state.validation_curve]}
    plot_curves(options.out / "learning_curve.png", curves)
    if not result.interrupted and options.env_id != ENGINE:
        add_facts(options.out / BEST, {"expected": _expected(experiment, options.out / BEST)})
    summary: dict[str, Any] = {
        "checkpoint": str(options.out / BEST),
        "seed": config.seed,
        "num_timesteps": state.num_timesteps,
        "train_s": round(result.wall_s, 1),
        "stopped_early": result.stopped_early,
        "best_validation": _best(state),
    } | ({"cloning": start.cloning} if start.cloning else {})
    if not result.interrupted and options.compare and options.env_id != ENGINE:
        summary = _compare(experiment, options) | summary
    (options.out / RESULT).write_text(json.dumps(summary, indent=1) + "\n")
    return Run(summary, state, result.interrupted)


def _best(state: LearningState) -> float | None:
    return max((value for _, value in state.validation_curve), default=None)


def _for_engine(config: ExperimentConfig) -> ExperimentConfig:
    """One environment, since an engine takes the whole pool; no groups, and no choice by windows
    of the surrogate, which is what the run means to correct."""
    return config.model_copy(
        update={
            "env": config.env.model_copy(update={"num_envs": 1}),
            "ppo": dataclasses.replace(config.ppo, group_size=1),
            "evaluation": config.evaluation.model_copy(update={"eval_freq": 0}),
        }
    )


def _expected(experiment: Experiment, folder: Path) -> dict[str, dict[str, float]]:
    """What the controller's retraining trigger compares with; from the windows of selection."""
    pipeline, key = experiment.pipeline(), experiment.default_key
    windows = experiment.selection_windows()
    envs = (_window_env(experiment, pipeline, window, key) for window in windows)
    return measure_expected(load_policy(folder), envs)


# ---------------------------------------------------------------- where training starts


def _start(experiment: Experiment, options: RunOptions, spec: ObservationSpec) -> _Start:
    if options.resume:
        return _resumed(experiment, options, spec)
    if options.trained_agent is not None:
        state = load_state(options.trained_agent, spec)
        save_checkpoint(options.out / PRIOR, state.policy, NO_OPTIMIZER, experiment.facts())
        # scores of another run say nothing of this one's
        return _Start(dataclasses.replace(state, validation_curve=()), state.policy)
    if experiment.config.cloning.num_decisions:
        return _cloned(experiment, options, spec)
    return _Start()


def _resumed(experiment: Experiment, options: RunOptions, spec: ObservationSpec) -> _Start:
    if not (options.out / LAST).is_dir():
        raise InvalidRequestError(
            f"there is nothing to resume in {options.out}: it has no {LAST}/; give the folder of "
            "the run with --out, or leave out --resume."
        )
    state = load_state(options.out / LAST, spec)
    if not (options.out / PRIOR).is_dir():
        return _Start(state)
    cloning = load_manifest(options.out / PRIOR).get("cloning")
    return _Start(state, load_policy(options.out / PRIOR), cloning)


def _cloned(experiment: Experiment, options: RunOptions, spec: ObservationSpec) -> _Start:
    config = experiment.config
    path = Path(config.cloning.file or options.out / "demonstrations.safetensors")
    _say(options, f"cloning {config.cloning.num_decisions} decisions of {config.cloning.expert}")
    found = demonstrations(experiment, config.cloning, path)
    policy, report = clone(spec, config.cloning, config.ppo, found, config.seed)
    facts = experiment.facts() | {"cloning": report.to_json()}
    save_checkpoint(options.out / PRIOR, policy, NO_OPTIMIZER, facts)
    _say(options, f"cloned: {json.dumps(report.to_json())}")
    return _Start(LearningState(policy), policy, report.to_json())


def _say(options: RunOptions, text: str) -> None:
    if options.progress:
        print(text, file=sys.stderr, flush=True)


def load_state(folder: Path, spec: ObservationSpec) -> LearningState:
    """A checkpoint to go on from, with as many rows as `spec` has. Raises CheckpointError."""
    policy, optimizer = load_policy(folder), load_optimizer(folder)
    if policy.spec.max_candidates != spec.max_candidates:
        policy = policy.with_max_candidates(spec.max_candidates)
    return state_from_json(policy, optimizer, load_manifest(folder))


# ---------------------------------------------------------------- training


def _train(
    experiment: Experiment,
    options: RunOptions,
    spec: ObservationSpec,
    start: _Start,
    scored: Callable[[int, float], bool] | None,
) -> TrainingResult:
    config, section = experiment.config, experiment.config.evaluation
    started_s = time.perf_counter()
    facts = experiment.facts() | {"training": dataclasses.asdict(config.ppo)}

    def save(name: str, state: LearningState) -> None:
        took = {"wall_s": round(time.perf_counter() - started_s, 1)}
        optimizer = state.optimizer_state or NO_OPTIMIZER
        save_checkpoint(options.out / name, state.policy, optimizer, facts | state.to_json() | took)

    watch = Watch(
        validate=build_validator(experiment) if section.eval_freq else None,
        eval_freq=section.eval_freq,
        patience=section.patience,
        save=save,
        save_freq=options.save_freq,
        scored=scored,
        log_dir=options.tensorboard or options.out / "tensorboard",
        progress=options.progress,
        num_threads=options.num_threads,
    )
    venv = _build_venv(experiment, options, start.num_timesteps)
    try:
        return train(venv, config.ppo, spec, config.seed, watch, start.state, start.prior)
    finally:
        venv.close()


def _build_venv(experiment: Experiment, options: RunOptions, num_timesteps: int) -> VecEnv:
    if options.env_id == ENGINE:
        return ServingVecEnv([build_engine_env(experiment, options.engine)])
    return build_venv(experiment, num_timesteps)


def build_validator(experiment: Experiment) -> Callable[[Policy], float]:
    """`scorer` on the windows that policies are chosen by."""
    return scorer(experiment, experiment.selection_windows())


def scorer(experiment: Experiment, windows: Sequence[Trace]) -> Callable[[Policy], float]:
    """Mean reward per decision of a policy on windows, always the most probable row, over the
    surrogate exactly as profiled. Windows start as episodes do, in a deployment drawn once: from a
    good one, keeping it may be all that can be seen of a policy."""
    pipeline = experiment.pipeline()
    rng = np.random.default_rng(experiment.config.evaluation.seed)
    keys = rng.choice(initial_keys(experiment.config, pipeline.planner), len(windows)).tolist()

    def score(policy: Policy) -> float:
        rewards: list[float] = []
        for window, key in zip(windows, keys, strict=True):
            rewards += _rewards(policy, _window_env(experiment, pipeline, window, key))
        return float(np.mean(rewards))

    return score


def _window_env(
    experiment: Experiment, pipeline: DecisionPipeline, window: Trace, key: str
) -> ServingEnv:
    parts = surrogate_parts(pipeline, lambda rng: window, key, experiment.reward, columns=True)
    return ServingEnv(parts)


def _rewards(policy: Policy, env: ServingEnv) -> list[float]:
    policy.reset()
    observation, rewards = env.start(), []
    while not env.is_over:
        _, reward, *_ = env.step(int(np.argmax(policy.probabilities(observation))))
        rewards.append(reward)
        assert env.prepared is not None
        observation = env.prepared.observation
    env.close()
    return rewards


def _compare(experiment: Experiment, options: RunOptions) -> dict[str, Any]:
    """The chosen policy against rules, on windows that it was not chosen by; prints the table."""
    section, load = experiment.config.evaluation, experiment.config.workload.mean_load
    found = compare(
        load_policy(options.out / BEST),
        experiment.pipeline(),
        experiment.validation_windows(),
        experiment.reward,
        experiment.default_key,
        reporter(options.progress),
    )
    print_table(
        found.scores, f"{section.num_windows} windows of {section.window_s:g} s at load {load:g}"
    )
    return found.to_json()
