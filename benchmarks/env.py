"""How many full decisions a second the batched environment makes, and PPO on it.

A decision is a step of `ServingEnv` on the fast path: traffic of one interval simulated, tick,
candidates, observation, mask, reward; ends of episodes and the start of the next are among them.
The pool is 16 H100s in two nodes that serve Llama-2-70B, an interval 15 s, traffic the embedded
generator's at 10 requests/s. `env` keeps its deployment; `switching` draws legal rows uniformly, so
that deployments switch as often as the guardrails let them, and every switch is planned in full.
A worker process per core steps the environments, for `1_thread` the learner's own process; a step
of all waits for the slower worker, the less the more environments each has.

PPO has the settings that this pool's shipped policies are trained with but for the number of
environments and the critic's warm-up, in which the actor rests. It goes on from one of them, as
training does after cloning; `ppo_untrained` begins with a fresh network, which switches nearly
whenever it may. `ppo_vs_learner_only` is the former's rate over that of the same learner on an
environment that costs nothing. Figures are medians over rounds; spreads (max - min) / median.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import VecEnv

from controller.build import build_pipeline, load_profiled_cluster
from controller.decision import DecisionConfig, DecisionPipeline
from controller.planner import Planner
from controller.workload import fit_typing
from engine.cluster import WorkloadTyping, deployment_key
from engine.profile import ProfiledCluster
from envs.build import surrogate_parts
from envs.experiment_config import read_config
from envs.serving_env import ServingEnv
from envs.traffic import Shaping, Source, draw_window, generator_source
from envs.vec_env import ServingVecEnv, WorkerVecEnv
from envs.workload import Trace, WorkloadConfig
from policies.checkpoint import load_policy
from policies.ppo import PpoConfig, PpoPolicy
from policies.training import LearningState, Watch, train

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "configs" / "profiles" / "h100-llama-2-70b.json"
CONFIG = ROOT / "configs" / "h100-16.yaml"
POLICY = ROOT / "policies" / "artifacts" / "h100-16" / "seed0"
DEVICES, RATE_PER_S, EPISODE_S, NUM_TYPES = 16, 10.0, 1800.0, 4
NUM_ENVS, CORES = 32, 2
GOALS = {"env_steps_per_s": 2000, "ppo_steps_per_s": 1500}


class Setup:
    """Pool, traffic and typing, built once; one planner for all environments of a process."""

    def __init__(self) -> None:
        profiled = load_profiled_cluster(PROFILE)
        self.cluster: ProfiledCluster = replace(
            profiled, spec=replace(profiled.spec, num_devices=DEVICES)
        )
        config = WorkloadConfig(mean_rate_per_s=RATE_PER_S)
        longest = profiled.spec.model.max_model_len
        self.source: Source = generator_source(config, Shaping(), longest, np.random.default_rng(0))
        sample = self.source.trace
        self.typing: WorkloadTyping = fit_typing(
            sample.prompt_tokens, sample.output_tokens, NUM_TYPES, seed=0
        )

    def build_venv(self, num_workers: int) -> VecEnv:
        """With planners that have nothing cached yet."""
        if not num_workers:
            return ServingVecEnv(self.build_envs(range(NUM_ENVS)))
        spec = self.build_pipeline().observation_spec
        return WorkerVecEnv(self.build_envs, spec, NUM_ENVS, num_workers)

    def build_pipeline(self) -> DecisionPipeline:
        return build_pipeline(self.cluster, self.typing, DecisionConfig())

    def build_envs(self, numbers: Sequence[int]) -> list[ServingEnv]:
        """With one planner for all."""
        planner = self.build_pipeline().planner
        return [self._build_env(planner) for _ in numbers]

    def _build_env(self, planner: Planner) -> ServingEnv:
        pipeline = self.build_pipeline()
        pipeline.planner = planner

        def make_trace(rng: np.random.Generator) -> Trace:
            return draw_window(self.source, RATE_PER_S, EPISODE_S, rng)

        key = deployment_key(planner.optimum(np.full(NUM_TYPES, RATE_PER_S / NUM_TYPES)))
        return ServingEnv(surrogate_parts(pipeline, make_trace, key, columns=True))


class IdleVecEnv(VecEnv):
    """Gives what another environment gave once, at no cost: what is left is the learner."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv.num_envs, venv.observation_space, venv.action_space)
        self._flats, self._masks = venv.reset(), venv.env_method("action_masks")
        self._rewards = np.random.default_rng(0).standard_normal(venv.num_envs).astype(np.float32)
        self._dones = np.zeros(venv.num_envs, np.bool_)

    def reset(self) -> Any:
        return self._flats

    def step_async(self, actions: NDArray[Any]) -> None:
        """Nothing happens."""

    def step_wait(self) -> Any:
        return self._flats, self._rewards, self._dones, [{} for _ in range(self.num_envs)]

    def close(self) -> None:
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        assert method_name == "action_masks", method_name
        return [self._masks[i] for i in self._get_indices(indices)]

    def action_masks(self) -> None:
        """That `env_method` has it."""

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def measure_env(
    venv: VecEnv, rounds: int, steps: int, is_switching: bool
) -> tuple[list[float], float]:
    """Decisions per second of each round of `steps` decisions per environment, after a first one
    that warms up; and the share of decisions that started a switch."""
    rng, rates, switches = np.random.default_rng(0), [], 0
    venv.seed(0)
    venv.reset()
    for _ in range(rounds + 1):
        begun_s = time.perf_counter()
        for _ in range(steps):
            masks = np.array(venv.env_method("action_masks"))
            drawn = (rng.random(masks.shape) * masks).argmax(axis=1)
            _, _, _, infos = venv.step(drawn if is_switching else np.zeros_like(drawn))
            switches += sum(info["ticket"] is not None for info in infos)
        rates.append(steps * venv.num_envs / (time.perf_counter() - begun_s))
    return rates[1:], switches / (steps * venv.num_envs * (rounds + 1))


