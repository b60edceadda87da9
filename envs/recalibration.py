"""A profile set right by a log: step times per parallel configuration, and what a switch takes.

Steps of each parallel configuration take exp(theta) times as long as profiled, and so do switches.
theta is fitted to a log, replayed in the surrogate with the decisions as logged. What switches take
is known by how long they took. Steps are fitted to rewards and to the seconds per output token: by
Gauss and Newton on means over stays in one deployment, with slopes by differences of about a third
of the prior spread, and with a prior by which configurations err alike, the more so the more alike
their degrees are. Finer differences would be noise: a queue is chaotic. Rewards say little of a
deployment that served for two intervals; the pace of requests that ended there says nearly all.
What the log leaves open is the covariance of theta; models drawn from it show what that means for a
policy (`policies.ope_replay`).
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

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What T intervals of a log came to, in the system or in a model of it."""

    reward: Floats  # [T]
    pace: Floats  # [T] see `pace_of`
    switch_s: Floats  # [K] of each switch that was done


Simulate = Callable[[ProfiledCluster], Signals]
"""A pool -> the log's intervals in its surrogate, with the decisions as logged."""

SWITCH = "switch"  # among the configurations' names
# Prior spread of theta: of all alike, by doubling of tp or pp, of each, of switches.
COMMON, DOUBLED, OWN, OF_SWITCHES = 0.3, 0.1, 0.1, 0.5
STEPS = (0.6, 0.4, 0.3)  # prior spreads that slopes are differences over; one iteration each
LONGEST = 0.35  # that theta moves at once
HALVINGS = 3  # of a step that makes it worse
MIN_SHARE = 1e-3  # of the variance of the log's means, that the error's is at least
LEAST = (1e-12, 0.02**2)  # the same of rewards, of paces: no model is right to the per cent
# Of theta of steps and of switches, however much log there is: what one factor cannot set right.
STEP_ERROR, SWITCH_ERROR = 0.05, 0.1
SWITCH_ROUNDS = 3  # of setting it right: part of a switch is waiting for steps


def pace_of(tpot_s: Floats) -> float:
    """Mean logarithm of the seconds per output token of requests that ended in an interval; nan
    when none took any."""
    known = tpot_s[tpot_s > 0]
    return float(np.log(known).mean()) if len(known) else float("nan")


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
    logged: Signals,
    block: int,
) -> Recalibration:
    """Fitted to what was `logged` in T intervals in deployments `keys` [T]; runs `simulate` three
    times per configuration in them, and up to thirteen times more. With less than a block of log it
    is the prior."""
    parallel = [steps.parallel for steps in cluster.profile.steps]
    covariance = prior_covariance(parallel)
    theta = np.zeros(len(covariance))
    if len(keys) < block:
        return Recalibration(cluster, theta, covariance)
    if len(logged.switch_s):
        covariance[-1, -1] = SWITCH_ERROR**2
        for _ in range(SWITCH_ROUNDS):
            theta[-1] += _log_ratio(logged.switch_s, simulate(scaled(cluster, theta)).switch_s)

    def run(of_steps: Floats) -> Signals:
        return simulate(scaled(cluster, np.append(of_steps, theta[-1])))

    served = {c for key in set(keys) for c in configurations_of(key)}
    fitted = [i for i, config in enumerate(parallel) if config.key in served]
    theta[:-1], covariance[:-1, :-1] = _fit_steps(
        run, fitted, _Stays.of(keys, block), logged, covariance[:-1, :-1]
    )
    return Recalibration(cluster, theta, covariance)


def _log_ratio(ours: Floats, theirs: Floats) -> float:
    """By how much ours are longer, as a mean of logarithms; 0 where there are none."""
    return float(np.log(ours).mean() - np.log(theirs).mean()) if len(theirs) else 0.0


def _fit_steps(
    run: Callable[[Floats], Signals],
    fitted: Sequence[int],
    stays: _Stays,
    logged: Signals,
    prior: Floats,
) -> tuple[Floats, Floats]:
    """Most probable theta [C] of steps, and its covariance [C, C], given what was `logged` and what
    the model says with another theta; of configurations not `fitted` only the prior speaks."""
    theta, precision = np.zeros(len(prior)), np.linalg.inv(prior)
    actual = stays.means(logged)
    known = [row[~np.isnan(row)] for row in actual]
    varied = [MIN_SHARE * row.var() if len(row) else 0.0 for row in known]
    least = np.maximum(varied, LEAST)[:, None]

    def error(at: Floats) -> Floats:
        return np.nan_to_num(actual - stays.means(run(at))) * stays.weights

    left, hessian = error(theta), precision
    for step in STEPS:
        square = (left**2).sum(axis=1, keepdims=True) / stays.blocks
        spread, steps = np.sqrt(np.maximum(square, least)), step * np.sqrt(np.diag(prior))
        if left[0] @ stays.weights > 0:  # where a model that is too slow still moves
            steps = -steps
        slopes = np.zeros((left.size, len(theta)))
        for i in fitted:
            moved = error(theta + steps * np.eye(len(theta))[i])
            slopes[:, i] = ((left - moved) / spread).ravel() / steps[i]
        hessian = slopes.T @ slopes + precision
        downhill = slopes.T @ (left / spread).ravel() - precision @ theta
        move = np.clip(np.linalg.solve(hessian, downhill), -LONGEST, LONGEST)
        cost = _cost(left / spread, theta, precision)
        for _ in range(HALVINGS):
            tried = error(theta + move)
            if _cost(tried / spread, theta + move, precision) < cost:
                theta, left = theta + move, tried
                break
            move = move / 2
    return theta, np.linalg.inv(hessian) + STEP_ERROR**2 * np.eye(len(theta))


def _cost(error: Floats, theta: Floats, precision: Any) -> float:
    return float((error**2).sum()) + float(theta @ precision @ theta)


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

    def means(self, signals: Signals) -> Floats:
        """[2, P] of rewards and of paces; nan where no request ended."""
        return np.stack([self._mean(signals.reward), self._mean(signals.pace)])

    def _mean(self, values: Floats) -> Floats:
        known, number = ~np.isnan(values), len(self.weights)
        count = np.bincount(self.index[known], minlength=number)
        total = np.bincount(self.index[known], values[known], minlength=number)
        return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))
