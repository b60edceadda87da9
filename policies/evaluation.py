"""Policies against each other on the same windows of traffic: run episodes, score, rank.

Environments are handed in; nothing here knows whether a surrogate or an engine is behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from engine.cluster import RequestOutcome, RequestStatus
from policies.base import Observation, Policy, choose
from policies.baselines import KeepPolicy

Window = TypeVar("Window")


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """All that one window of traffic left under one policy."""

    outcomes: tuple[RequestOutcome, ...]
    unfinished_arrivals_s: tuple[float, ...]  # of requests still in the system at end_s
    end_s: float
    rewards: tuple[float, ...]  # one per decision
    num_switches: int
    switch_s: float  # seconds spent in them
    num_slo_met: int


class DecisionEnv(Protocol):
    """What evaluation needs of an environment: one episode over one window."""

    def start(self) -> Observation:
        """The first decision's observation."""
        ...

    def decide(self, action: int) -> tuple[Observation, bool]:
        """Act, go to the next decision; True when the window is over."""
        ...

    def record(self) -> EpisodeRecord: ...

    def close(self) -> None:
        """End what the environment has started."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """A line of the table. Latencies count every request that was not rejected: one that did not
    finish within its window counts with its age at the end. Attainment counts every arrival."""

    policy: str
    latency_s: float  # mean
    latency_p99_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    slo_attainment: float
    mean_reward: float  # per decision
    switches: int
    switch_s: float
    finished: int
    unfinished: int
    rejected: int

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def _percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else 0.0


def score(name: str, records: Iterable[EpisodeRecord]) -> Score:
    """Pool the records of one policy over all windows."""
    records = tuple(records)
    ended = [o for r in records for o in r.outcomes]
    served = [o for o in ended if o.status is RequestStatus.FINISHED]
    ages = [r.end_s - arrival_s for r in records for arrival_s in r.unfinished_arrivals_s]
    latencies = [o.finish_s - o.arrival_s for o in served] + ages
    arrived = len(ended) + len(ages)
    rewards = [reward for r in records for reward in r.rewards]
    return Score(
        policy=name,
        latency_s=float(np.mean(latencies)) if latencies else 0.0,
        latency_p99_s=_percentile(latencies, 99),
        ttft_p99_s=_percentile([o.ttft_s for o in served if o.ttft_s is not None], 99),
        tpot_p99_s=_percentile([o.tpot_s for o in served if o.tpot_s is not None], 99),
        slo_attainment=sum(r.num_slo_met for r in records) / arrived if arrived else 1.0,
        mean_reward=float(np.mean(rewards)) if rewards else 0.0,
        switches=sum(r.num_switches for r in records),
        switch_s=sum(r.switch_s for r in records),
        finished=len(served),
        unfinished=len(ages),
        rejected=sum(o.status is RequestStatus.REJECTED for o in ended),
    )


def run_episode(
    policy: Policy, env: DecisionEnv, rng: np.random.Generator, deterministic: bool = True
) -> EpisodeRecord:
    """One window from its start to its end under `policy`."""
    policy.reset()
    observation, done = env.start(), False
    while not done:
        action = choose(policy.probabilities(observation), rng, deterministic)
        observation, done = env.decide(action)
    return env.record()


MakeEnv = Callable[[Window, str | None], DecisionEnv]


@dataclass(frozen=True, slots=True)
class Evaluation(Generic[Window]):
    """The common ground of a comparison: every policy meets the same windows and seed.

    make_env(window, key): a fresh environment on that window that starts in deployment `key`
    (None: the default). The same arguments must give the same traffic.
    """

    make_env: MakeEnv[Window]
    windows: tuple[Window, ...]
    seed: int = 0
    deterministic: bool = True

    def run(self, policy: Policy, key: str | None = None) -> tuple[EpisodeRecord, ...]:
        rng, records = np.random.default_rng(self.seed), []
        for window in self.windows:
            with closing(self.make_env(window, key)) as env:
                records.append(run_episode(policy, env, rng, self.deterministic))
        return tuple(records)


def rank_static(
    evaluation: Evaluation[Window],
    keys: Sequence[str],
    report: Callable[[str], None] = lambda key: None,
) -> tuple[Score, ...]:
    """Every deployment kept throughout all windows, the best in hindsight first.

    Best is the largest mean reward over the whole trace, on a tie the smallest latency.
    """
    scores = []
    for key in keys:
        report(key)
        scores.append(score(key, evaluation.run(KeepPolicy(), key)))
    return tuple(sorted(scores, key=lambda s: (-s.mean_reward, s.latency_s)))


def evaluate(
    evaluation: Evaluation[Window],
    policies: Mapping[str, Policy],
    report: Callable[[str], None] = lambda name: None,
    key: str | None = None,
) -> tuple[Score, ...]:
    """One score per policy, in the order given; all start in deployment `key`."""
    scores = []
    for name, policy in policies.items():
        report(name)
        scores.append(score(name, evaluation.run(policy, key)))
    return tuple(scores)
