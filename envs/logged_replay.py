"""Logged arrivals replayed in a model of the system: with the decisions as logged, or a policy's.

The model is an environment on the log's trace, in columns, over a surrogate. What it says is
compared with what the log says by `policies.ope_replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controller.decision import plan_to
from engine.cluster import SwitchPhase, parse_deployment_key
from engine.errors import InfeasibleError, StaleEpochError, SwitchInProgressError
from envs.reward import lone_seconds
from envs.serving_env import ServingEnv
from policies.base import Policy, choose
from policies.ope_data import Floats
from policies.ope_replay import ModelRun

Watch = Callable[[dict[str, Any]], None]
"""Is shown the `info` of each step."""


def unwatched(info: dict[str, Any]) -> None:
    """Nobody looks."""


@dataclass
class _Course:
    """What a run goes through, interval by interval."""

    reward: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    in_flight: list[bool] = field(default_factory=list)

    def note(self, env: ServingEnv, reward: float) -> None:
        assert env.prepared is not None
        snapshot = env.prepared.snapshot
        self.reward.append(reward)
        self.keys.append(snapshot.deployment.key)
        self.in_flight.append(snapshot.switch_in_flight)

    def run(self, env: ServingEnv) -> ModelRun:
        load = _load(env, len(self.reward))
        features = np.stack([load, load**2, np.array(self.in_flight, np.float64)], axis=1)
        return ModelRun(np.array(self.reward), tuple(self.keys), features)


def _load(env: ServingEnv, number: int) -> Floats:
    """[T] reference seconds of work that arrive per second of each interval."""
    trace = env.trace
    edges = env.grid_s * np.arange(number + 1)
    work_s = lone_seconds(env.parts.reward, trace)
    return np.asarray(np.histogram(trace.arrival_s, edges, weights=work_s)[0] / env.grid_s)


def replay_policy(
    env: ServingEnv,
    policy: Policy,
    rng: np.random.Generator,
    deterministic: bool,
    watch: Watch = unwatched,
) -> ModelRun:
    """The trace of `env` under a policy, which sees what the model shows it."""
    course = _Course()
    policy.reset()
    env.reset(seed=0)
    while not env.is_over:
        assert env.prepared is not None
        probabilities = policy.probabilities(env.prepared.observation)
        _, reward, _, _, info = env.step(choose(probabilities, rng, deterministic))
        course.note(env, reward)
        watch(info)
    return course.run(env)


def replay_logged(env: ServingEnv, switches: Sequence[str], watch: Watch = unwatched) -> ModelRun:
    """The trace of `env` with the switches of a log: per decision the key that was switched to,
    or an empty string. One that cannot start yet, since another runs, starts as soon as it can."""
    course, due = _Course(), ""
    env.reset(seed=0)
    for key in switches:
        due = key or due
        moved = 0
        if due:
            moved, due = _switch(env, due)
        _, reward, _, _, info = env.step(0)
        course.note(env, reward - env.parts.reward.switch_byte_cost * moved)
        watch(info)
    return course.run(env)


def seconds_of_switches(env: ServingEnv) -> Floats:
    """[K] of those that were done in the episode and took any time."""
    done = [t.duration_s for t in env.tickets if t.phase is SwitchPhase.DONE]
    return np.array([duration_s for duration_s in done if duration_s > 0], np.float64)


def _switch(env: ServingEnv, key: str) -> tuple[int, str]:
    """Bytes of the switch started, and what is still to be switched to."""
    assert env.cluster is not None
    snapshot = env.cluster.snapshot()
    if snapshot.deployment.key == key:
        return 0, ""
    try:
        plan = plan_to(env.pipeline.cluster, snapshot, parse_deployment_key(key), f"log-{key}")
        env.cluster.apply(plan)
    except SwitchInProgressError:
        return 0, key
    except (InfeasibleError, StaleEpochError):
        return 0, ""
    return plan.weight_bytes, ""
