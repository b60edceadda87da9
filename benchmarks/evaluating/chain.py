"""A serving system with two loads and two deployments, whose values follow from linear equations.

Load changes by itself. At each decision the policy keeps or switches to the other deployment;
after a switch a guard allows none for one decision. The reward depends on load and on the
deployment that serves, less a cost when it was just switched to, plus noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.ope_data import LoggedDecisions, TargetDecisions
from policies.ope_replay import ModelRun

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KEYS = ("A", "B")
GENERATOR = "chain"


@dataclass(frozen=True, slots=True)
class Chain:
    """Numbers of the system. `serve[load][deployment]` is the reward of an interval."""

    change: tuple[float, float] = (0.05, 0.05)  # probability of leaving low load, high load
    serve: tuple[tuple[float, float], tuple[float, float]] = ((0.9, 0.5), (-0.6, 0.3))
    switch_cost: float = 0.2
    noise: float = 0.3
    dwell: bool = True  # whether the guard exists

    def loads(self, runs: int, decisions: int, rng: np.random.Generator) -> Ints:
        """[N, T], from its stationary distribution on."""
        found = np.zeros((runs, decisions), np.int64)
        found[:, 0] = rng.random(runs) < self.change[0] / sum(self.change)
        draws = rng.random((runs, decisions))
        for t in range(1, decisions):
            leave = np.where(found[:, t - 1] == 1, self.change[1], self.change[0])
            found[:, t] = np.where(draws[:, t] < leave, 1 - found[:, t - 1], found[:, t - 1])
        return found

    # ---------------------------------------------------------------- exact

    def transitions(self, policy: Floats) -> tuple[Floats, Floats]:
        """P [8, 8] and expected reward [8] of states (load, deployment, just switched) under
        `policy` [2, 2]: probability of switching by load and deployment."""
        moves, reward = np.zeros((8, 8)), np.zeros(8)
        for state in range(8):
            load, deployment, recent = state >> 2, (state >> 1) & 1, state & 1
            switch = 0.0 if recent and self.dwell else float(policy[load, deployment])
            for switched, p in ((0, 1.0 - switch), (1, switch)):
                serves = deployment ^ switched
                reward[state] += p * (self.serve[load][serves] - self.switch_cost * switched)
                for then, q in ((load, 1 - self.change[load]), (1 - load, self.change[load])):
                    moves[state, then << 2 | serves << 1 | switched] += p * q
        return moves, reward

    def stationary(self, policy: Floats) -> Floats:
        """[8] share of time in each state: p = p P, sum p = 1."""
        moves, _ = self.transitions(policy)
        equations = np.vstack([moves.T - np.eye(8), np.ones(8)])
        return np.linalg.lstsq(equations, np.append(np.zeros(8), 1.0), rcond=None)[0]

    def value(self, policy: Floats) -> float:
        """Mean reward per decision in the long run."""
        return float(self.stationary(policy) @ self.transitions(policy)[1])

    def discounted_value(self, policy: Floats, start: Floats, gamma: float) -> float:
        """(1 - gamma) times the discounted reward from states drawn from `start` [8]."""
        moves, reward = self.transitions(policy)
        return float((1 - gamma) * start @ np.linalg.solve(np.eye(8) - gamma * moves, reward))

    # ---------------------------------------------------------------- drawn

    def simulate(self, policy: Floats, loads: Ints, rng: np.random.Generator) -> ChainRuns:
        """Runs over given loads, each from a stationary state of its own."""
        runs, decisions = loads.shape
        before = np.zeros((runs, decisions), np.int64)
        free = np.ones((runs, decisions), np.bool_)
        wanted = np.zeros((runs, decisions), np.int64)
        start = self.stationary(policy).reshape(2, 4)[loads[:, 0]]
        start /= start.sum(axis=1, keepdims=True)
        state = (rng.random((runs, 1)) > np.cumsum(start, axis=1)).sum(axis=1)
        deployment, recent = state >> 1, state & 1
        draws = rng.random((runs, decisions))
        for t in range(decisions):
            before[:, t] = deployment
            free[:, t] = ~((recent == 1) & self.dwell)
            wanted[:, t] = draws[:, t] < policy[loads[:, t], deployment]
            recent = wanted[:, t] * free[:, t]
            deployment = deployment ^ recent
        return ChainRuns(self, loads, before, free, wanted, rng.standard_normal(loads.shape))


@dataclass(frozen=True, slots=True, eq=False)
class ChainRuns:
    """N runs of T decisions."""

    chain: Chain
    loads: Ints  # [N, T]
    before: Ints  # [N, T] deployment before each decision
    free: NDArray[np.bool_]  # [N, T] whether the guard allowed a switch
    wanted: Ints  # [N, T] row that the policy chose: 0 keeps, 1 switches
    draws: Floats  # [N, T] of the noise

    @property
    def executed(self) -> Ints:
        return self.wanted * self.free

    def rewards(self, chain: Chain | None = None) -> Floats:
        """[N, T]; with `chain`, those of that model for the same decisions, without noise."""
        numbers = chain or self.chain
        serves = self.before ^ self.executed
        mean = np.array(numbers.serve)[self.loads, serves] - numbers.switch_cost * self.executed
        return mean if chain is not None else mean + self.chain.noise * self.draws

    def log(self, run: int, policy: Floats) -> LoggedDecisions:
        """One run as a log of `policy`. Features are the state after the decision, one-hot."""
        decisions = self.loads.shape[1]
        free, before = self.free[run], self.before[run]
        rows = np.arange(2)
        guard_map = np.where(free[:, None], rows, 0)
        state = (self.loads[run][:, None] << 2) | ((before[:, None] ^ rows) << 1) | rows
        return LoggedDecisions(
            at_s=15.0 * np.arange(decisions),
            keys=tuple((KEYS[d], KEYS[1 - d]) for d in before),
            behaviour=self._probabilities(run, policy),
            guard_map=guard_map,
            executed=self.executed[run],
            reward=self.rewards()[run],
            features=np.eye(8)[state],
            segment=np.zeros(decisions, np.int64),
            generator=GENERATOR,
        )

    def target(self, run: int, policy: Floats) -> TargetDecisions:
        return TargetDecisions(self._probabilities(run, policy), GENERATOR)

    def _probabilities(self, run: int, policy: Floats) -> Floats:
        switch = policy[self.loads[run], self.before[run]]
        return np.stack([1.0 - switch, switch], axis=1)

    def model_run(self, run: int, model: Chain) -> ModelRun:
        """What a model with other numbers makes of the same loads and decisions."""
        load, executed = self.loads[run].astype(np.float64), self.executed[run].astype(np.float64)
        serves = self.before[run] ^ self.executed[run]
        return ModelRun(
            self.rewards(model)[run],
            tuple(KEYS[d] for d in serves),
            np.stack([load, executed, load * serves], axis=1),
        )
