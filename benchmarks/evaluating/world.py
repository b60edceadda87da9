"""The true system, the model that is wrong about it, policies, and logs of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig, DecisionPipeline
from controller.slo import read_slo
from engine.cluster import dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster, StepTimeModel
from envs.build import DEFAULT_PROFILE
from envs.logged import row_features
from envs.logged_replay import replay_logged, replay_policy, seconds_of_switches
from envs.offline.course import Watched
from envs.recalibration import Recalibration, Signals, recalibrate
from envs.reward import reward_config
from envs.serving_env import EnvParts, ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic import (
    Shaping,
    draw_window,
    fit_trace_typing,
    generator_source,
    measure_capacity,
    measure_stretch,
)
from envs.workload import Trace, WorkloadConfig
from policies.base import Observation, ObservationSpec, Policy, choose
from policies.baselines import (
    GreedyPolicy,
    HysteresisPolicy,
    MyopicPolicy,
    ScalingPolicy,
    StaticPolicy,
)
from policies.exploration import Exploration, ExplorationConfig
from policies.ope_data import LoggedDecisions, TargetDecisions, decide_on
from policies.ope_replay import ModelRun

Floats = NDArray[np.float64]
PROFILE: Path = DEFAULT_PROFILE
LOAD, NUM_TYPES, GRID_S = 0.7, 2, 15.0
TRAFFIC = WorkloadConfig(cycle_amplitude=0.3, regime_s=300.0, level_sigma=0.1, burst_factor=1.5)
STANDING = ("1xtp1pp3+1xtp1pp1", "1xtp4pp1", "2xtp1pp2", "4xtp1pp1", "1xtp1pp4")
INITIAL = "2xtp1pp2"
# What the model has wrong: steps take that many times as long as in truth, by what is split.
PLAIN_FACTOR, TP_FACTOR, PP_FACTOR = 1.1, 1.25, 0.9
SWITCH_FACTOR = 2.0
# And what no factor of steps or switches sets right: the arithmetic of a step beside its memory.
TOKEN_FACTOR = 1.2

STATICS = {
    "uneven": "1xtp1pp3+1xtp1pp1",
    "one tp4": "1xtp4pp1",
    "four": "4xtp1pp1",
    "one pp4": "1xtp1pp4",
}


RULES: dict[str, Callable[[ObservationSpec], Policy]] = {
    "scaling": ScalingPolicy,
    "myopic": MyopicPolicy,
    "greedy": GreedyPolicy,
    "hysteresis": HysteresisPolicy,
}


class Exploring:
    """A rule that explores as the controller does with --explore EPSILON."""

    def __init__(self, rule: Policy, spec: ObservationSpec, epsilon: float) -> None:
        self.rule, self._exploration = rule, Exploration(spec, ExplorationConfig(epsilon))
        self.name = f"{rule.name}, exploring {epsilon:.0%}"

    def reset(self) -> None:
        self.rule.reset()

    def probabilities(self, observation: Observation) -> Floats:
        return self._exploration.mix(self.rule.probabilities(observation), observation)


class Erring:
    """A rule that takes any legal row with some probability, instead of its own."""

    def __init__(self, rule: Policy, share: float) -> None:
        self.rule, self.share = rule, share
        self.name = f"{rule.name}, erring {share:.0%}"

    def reset(self) -> None:
        self.rule.reset()

    def probabilities(self, observation: Observation) -> Floats:
        legal = observation.mask / observation.mask.sum()
        return (1 - self.share) * self.rule.probabilities(observation) + self.share * legal


def wrong_about(cluster: ProfiledCluster) -> ProfiledCluster:
    """The same pool with step and switch times that are not its own."""

    def factor(tp: int, pp: int) -> float:
        return PLAIN_FACTOR * (TP_FACTOR if tp > 1 else 1.0) * (PP_FACTOR if pp > 1 else 1.0)

    profile = cluster.profile
    steps = tuple(
        _more_arithmetic(s.scaled(factor(s.parallel.tp, s.parallel.pp))) for s in profile.steps
    )
    return replace(
        cluster,
        profile=replace(
            profile,
            steps=steps,
            switch_overhead_s=SWITCH_FACTOR * profile.switch_overhead_s,
            link_bytes_per_s=profile.link_bytes_per_s / SWITCH_FACTOR,
        ),
    )


def _more_arithmetic(steps: StepTimeModel) -> StepTimeModel:
    return replace(
        steps,
        per_token_s=TOKEN_FACTOR * steps.per_token_s,
        per_pair_s=TOKEN_FACTOR * steps.per_pair_s,
        token_s=tuple(TOKEN_FACTOR * t for t in steps.token_s),
    )


@dataclass(frozen=True)
class Log:
    """A window of traffic under a policy of the true system."""

    trace: Trace
    decisions: LoggedDecisions
    observations: tuple[Observation, ...]
    switches: tuple[str, ...]  # key switched to at each decision, or ""
    signals: Signals

    def target(self, policy: Policy) -> TargetDecisions:
        decisions = self.decisions
        return decide_on(policy, self.observations, decisions.segment, decisions.generator)


class World:
    """The controller's pipeline knows the wrong profile, in the true system as in the model."""

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self.truth = load_profiled_cluster(PROFILE)
        self.model = wrong_about(self.truth)
        longest = self.truth.spec.model.max_model_len
        self.source = generator_source(TRAFFIC, Shaping(), longest, np.random.default_rng(0))
        self.typing = fit_trace_typing(self.source.trace, NUM_TYPES, seed=0)
        planner = build_pipeline(self.truth, self.typing, self._config).planner
        self.capacity = measure_capacity(planner, self.source.trace, self.typing)
        slo = read_slo().spec(self.truth.profile.device, "interactive")
        lone = reward_config(self.truth, read_slo().utility.spec, slo)
        self.reward = replace(lone, stretch=measure_stretch(planner, self.capacity, lone))

    @property
    def _config(self) -> DecisionConfig:
        return DecisionConfig(
            grid_s=GRID_S,
            max_candidates=8,
            switches_per_hour=12.0,
            switch_burst=3.0,
            min_headroom=0.0,  # from here on: bad deployments may be chosen, so that values differ
            min_coverage=0.0,
            max_capacity_change=1.0,
            in_place_max_load=100.0,
            clearly_worse=100.0,
        )

    @cached_property
    def pipeline(self) -> DecisionPipeline:
        """With STANDING always among the candidates. One for all: it is reset."""
        found = build_pipeline(self.model, self.typing, self._config)
        found.planner.standing = tuple(parse_deployment_key(key) for key in STANDING)
        return found

    def policy(self, name: str) -> Policy:
        """A rule or one of STATICS; "RULE, exploring P %" or "RULE, erring P %" of one."""
        base, _, changed = name.partition(", ")
        spec = self.pipeline.observation_spec
        rule = StaticPolicy(STATICS[base]) if base in STATICS else RULES[base](spec)
        if not changed:
            return rule
        how, share = changed.removesuffix(" %").split()
        if how == "erring":
            return Erring(rule, float(share) / 100)
        return Exploring(rule, spec, float(share) / 100)

    def trace(self, *seed: int) -> Trace:
        rate_per_s = LOAD * self.capacity.rate_per_s
        return draw_window(self.source, rate_per_s, self.duration_s, np.random.default_rng(seed))

    def env(self, trace: Trace, cluster: ProfiledCluster) -> ServingEnv:
        initial = dense_deployment(parse_deployment_key(INITIAL))
        return ServingEnv(
            EnvParts(
                self.pipeline,
                lambda rng: SurrogateCluster(cluster, initial, columns=True),
                lambda rng: trace,
                self.reward,
                columns=True,
            )
        )

    def true_value(self, policy: Policy, trace: Trace, seed: int) -> float:
        rng = np.random.default_rng(seed)
        run = replay_policy(self.env(trace, self.truth), policy, rng, deterministic=False)
        return float(run.reward.mean())

    def logged_run(self, log: Log, model: ProfiledCluster) -> ModelRun:
        return replay_logged(self.env(log.trace, model), log.switches)

    def target_run(
        self, log: Log, policy: Policy, model: ProfiledCluster, rng: np.random.Generator
    ) -> ModelRun:
        return replay_policy(self.env(log.trace, model), policy, rng, deterministic=False)

    def recalibration(self, log: Log, block: int) -> Recalibration:
        """Of the wrong profile, by the log."""

        def simulate(cluster: ProfiledCluster) -> Signals:
            env, watched = self.env(log.trace, cluster), Watched(self.reward.slo)
            return _signals(env, replay_logged(env, log.switches, watched).reward, watched)

        keys = [o.keys[0] for o in log.observations]
        return recalibrate(self.model, simulate, keys, log.signals, block)

    def log(self, policy: Policy, *seed: int) -> Log:
        trace, rng = self.trace(*seed), np.random.default_rng(seed)
        env = self.env(trace, self.truth)
        env.reset(seed=0)
        policy.reset()
        observations, behaviour, executed, rewards, switches = [], [], [], [], []
        watched = Watched(self.reward.slo)
        while not env.is_over:
            assert env.prepared is not None
            observations.append(env.prepared.observation)
            behaviour.append(policy.probabilities(observations[-1]))
            action = choose(behaviour[-1], rng, deterministic=False)
            _, reward, _, _, info = env.step(action)
            executed.append(info["decision"].executed_key)
            rewards.append(reward)
            watched(info)
            switches.append(executed[-1] if info["ticket"] is not None else "")
        return Log(
            trace,
            _decisions(observations, behaviour, executed, rewards, self.pipeline.config_hash),
            tuple(observations),
            tuple(switches),
            _signals(env, np.array(rewards), watched),
        )


def _signals(env: ServingEnv, reward: Floats, watched: Watched) -> Signals:
    """Of the episode that has ended."""
    return Signals(reward, watched.pace(), seconds_of_switches(env))


def _decisions(
    observations: list[Observation],
    behaviour: list[Floats],
    executed: list[str],
    rewards: list[float],
    generator: str,
) -> LoggedDecisions:
    masks = np.array([o.mask for o in observations])
    number = len(rewards)
    return LoggedDecisions(
        at_s=GRID_S * np.arange(number),
        keys=tuple(o.keys for o in observations),
        behaviour=np.array(behaviour),
        guard_map=np.where(masks, np.arange(masks.shape[1]), 0),
        executed=np.array([o.keys.index(k) for o, k in zip(observations, executed, strict=True)]),
        reward=np.array(rewards),
        features=np.array([row_features(o) for o in observations]),
        segment=np.zeros(number, np.int64),
        generator=generator,
    )
