"""Has an expert decide in training episodes, and keeps what it saw and what it did.

Experts know what a controller knows: the forecast, never the traffic to come.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.planner import Planner
from engine.cluster import SwitchPlan
from engine.errors import TidewrightError
from envs.experiment import Experiment, build_env
from envs.lookahead import EnvOutlook
from envs.serving_env import ServingEnv
from policies.base import Future, Observation, TrafficColumns
from policies.baselines import KEEP_ROW, HysteresisPolicy
from policies.cloning import CloningConfig, Demonstrations
from policies.mpc import MpcPolicy

Costs = Callable[[Observation], NDArray[np.float64]]  # [K]; see `Demonstrations`
Report = Callable[[int], None]  # decisions so far
STREAM = 0xC10  # apart from the seeds of training and of evaluation


def demonstrations(
    experiment: Experiment, config: CloningConfig, path: Path, report: Report = lambda n: None
) -> Demonstrations:
    """Those in the file at `path`, else collected anew and written there.

    Raises InvalidRequestError when the file came about otherwise.
    """
    facts = _facts(experiment, config)
    if path.exists():
        return Demonstrations.load(path, facts)
    found = collect(experiment, config, report)
    found.save(path, facts)
    return found


def _facts(experiment: Experiment, config: CloningConfig) -> dict[str, str]:
    """What decisions depend on, for the header of their file."""
    how = {name: getattr(config, name) for name in ("expert", "num_decisions", "noise", "seed")}
    if config.expert != "hysteresis":
        how["mpc"] = dataclasses.asdict(config.mpc)
    sections = {"workload", "decision", "scenario", "predictor", "slo", "env", "num_devices"}
    settings = experiment.config.model_dump(mode="json", include=sections)
    settings["env"] = {k: v for k, v in settings["env"].items() if not k.startswith("num_")}
    settings["workload"].pop("folder")
    values = (
        how
        | settings
        | {
            "observation": experiment.pipeline().observation_spec.hash,
            "profile": experiment.config.profile.name,
        }
    )
    return {name: json.dumps(value, sort_keys=True) for name, value in values.items()}


def collect(
    experiment: Experiment, config: CloningConfig, report: Report = lambda n: None
) -> Demonstrations:
    """`num_decisions` with a choice, from as many episodes as that takes; the same whatever the
    number of processes."""
    parts: list[Demonstrations] = []
    number = 0
    with _episodes(experiment, config) as episodes:
        for part in episodes:
            parts.append(part)
            number += len(part)
            report(min(number, config.num_decisions))
            if number >= config.num_decisions:
                break
    names = [field.name for field in dataclasses.fields(Demonstrations)]
    joined = (np.concatenate([getattr(p, name) for p in parts]) for name in names)
    return Demonstrations(*joined).part(slice(config.num_decisions))


@contextmanager
def _episodes(experiment: Experiment, config: CloningConfig) -> Iterator[Iterator[Demonstrations]]:
    """Episodes 0, 1, ... without end."""
    if config.num_processes == 1:
        planner = experiment.pipeline().planner
        yield (_episode(experiment, planner, config, i) for i in itertools.count())
        return
    pool = ProcessPoolExecutor(
        config.num_processes, get_context("spawn"), _start_process, (experiment, config)
    )
    try:
        yield _in_order(pool, 2 * config.num_processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, ahead: int) -> Iterator[Demonstrations]:
    """Keeps `ahead` episodes under way."""
    waiting = [pool.submit(_episode_in_process, i) for i in range(ahead)]
    for index in itertools.count():
        part = waiting.pop(0).result()
        waiting.append(pool.submit(_episode_in_process, ahead + index))
        yield part


_process: dict[str, Any] = {}  # of a collecting process, set once by `_start_process`


def _start_process(experiment: Experiment, config: CloningConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    _process["of"] = (experiment, experiment.pipeline().planner, config)


def _episode_in_process(index: int) -> Demonstrations:
    experiment, planner, config = _process["of"]
    return _episode(experiment, planner, config, index)


def _episode(
    experiment: Experiment, planner: Planner, config: CloningConfig, index: int
) -> Demonstrations:
    """The decisions of one episode at which more than one row was legal."""
    stream = np.random.SeedSequence((config.seed, STREAM, index))
    seed = int(stream.generate_state(1)[0])
    env, rng = build_env(experiment, planner), np.random.default_rng(stream)
    outlook = EnvOutlook(env, clairvoyant=False, seed=seed)
    expert = _expert(config, env, outlook)
    env.reset(seed=seed)
    seen: list[tuple[Any, ...]] = []
    while not env.is_over:
        assert env.prepared is not None
        observation = env.prepared.observation
        row = KEEP_ROW
        if observation.mask.sum() > 1:
            costs = expert(observation)
            seen.append((observation.flat(), observation.mask, costs.astype(np.float32)))
            row = int(costs.argmin())
        if rng.random() < config.noise:
            row = int(rng.choice(np.flatnonzero(observation.mask)))
        *_, info = env.step(row)
        outlook.observe(TrafficColumns(**info["traffic"]))
    env.close()
    return _stack(seen, env)


def _stack(seen: list[tuple[Any, ...]], env: ServingEnv) -> Demonstrations:
    if seen:
        return Demonstrations(*(np.stack(column) for column in zip(*seen, strict=True)))
    spec = env.pipeline.observation_spec
    none = np.zeros((0, spec.max_candidates), np.float32)
    return Demonstrations(np.zeros((0, spec.flat_size), np.float32), none > 0, none)


def _expert(config: CloningConfig, env: ServingEnv, outlook: EnvOutlook) -> Costs:
    """Costs of rows under the expert, of hysteresis without its memory."""
    if config.expert == "hysteresis":
        return HysteresisPolicy(env.pipeline.observation_spec).relative_costs
    if config.expert == "rollouts":
        return Rollouts(env, config.mpc.horizon_s).costs
    mpc = MpcPolicy(outlook, config.mpc)

    def ask_mpc(observation: Observation) -> NDArray[np.float64]:
        costs = mpc.relative_costs(observation)
        if np.isfinite(costs).any():
            return costs
        return np.where(np.arange(len(observation.mask)) == KEEP_ROW, 0.0, np.inf)

    return ask_mpc


class Rollouts:
    """What each row comes to on the traffic that follows, were nothing decided after it.

    A cost is what the requests that are there or come within the horizon miss of a worth of 1, in
    the mean. One course of the traffic is an unbiased sample of those that might have come: the
    *mean* of such costs over alike decisions is what a policy can know, the cheapest row is not.
    """

    def __init__(self, env: ServingEnv, horizon_s: float) -> None:
        self._env, self._horizon_s = env, horizon_s
        self._outlook = EnvOutlook(env, clairvoyant=True)

    def costs(self, observation: Observation) -> NDArray[np.float64]:
        """[K]; inf where a row is illegal or cannot be reached."""
        costs = np.full(len(observation.mask), np.inf)
        (future,) = self._outlook.futures(self._horizon_s, 1)
        for row in np.flatnonzero(observation.mask):
            plan = self._outlook.plan(int(row))
            if row == KEEP_ROW or plan is not None:
                costs[row] = self._cost(future, plan)
        return costs

    def _cost(self, future: Future, plan: SwitchPlan | None) -> float:
        simulator, ledger = self._outlook.simulator(), self._env.ledger.fork()
        before = simulator.snapshot()
        end_s = before.now_s + self._horizon_s
        try:
            traffic = simulator.rollout(end_s, future, plan).traffic
        except TidewrightError:
            return np.inf
        present = before.num_arrived - before.num_finished - before.num_rejected
        worth = ledger.settle(traffic, end_s).total + ledger.open_worth(end_s)
        return 1.0 - worth * ledger.config.scale_requests / max(present + len(future.arrival_s), 1)
