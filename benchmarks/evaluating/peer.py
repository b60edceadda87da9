"""Our estimators over episodes beside scope-rl's, on the same drawn episodes; run by hand.

scope-rl (Kiyohara et al. 2023) has pins of its own and is installed in an environment of its own;
benchmarks/README.md tells how. What is given to both: 2,000 episodes of 6 decisions over 4 states
and 3 actions with known probabilities, and our fitted Q. Prints both numbers and ends with status 1
when one differs by more than a billionth.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scope_rl.ope import discrete as peer

from policies.ope_episodes import (
    TabularEpisodes,
    direct_value,
    doubly_robust,
    fitted_q,
    per_decision_is,
    trajectory_is,
    values_along,
)

Floats = NDArray[np.float64]
EPISODES, HORIZON, STATES, ACTIONS, GAMMA = 2000, 6, 4, 3, 0.95
TOLERANCE = 1e-9
PEERS = {
    "trajectory_is": peer.TrajectoryWiseImportanceSampling,
    "trajectory_is, weighted": peer.SelfNormalizedTIS,
    "per_decision_is": peer.PerDecisionImportanceSampling,
    "per_decision_is, weighted": peer.SelfNormalizedPDIS,
    "doubly_robust": peer.DoublyRobust,
    "doubly_robust, weighted": peer.SelfNormalizedDR,
    "direct_value": peer.DirectMethod,
}


def draw(rng: np.random.Generator) -> tuple[TabularEpisodes, Floats, Floats]:
    """Episodes of a drawn process, behaviour and target, [S, A] each."""
    moves = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
    behaviour = rng.dirichlet(4 * np.ones(ACTIONS), STATES)
    target = rng.dirichlet(np.ones(ACTIONS), STATES)
    states = np.zeros((EPISODES, HORIZON + 1), np.int64)
    actions = np.zeros((EPISODES, HORIZON), np.int64)
    states[:, 0] = rng.integers(0, STATES, EPISODES)
    for step in range(HORIZON):
        here = states[:, step]
        actions[:, step] = _pick(behaviour[here], rng)
        states[:, step + 1] = _pick(moves[here, actions[:, step]], rng)
    mean = rng.normal(size=(STATES, ACTIONS))[states[:, :-1], actions]
    rewards = mean + 0.5 * rng.standard_normal(actions.shape)
    return TabularEpisodes(states, actions, rewards), behaviour, target


def _pick(probabilities: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    edges = np.cumsum(probabilities, axis=1)
    return np.asarray((rng.random((len(edges), 1)) > edges[:, :-1]).sum(axis=1))


def ours(episodes: TabularEpisodes, behaviour: Floats, target: Floats) -> dict[str, float]:
    ratios = (target / behaviour)[episodes.states[:, :-1], episodes.actions]
    q, v = values_along(episodes, fitted_q(episodes, target, GAMMA), target)
    found = {"direct_value": direct_value(episodes, target, GAMMA)}
    for label, weighted in (("", False), (", weighted", True)):
        for estimator in (trajectory_is, per_decision_is):
            found[estimator.__name__ + label] = estimator(
                ratios, episodes.rewards, GAMMA, weighted=weighted
            )
        found["doubly_robust" + label] = doubly_robust(
            ratios, episodes.rewards, q, v, GAMMA, weighted=weighted
        )
    return found


def theirs(episodes: TabularEpisodes, behaviour: Floats, target: Floats) -> dict[str, float]:
    states, actions = episodes.states[:, :-1], episodes.actions
    q = fitted_q(episodes, target, GAMMA)[np.arange(HORIZON), states]  # [N, H, A]
    given: dict[str, Any] = {
        "step_per_trajectory": HORIZON,
        "action": actions.ravel(),
        "reward": episodes.rewards.ravel(),
        "pscore": behaviour[states, actions].ravel(),
        "evaluation_policy_action_dist": target[states].reshape(-1, ACTIONS),
        "state_action_value_prediction": q.reshape(-1, ACTIONS),
        "gamma": GAMMA,
    }
    return {name: float(made().estimate_policy_value(**given)) for name, made in PEERS.items()}


def main() -> int:
    drawn = draw(np.random.default_rng(0))
    mine, other = ours(*drawn), theirs(*drawn)
    for name in PEERS:
        print(f"{name:28} ours {mine[name]:+.12f}  scope-rl {other[name]:+.12f}")
    largest = max(abs(mine[name] - other[name]) for name in PEERS)
    told = {"largest_difference": largest, "scope_rl": version("scope-rl")}
    print(json.dumps({"benchmark": "ope_peer", "estimators": len(PEERS)} | told))
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