def measure_ppo(
    venv: VecEnv, setup: Setup, ppo: PpoConfig, rollouts: int, policy: PpoPolicy | None
) -> list[float]:
    """Steps per second of each rollout but the first, with the updates before it, from this policy
    on, without one from a fresh network."""
    spec = setup.build_pipeline().observation_spec
    at_s: list[float] = []
    steps = ppo.n_steps * venv.num_envs
    ppo = replace(ppo, n_timesteps=rollouts * steps, critic_warmup=0)
    watch = Watch(report=lambda _: at_s.append(time.perf_counter()))
    if policy is None:
        train(venv, replace(ppo, kl_prior_coef=0.0), spec, 0, watch)
    else:
        train(venv, ppo, spec, 0, watch, LearningState(policy), policy)
    return [steps / wall_s for wall_s in np.diff(at_s)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds and rollouts"
    )
    args = parser.parse_args()
    setup, ppo, policy = Setup(), read_config(CONFIG, {}).ppo, load_policy(POLICY)
    episode = round(EPISODE_S / DecisionConfig().grid_s)
    rounds, rollouts, steps, switching_steps = 7, 6, episode, 40
    if args.quick:
        rounds, rollouts, steps, switching_steps = 2, 3, episode // 3, 8
        ppo = replace(ppo, n_steps=ppo.n_steps // 4)
    figures: dict[str, float] = {}
    spreads: dict[str, float] = {}

    def record(name: str, rates: Sequence[float]) -> None:
        figures[name] = round(float(np.median(rates)))
        spreads[name] = float(np.ptp(rates) / np.median(rates))

    alone = setup.build_venv(0)
    record("env_steps_per_s_1_thread", measure_env(alone, rounds, steps, False)[0])
    alone.close()
    venv = setup.build_venv(CORES)
    record("env_steps_per_s", measure_env(venv, rounds, steps, False)[0])
    rates, switched = measure_env(venv, rounds, switching_steps, True)
    record("switching_steps_per_s", rates)
    record("ppo_steps_per_s", measure_ppo(venv, setup, ppo, rollouts, policy))
    record("ppo_untrained_steps_per_s", measure_ppo(venv, setup, ppo, rollouts, None))
    idle = IdleVecEnv(venv)
    record("learner_only_steps_per_s", measure_ppo(idle, setup, ppo, 2 * rollouts, policy))
    venv.close()
    ratio = figures["ppo_steps_per_s"] / figures["learner_only_steps_per_s"]
    table = Table("figure", "value", "goal", "spread")
    for name, value in figures.items():
        goal = f"{GOALS[name]:,}" if name in GOALS else ""
        table.add_row(name, f"{value:,}", goal, f"{spreads[name]:.2f}")
    table.add_row("ppo_vs_learner_only", f"{ratio:.2f}", "", "")
    console = Console(width=110)
    console.print(
        f"{setup.cluster.profile.model} on {DEVICES} x {setup.cluster.profile.device}; "
        f"{NUM_ENVS} environments, {CORES} cores; {switched:.1%} of drawn decisions switched; "
        f"PPO as in {CONFIG.name}: {ppo.n_steps} steps a rollout, batches of {ppo.batch_size}, "
        f"{ppo.n_epochs} epochs, {ppo.hidden_size} wide"
    )
    console.print(table)
    spread = round(max(spreads.values()), 3)
    figures["ppo_vs_learner_only"] = round(ratio, 3)
    print(json.dumps({"benchmark": "env"} | figures | {"spread_max": spread}))


if __name__ == "__main__":
    main()
