"""Off-policy estimators over N independent episodes of H decisions, for short horizons. Pure numpy.

A long log is cut into windows to use them. `ratios` [N, H] are P(executed) under the target over
that under the policy that ran. Values are expected sums of discounted rewards over an episode.

Sources: per-decision and doubly robust estimators of Precup et al. (2000), Jiang and Li (2016,
equation 10), Thomas and Brunskill (2016, equation 8, the weighted one); marginalised weights of
Xie et al. (2019); fitted Q evaluation of Le et al. (2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def discounts(horizon: int, gamma: float) -> Floats:
    """[H]"""
    return np.asarray(gamma ** np.arange(horizon), np.float64)


def normalised(weights: Floats) -> Floats:
    """[N, H] with mean 1 over episodes at each step; all zero where every weight is."""
    mean = weights.mean(axis=0)
    return np.asarray(np.divide(weights, mean, out=np.zeros_like(weights), where=mean > 0))


def trajectory_is(
    ratios: Floats, rewards: Floats, gamma: float = 1.0, weighted: bool = False
) -> float:
    """Whole returns, each weighted by the product of all its ratios."""
    weights = np.asarray(ratios.prod(axis=1, keepdims=True))
    weights = normalised(weights) if weighted else weights
    returns = rewards @ discounts(rewards.shape[1], gamma)
    return float((weights[:, 0] * returns).mean())


def per_decision_is(
    ratios: Floats, rewards: Floats, gamma: float = 1.0, weighted: bool = False
) -> float:
    """Each reward weighted by the product of the ratios up to it."""
    weights = np.asarray(np.cumprod(ratios, axis=1))
    weights = normalised(weights) if weighted else weights
    return float((weights * rewards).mean(axis=0) @ discounts(rewards.shape[1], gamma))


def doubly_robust(
    ratios: Floats,
    rewards: Floats,
    q: Floats,
    v: Floats,
    gamma: float = 1.0,
    weighted: bool = False,
) -> float:
    """A model's value, corrected by its weighted errors.

    q [N, H]: the model's value of what was executed; v [N, H + 1]: of the state, under the target;
    the last column is what is left after the episode. Exact in expectation when q and v are the
    true values, or when the ratios are right.
    """
    weights = np.asarray(np.cumprod(ratios, axis=1))
    weights = normalised(weights) if weighted else weights
    errors = rewards + gamma * v[:, 1:] - q
    corrections = (weights * errors).mean(axis=0) @ discounts(rewards.shape[1], gamma)
    return float(v[:, 0].mean() + corrections)


# --------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True, slots=True, eq=False)
class TabularEpisodes:
    """N episodes of H steps over S states and A actions."""

    states: Ints  # [N, H + 1]
    actions: Ints  # [N, H]
    rewards: Floats  # [N, H]

    def counts(self, num_states: int, num_actions: int, step: int) -> Floats:
        """[S, A, S] transitions seen at a step."""
        seen = np.zeros((num_states, num_actions, num_states))
        here, then = self.states[:, step], self.states[:, step + 1]
        np.add.at(seen, (here, self.actions[:, step], then), 1.0)
        return seen

    def reward_sums(self, num_states: int, num_actions: int, step: int) -> Floats:
        """[S, A]"""
        sums = np.zeros((num_states, num_actions))
        np.add.at(sums, (self.states[:, step], self.actions[:, step]), self.rewards[:, step])
        return sums


def fitted_q(episodes: TabularEpisodes, target: Floats, gamma: float = 1.0) -> Floats:
    """[H, S, A] backward from the last step: means of reward + gamma * next value under `target`
    [S, A]; zero where nothing was seen."""
    num_states, num_actions = target.shape
    horizon = episodes.actions.shape[1]
    q = np.zeros((horizon, num_states, num_actions))
    after = np.zeros(num_states)
    for step in range(horizon - 1, -1, -1):
        seen = episodes.counts(num_states, num_actions, step)
        number = np.maximum(seen.sum(axis=2), 1.0)
        rewards = episodes.reward_sums(num_states, num_actions, step)
        q[step] = (rewards + gamma * seen @ after) / number
        after = (target * q[step]).sum(axis=1)
    return q


def direct_value(episodes: TabularEpisodes, target: Floats, gamma: float = 1.0) -> float:
    """The value that `fitted_q` gives the first states."""
    q = fitted_q(episodes, target, gamma)
    return float((target * q[0]).sum(axis=1)[episodes.states[:, 0]].mean())


def values_along(episodes: TabularEpisodes, q: Floats, target: Floats) -> tuple[Floats, Floats]:
    """q [N, H] of what was executed and v [N, H + 1] under the target, for `doubly_robust`."""
    steps = np.arange(q.shape[0])
    executed = q[steps, episodes.states[:, :-1], episodes.actions]
    values = (target * q).sum(axis=2)[steps, episodes.states[:, :-1]]
    return executed, np.concatenate([values, np.zeros((len(values), 1))], axis=1)


def marginalised_is(
    episodes: TabularEpisodes, target: Floats, behaviour: Floats, gamma: float = 1.0
) -> float:
    """Rewards weighted by how much more often the target is in a state, by the transitions seen,
    and by one ratio of actions instead of a product of them. `target`, `behaviour`: [S, A]."""
    num_states, num_actions = target.shape
    ratio = np.divide(target, behaviour, out=np.zeros_like(target), where=behaviour > 0)
    states, number = episodes.states, len(episodes.states)
    visited = np.bincount(states[:, 0], minlength=num_states) / number
    value = 0.0
    for step in range(episodes.actions.shape[1]):
        here = np.bincount(states[:, step], minlength=num_states) / number
        share = np.divide(visited, here, out=np.zeros(num_states), where=here > 0)
        weights = share[:, None] * ratio
        rewards = episodes.reward_sums(num_states, num_actions, step) / number
        value += gamma**step * float((weights * rewards).sum())
        seen = episodes.counts(num_states, num_actions, step) / number
        visited = np.einsum("sa,sat->t", weights, seen)
    return value
