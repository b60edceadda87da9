"""Estimators over episodes against values by linear algebra, on a random tabular process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.ope_episodes import (
    TabularEpisodes,
    direct_value,
    doubly_robust,
    fitted_q,
    marginalised_is,
    per_decision_is,
    trajectory_is,
    values_along,
)

Floats = NDArray[np.float64]
STATES, ACTIONS, HORIZON, GAMMA = 4, 3, 3, 0.9


@dataclass(frozen=True)
class Process:
    moves: Floats  # [S, A, S]
    reward: Floats  # [S, A]
    first: Floats  # [S]
    behaviour: Floats  # [S, A]
    target: Floats  # [S, A]

    def q(self) -> Floats:
        """[H, S, A] of the target, by backward recursion."""
        found, after = np.zeros((HORIZON, STATES, ACTIONS)), np.zeros(STATES)
        for step in range(HORIZON - 1, -1, -1):
            found[step] = self.reward + GAMMA * self.moves @ after
            after = (self.target * found[step]).sum(axis=1)
        return found

    def value(self) -> float:
        """One linear system over all (step, state), instead of the recursion."""
        size = HORIZON * STATES
        equations, right = np.eye(size), np.zeros(size)
        step_moves = np.einsum("sa,sat->st", self.target, self.moves)
        for step in range(HORIZON):
            here = slice(step * STATES, (step + 1) * STATES)
            right[here] = (self.target * self.reward).sum(axis=1)
            if step + 1 < HORIZON:
                then = slice((step + 1) * STATES, (step + 2) * STATES)
                equations[here, then] = -GAMMA * step_moves
        return float(self.first @ np.linalg.solve(equations, right)[:STATES])

    def draw(self, number: int, rng: np.random.Generator) -> TabularEpisodes:
        states = np.zeros((number, HORIZON + 1), np.int64)
        actions = np.zeros((number, HORIZON), np.int64)
        states[:, 0] = rng.choice(STATES, number, p=self.first)
        for step in range(HORIZON):
            here = states[:, step]
            actions[:, step] = _pick(self.behaviour[here], rng)
            states[:, step + 1] = _pick(self.moves[here, actions[:, step]], rng)
        mean = self.reward[states[:, :-1], actions]
        return TabularEpisodes(states, actions, mean + 0.5 * rng.standard_normal(actions.shape))

    def ratios(self, episodes: TabularEpisodes) -> Floats:
        ratio = self.target / self.behaviour
        return np.asarray(ratio[episodes.states[:, :-1], episodes.actions])


def _pick(probabilities: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    edges = np.cumsum(probabilities, axis=1)
    return np.asarray((rng.random((len(edges), 1)) > edges[:, :-1]).sum(axis=1))


@pytest.fixture(scope="module")
def process() -> Process:
    rng = np.random.default_rng(3)
    return Process(
        rng.dirichlet(np.ones(STATES), (STATES, ACTIONS)),
        rng.normal(size=(STATES, ACTIONS)),
        rng.dirichlet(np.ones(STATES)),
        rng.dirichlet(4 * np.ones(ACTIONS), STATES),
        rng.dirichlet(np.ones(ACTIONS), STATES),
    )


def estimates(process: Process, episodes: TabularEpisodes) -> dict[str, float]:
    ratios, rewards = process.ratios(episodes), episodes.rewards
    q, v = values_along(episodes, fitted_q(episodes, process.target, GAMMA), process.target)
    return {
        "tis": trajectory_is(ratios, rewards, GAMMA),
        "wtis": trajectory_is(ratios, rewards, GAMMA, weighted=True),
        "pdis": per_decision_is(ratios, rewards, GAMMA),
        "wpdis": per_decision_is(ratios, rewards, GAMMA, weighted=True),
        "dr": doubly_robust(ratios, rewards, q, v, GAMMA),
        "wdr": doubly_robust(ratios, rewards, q, v, GAMMA, weighted=True),
        "direct": direct_value(episodes, process.target, GAMMA),
        "mis": marginalised_is(episodes, process.target, process.behaviour, GAMMA),
    }


def test_two_ways_of_computing_the_truth_agree(process: Process) -> None:
    by_recursion = process.first @ (process.target * process.q()[0]).sum(axis=1)
    assert process.value() == pytest.approx(by_recursion, abs=1e-12)


def test_every_estimator_finds_the_value(process: Process) -> None:
    """Means over 60 logs of 2,000 episodes, within four standard errors and a bias of 2e-3, which
    weights that sum to one may have."""
    rng = np.random.default_rng(0)
    found = [estimates(process, process.draw(2000, rng)) for _ in range(60)]
    for name in found[0]:
        values = np.array([f[name] for f in found])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - process.value()) < 4 * error + 2e-3, name


def test_unweighted_estimators_have_no_bias_on_few_episodes(process: Process) -> None:
    """Over 6,000 logs of 5 episodes, within four standard errors."""
    rng = np.random.default_rng(1)
    wrong = rng.normal(size=(HORIZON, STATES, ACTIONS))
    found = []
    for _ in range(6000):
        episodes = process.draw(5, rng)
        ratios, rewards = process.ratios(episodes), episodes.rewards
        q, v = values_along(episodes, wrong, process.target)
        found.append(
            (
                trajectory_is(ratios, rewards, GAMMA),
                per_decision_is(ratios, rewards, GAMMA),
                doubly_robust(ratios, rewards, q, v, GAMMA),
            )
        )
    errors = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - process.value()) < 4 * errors)


def test_a_right_model_makes_doubly_robust_right_whatever_the_weights(process: Process) -> None:
    """The ratios are those of no policy; only the noise of the rewards is left."""
    rng = np.random.default_rng(2)
    episodes = process.draw(40_000, rng)
    q, v = values_along(episodes, process.q(), process.target)
    nonsense = rng.uniform(0.5, 2.5, episodes.actions.shape)
    found = doubly_robust(nonsense, episodes.rewards, q, v, GAMMA)
    assert found == pytest.approx(process.value(), abs=0.03)
    assert per_decision_is(nonsense, episodes.rewards, GAMMA) != pytest.approx(
        process.value(), abs=0.1
    )


def test_doubly_robust_varies_less_than_weights_alone(process: Process) -> None:
    rng = np.random.default_rng(4)
    found = [estimates(process, process.draw(300, rng)) for _ in range(80)]
    spread = {name: float(np.std([f[name] for f in found])) for name in found[0]}
    assert spread["dr"] < 0.8 * spread["pdis"] < 0.8 * spread["tis"]


def test_per_decision_weights_by_hand() -> None:
    ratios, rewards = np.array([[2.0, 0.5], [0.0, 3.0]]), np.array([[1.0, 4.0], [5.0, 7.0]])
    assert per_decision_is(ratios, rewards, 0.5) == pytest.approx((2 + 0.5 * 4 + 0) / 2)
    assert per_decision_is(ratios, rewards, 0.5, weighted=True) == pytest.approx(1 + 0.5 * 4)
    assert trajectory_is(ratios, rewards, 0.5) == pytest.approx((1 * (1 + 2) + 0) / 2)
    q, v = np.zeros((2, 2)), np.zeros((2, 3))
    assert doubly_robust(ratios, rewards, q, v, 0.5) == pytest.approx(2.0)
