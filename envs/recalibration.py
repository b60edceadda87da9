"""A profile set right by a log: step times per parallel configuration, and what a switch takes.

Steps of each parallel configuration take exp(theta) times as long as profiled, and so do switches.
theta is fitted to the rewards of a log, replayed in the surrogate with the decisions as logged: by
Gauss and Newton on means over stays in one deployment, with slopes by differences of about a third
of the prior spread, and with a prior by which configurations err alike, the more so the more alike
their degrees are. Finer differences would be noise: a queue is chaotic. What the log leaves open is
the covariance of theta; models drawn from it show what that means for a policy
(`policies.ope_replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ParallelConfig
from engine.profile import ProfiledCluster
from policies.ope_replay import configurations_of

Floats, Ints = NDArray[np.float64], NDArray[np.int64]
Simulate = Callable[[ProfiledCluster], Floats]
"""A pool -> rewards [T] of the log's intervals in its surrogate, with the decisions as logged."""

SWITCH = "switch"  # among the configurations' names
# Prior spread of theta: of all alike, by doubling of tp or pp, of each, of switches.
COMMON, DOUBLED, OWN, OF_SWITCHES = 0.3, 0.1, 0.1, 0.5
STEPS = (0.6, 0.4, 0.3)  # prior spreads that slopes are differences over; one iteration each
LONGEST = 0.35  # that theta moves at once
HALVINGS = 3  # of a step that makes it worse
MIN_SHARE = 1e-3  # of the variance of the log's means, that the error's is at least


@dataclass(frozen=True, slots=True, eq=False)
class Recalibration:
    """What a log says of a profile."""

    profiled: ProfiledCluster
    theta: Floats  # [C + 1] of each configuration's steps, in the profile's order, and of switches
    covariance: Floats  # [C + 1, C + 1]

    @property
    def cluster(self) -> ProfiledCluster:
        """The most probable one."""
        return scaled(self.profiled, self.theta)

    def draw(self, rng: np.random.Generator) -> ProfiledCluster:
        """One that the log allows as well."""
        return scaled(self.profiled, rng.multivariate_normal(self.theta, self.covariance))

    def factors(self) -> dict[str, tuple[float, float]]:
        """Times over the profile's, and their relative standard error, by configuration and of
        SWITCH."""
        names = [*(steps.parallel.key for steps in self.profiled.profile.steps), SWITCH]
        errors = np.sqrt(np.diag(self.covariance))
        return {
            name: (float(factor), float(error))
            for name, factor, error in zip(names, np.exp(self.theta), errors, strict=True)
        }

    def to_json(self) -> dict[str, dict[str, float]]:
        return {
            name: {"factor": round(factor, 4), "relative_error": round(error, 4)}
            for name, (factor, error) in self.factors().items()
        }


def scaled(cluster: ProfiledCluster, theta: Floats) -> ProfiledCluster:
    """The pool with times exp(theta) of its own."""
    profile, (*factors, switch) = cluster.profile, np.exp(theta).tolist()
    steps = tuple(s.scaled(f) for s, f in zip(profile.steps, factors, strict=True))
    changed = replace(
        profile,
        steps=steps,
        switch_overhead_s=switch * profile.switch_overhead_s,
        link_bytes_per_s=profile.link_bytes_per_s / switch,
    )
    return replace(cluster, profile=changed)


def prior_covariance(parallel: Sequence[ParallelConfig]) -> Floats:
    """[C + 1, C + 1]: machines are slower or faster than profiled in all, by what is split over
    devices, and each configuration a little."""
    split = np.log2([(p.tp, p.pp) for p in parallel])
    found = np.zeros((len(parallel) + 1,) * 2)
    found[:-1, :-1] = COMMON**2 + DOUBLED**2 * split @ split.T + OWN**2 * np.eye(len(parallel))
    found[-1, -1] = OF_SWITCHES**2
    return found


def recalibrate(
    cluster: ProfiledCluster,
    simulate: Simulate,
    keys: Sequence[str],
    reward: Floats,
    block: int,
) -> Recalibration:
    """Fitted to `reward` [T] of intervals in deployments `keys` [T]; runs `simulate` some five
    times per configuration in them. With less than a block of log it is the prior."""
    names = [steps.parallel.key for steps in cluster.profile.steps]
    prior = prior_covariance([steps.parallel for steps in cluster.profile.steps])
    theta = np.zeros(len(prior))
    if len(reward) < block:
        return Recalibration(cluster, theta, prior)
    precision, stays = np.linalg.inv(prior), _Stays.of(keys, block)
    served = {c for key in set(keys) for c in configurations_of(key)}
    fitted = [i for i, name in enumerate(names) if name in served]
    fitted += [len(names)] if len(set(keys)) > 1 else []
    actual = stays.means(reward)
    least = max(MIN_SHARE * float(actual.var()), 1e-12)

    def error(at: Floats) -> Floats:
        return (actual - stays.means(simulate(scaled(cluster, at)))) * stays.weights

    left, hessian = error(theta), precision
    for step in STEPS:
        variance = max(float((left**2).sum()) / stays.blocks, least)
        steps = step * np.sqrt(np.diag(prior))
        if left @ stays.weights > 0:  # where a model that is too slow still moves
            steps = -steps
        slopes = np.zeros((len(left), len(theta)))
        for i in fitted:
            slopes[:, i] = (left - error(theta + steps * np.eye(len(theta))[i])) / steps[i]
        hessian = slopes.T @ slopes / variance + precision
        downhill = slopes.T @ left / variance - precision @ theta
        move = np.clip(np.linalg.solve(hessian, downhill), -LONGEST, LONGEST)
        cost = _cost(left, theta, variance, precision)
        for _ in range(HALVINGS):
            tried = error(theta + move)
            if _cost(tried, theta + move, variance, precision) < cost:
                theta, left = theta + move, tried
                break
            move = move / 2
    return Recalibration(cluster, theta, np.linalg.inv(hessian))


def _cost(error: Floats, theta: Floats, variance: float, precision: Any) -> float:
    return float((error**2).sum()) / variance + float(theta @ precision @ theta)


@dataclass(frozen=True, slots=True, eq=False)
class _Stays:
    """Intervals in one deployment, one after another, of one block at most: P of them."""

    index: Ints  # [T]
    weights: Floats  # [P] root of each one's share of a block
    blocks: float  # that all of them come to

    @classmethod
    def of(cls, keys: Sequence[str], block: int) -> _Stays:
        served = np.array(keys)
        begins = np.arange(len(served)) % block == 0
        begins[1:] |= served[1:] != served[:-1]
        index = np.cumsum(begins) - 1
        shares = np.bincount(index) / block
        return cls(index, np.sqrt(shares), float(shares.sum()))

    def means(self, values: Floats) -> Floats:
        """[P] of `values` [T]."""
        return np.asarray(np.bincount(self.index, values) / np.bincount(self.index))
