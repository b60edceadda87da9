"""Our fitted Q evaluation beside d3rlpy's, on the same transitions; run by hand, in four minutes.

d3rlpy is installed as benchmarks/README.md tells. What is given to both: logs of 10,000 decisions
of drawn processes, 6 states and 3 actions, and a deterministic target. The true Q follows from
Bellman's linear equations; with the counted moves and the mean rewards of a log in them, they give
what a perfect fit to that log would find. d3rlpy's network is fitted to each log from two seeds:
how far those two are from each other is what its optimiser leaves open. Ends with status 1 when our
Q is further than three times that from d3rlpy's, or its error exceeds d3rlpy's by more than that.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Self

import d3rlpy
import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from policies.ope_linear import linear_fqe

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PROCESSES, DECISIONS, STATES, ACTIONS, GAMMA = 5, 10_000, 6, 3, 0.95
STEPS = 10_000  # of d3rlpy's optimiser: 100 copies of its target network, and 0.95^100 is 0.006
PAIRS = np.eye(STATES * ACTIONS)  # features of a state and an action: which pair it is


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    moves: Floats  # [S, A, S]
    rewards: Floats  # [S, A] means
    target: Ints  # [S] the action taken there

    def q(self) -> Floats:
        """[S * A] mean rewards per decision, discounted: (1 - gamma) times their sum."""
        moves = self.moves.reshape(-1, STATES)
        after = moves @ PAIRS[pair(np.arange(STATES), self.target)]
        share = (1.0 - GAMMA) * self.rewards.ravel()
        return np.asarray(np.linalg.solve(np.eye(len(after)) - GAMMA * after, share))


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """One more decision than transitions: the last has no state after it."""

    states: Ints  # [T + 1]
    actions: Ints  # [T + 1]
    rewards: Floats  # [T + 1] times 1 - gamma: errors in Q stay below 1, where d3rlpy's loss, which
    # is Huber's, is the squared error

    def counted(self, target: Ints) -> Process:
        """The process as this log tells it."""
        seen = PAIRS[pair(self.states, self.actions)][:-1]
        number = seen.sum(axis=0)[:, None]
        moves = seen.T @ np.eye(STATES)[self.states[1:]] / number
        rewards = seen.T @ self.rewards[:-1, None] / number / (1.0 - GAMMA)
        shape = (STATES, ACTIONS)
        return Process(moves.reshape(*shape, STATES), rewards.reshape(shape), target)


def pair(states: Ints, actions: Ints) -> Ints:
    return np.asarray(states * ACTIONS + actions)


def draw(rng: np.random.Generator) -> tuple[Process, Log]:
    """A process, and a log of it under a behaviour that takes every action everywhere."""
    moves = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
    mean = rng.normal(size=(STATES, ACTIONS))
    behaviour = 0.5 / ACTIONS + 0.5 * rng.dirichlet(np.ones(ACTIONS), STATES)
    process = Process(moves, mean, rng.integers(0, ACTIONS, STATES))
    states, actions = np.zeros((2, DECISIONS + 1), np.int64)
    for t in range(DECISIONS + 1):
        actions[t] = rng.choice(ACTIONS, p=behaviour[states[t]])
        if t < DECISIONS:
            states[t + 1] = rng.choice(STATES, p=moves[states[t], actions[t]])
    rewards = mean[states, actions] + 0.5 * rng.standard_normal(DECISIONS + 1)
    return process, Log(states, actions, (1.0 - GAMMA) * rewards)


def ours(log: Log, target: Ints) -> Floats:
    """[S * A]"""
    executed = PAIRS[pair(log.states, log.actions)][:-1]
    after = PAIRS[pair(log.states, target[log.states])][1:]
    return linear_fqe(executed, after, log.rewards[:-1], GAMMA)(PAIRS)


class Deterministic:
    """All that `DiscreteFQE` asks of the policy it evaluates; states come one-hot."""

    def __init__(self, target: Ints) -> None:
        self._target = torch.as_tensor(target)

    @property
    def impl(self) -> Self:
        return self

    def predict_best_action(self, x: torch.Tensor) -> torch.Tensor:
        return self._target[x.argmax(dim=1)]


def theirs(log: Log, target: Ints, seed: int) -> Floats:
    """[S * A] with the defaults of its configuration."""
    d3rlpy.seed(seed)
    one_hot = np.eye(STATES, dtype=np.float32)
    ends = np.arange(DECISIONS + 1) == DECISIONS
    transitions = d3rlpy.dataset.MDPDataset(
        one_hot[log.states],
        log.actions[:, None],
        log.rewards[:, None].astype(np.float32),
        terminals=np.zeros(len(ends), np.float32),
        timeouts=ends.astype(np.float32),
        action_size=ACTIONS,
    )
    assert transitions.transition_count == DECISIONS
    fqe = d3rlpy.ope.DiscreteFQE(Deterministic(target), d3rlpy.ope.FQEConfig(gamma=GAMMA))
    quiet = d3rlpy.logging.NoopAdapterFactory()
    fqe.fit(transitions, STEPS, STEPS, logger_adapter=quiet, show_progress=False)
    states, actions = np.divmod(np.arange(STATES * ACTIONS), ACTIONS)
    return np.asarray(fqe.predict_value(one_hot[states], actions), np.float64)


def rms(difference: Floats) -> float:
    return float(np.sqrt((difference**2).mean()))


def compare(seed: int) -> dict[str, float]:
    """One process: its values from states drawn evenly, differences of Q over all pairs (root mean
    squares), and seconds of one fit. Of d3rlpy's two fits, means."""
    process, log = draw(np.random.default_rng(seed))
    start = time.perf_counter()
    mine = ours(log, process.target)
    middle = time.perf_counter()
    fits = [theirs(log, process.target, 2 * seed + fit) for fit in range(2)]
    end = time.perf_counter()
    truth, counted = process.q(), log.counted(process.target).q()
    taken = pair(np.arange(STATES), process.target)
    return {
        "value": float(truth[taken].mean()),
        "value_counted": float(counted[taken].mean()),
        "value_fqe": float(mine[taken].mean()),
        "value_fqe_d3rlpy": float(np.mean([fit[taken].mean() for fit in fits])),
        "counted_error": rms(counted - truth),
        "fqe_error": rms(mine - truth),
        "fqe_error_d3rlpy": float(np.mean([rms(fit - truth) for fit in fits])),
        "difference": float(np.mean([rms(mine - fit) for fit in fits])),
        "difference_d3rlpy": rms(fits[0] - fits[1]),
        "seconds": middle - start,
        "seconds_d3rlpy": (end - middle) / 2,
    }


def main() -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    torch.set_num_threads(1)
    rows = [compare(seed) for seed in range(PROCESSES)]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name in mean:
        print(f"{name:18}", *(f"{row[name]:+9.4f}" for row in rows), f"  mean {mean[name]:+.4f}")
    told = {name: mean[name] for name in mean if not name.startswith("value")}
    for name in ("value_fqe", "value_fqe_d3rlpy"):
        errors = [abs(row[name] - row["value"]) for row in rows]
        told[name.replace("fqe", "error")] = float(np.mean(errors))
    print(json.dumps({"benchmark": "fqe_peer"} | told | {"d3rlpy": version("d3rlpy")}))
    worse = mean["fqe_error"] - mean["fqe_error_d3rlpy"]
    left_open = mean["difference_d3rlpy"]
    return int(mean["difference"] > 3.0 * left_open or worse > left_open)


if __name__ == "__main__":
    sys.exit(main())
