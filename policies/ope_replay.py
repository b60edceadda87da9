"""The main estimator: the logged arrivals replayed in a model, corrected by what was logged.

A model of the system (the surrogate) is run twice over the logged arrivals: with the decisions as
logged, and under the target. Its error on the first run, reward - model, is known throughout.

    value = mean of [model(target) + e(target)] + weighted mean of [reward - model(log) - e(log)]

e is the model's error as a ridge regression on what the model went through, fitted on the log; the
weights are products of ratios over the effect window. The value is right when model and e are, or
when the weights are; e keeps the second term, and so its variance, small. The window is cut to as
many decisions as the overlap carries; with none, the second term is zero.

A model that was fitted to the log leaves something open. Pairs of runs, as logged and under the
target, in other models that the log allows show how much of the difference hangs on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.ope_data import Floats, Ints, effect_weights, effective_size
from policies.ope_interval import Statistic
from policies.ope_linear import ridge

FEW_VISITS = 10  # intervals of a deployment below which the model's error in it counts as unknown
WINDOWS = (1, 2, 3, 5, 8, 12, 20, 30, 40, 60, 90, 120)


@dataclass(frozen=True, slots=True, eq=False)
class ModelRun:
    """What a model made of the logged arrivals, in T intervals."""

    reward: Floats  # [T]
    keys: tuple[str, ...]  # [T] deployment that served at the start of each
    features: Floats  # [T, F] that the model's error may depend on, such as load


@dataclass(frozen=True, slots=True, eq=False)
class ReplayEvidence:
    """One run with the decisions as logged, and one or more under the target (when it draws)."""

    reward: Floats  # [T] as logged
    logged: ModelRun
    target: tuple[ModelRun, ...]
    drawn: tuple[tuple[ModelRun, ModelRun], ...] = ()  # logged and target, in other models

    @property
    def target_reward(self) -> Floats:
        return np.asarray(np.mean([run.reward for run in self.target], axis=0))

    def error_features(self) -> tuple[Floats, Floats]:
        """[T, Z] of the logged run, and of the target's averaged over its runs: the model's reward,
        its features, and which deployment served."""
        known = sorted(set(self.logged.keys))

        def of(run: ModelRun) -> Floats:
            keys = np.array(run.keys)[:, None] == np.array(known)[None]
            return np.hstack([run.reward[:, None], run.features, keys])

        return of(self.logged), np.asarray(np.mean([of(run) for run in self.target], axis=0))

    @property
    def known(self) -> frozenset[str]:
        """Deployments that the log went through for more than a few intervals."""
        keys, counts = np.unique(self.logged.keys, return_counts=True)
        return frozenset(keys[counts >= FEW_VISITS].tolist())

    def unknown_share(self) -> float:
        """Of the target's intervals, those in deployments that the log hardly went through."""
        known = self.known
        return float(np.mean([key not in known for run in self.target for key in run.keys]))

    def untried_share(self) -> float:
        """Of the target's intervals, those in deployments with a parallel configuration that no
        known one has."""
        tried = frozenset().union(*map(configurations_of, self.known))
        return float(
            np.mean([not configurations_of(k) <= tried for run in self.target for k in run.keys])
        )

    def model_error(self) -> float:
        """Root mean square of how far the model's difference is from that of the drawn ones."""
        if not self.drawn:
            return 0.0
        middle = float((self.target_reward - self.logged.reward).mean())
        found = [float((target.reward - logged.reward).mean()) for logged, target in self.drawn]
        return float(np.sqrt(np.mean(np.square(np.array(found) - middle))))


def configurations_of(key: str) -> frozenset[str]:
    """Of a deployment's replicas, without their number: "2xtp1pp2+1xtp4pp1" -> tp1pp2, tp4pp1."""
    return frozenset(part.partition("x")[2] or part for part in key.split("+"))


def replay_difference(evidence: ReplayEvidence) -> Statistic:
    """The model's own difference between target and log: its error taken to be the same in both."""
    gain, reward = evidence.target_reward - evidence.logged.reward, evidence.reward

    def statistic(index: Ints) -> Floats:
        found = float(gain[index].mean())
        return np.array([reward[index].mean() + found, found])

    return statistic


def replay_corrected(evidence: ReplayEvidence, weights: Floats | None) -> Statistic:
    """The estimator of this module; without weights, its first term alone."""
    reward, model, gain = evidence.reward, evidence.logged.reward, evidence.target_reward
    logged, target = evidence.error_features()
    error = reward - model

    def statistic(index: Ints) -> Floats:
        fit = ridge(logged[index], error[index])
        value = float((gain[index] + fit(target[index])).mean())
        if weights is not None:
            left = error[index] - fit(logged[index])
            value += float(weights[index] @ left / max(weights[index].sum(), 1e-300))
        return np.array([value, value - reward[index].mean()])

    return statistic


def carried_window(ratio: Floats, segment: Ints, window: int, min_windows: float) -> int:
    """The longest effect window, up to the one wanted, at which weights leave as many effective
    windows as needed; 0 when none does."""
    for length in sorted({*(w for w in WINDOWS if w < window), window}, reverse=True):
        weights = effect_weights(ratio, segment, length)
        if effective_size(weights) / length >= min_windows:
            return length
    return 0


# --------------------------------------------------------------------------------------
# What the model is worth


@dataclass(frozen=True, slots=True)
class Calibration:
    """How the model did on the log, in units of reward per interval."""

    bias: float  # mean of reward - model
    explained: float  # share of the variance of block means that model and fitted error explain
    unknown_share: float  # of the target's intervals, in deployments that the log lacks
    unknown_error: float  # typical error in a deployment whose error was not fitted
    untried_share: float = 0.0  # of them, in parallel configurations that it lacks
    model_error: float = 0.0  # of the replay's value, by what the log leaves open in the model

    @property
    def error(self) -> float:
        """Standard error of a replay's value that no resampling of the log shows."""
        return float(np.hypot(self.unknown_share * self.unknown_error, self.model_error))


def calibrate(evidence: ReplayEvidence, block: int) -> Calibration:
    """Errors of block means and, deployment by deployment, of a fit that never saw it."""
    error = evidence.reward - evidence.logged.reward
    logged, _ = evidence.error_features()
    fit = ridge(logged, error)
    left, actual = (block_means(x, block) for x in (error - fit(logged), evidence.reward))
    spread = float(actual.var())
    return Calibration(
        bias=float(error.mean()),
        explained=1.0 - float((left**2).mean()) / spread if spread > 0 else 0.0,
        unknown_share=evidence.unknown_share(),
        unknown_error=_unseen_error(evidence.logged.keys, logged, error),
        untried_share=evidence.untried_share(),
        model_error=evidence.model_error(),
    )


def block_means(values: Floats, block: int) -> Floats:
    """[T] -> [T // block], without what is left over."""
    whole = len(values) // block
    return np.asarray(values[: whole * block].reshape(whole, block).mean(axis=1))


def _unseen_error(keys: Sequence[str], features: Floats, error: Floats) -> float:
    """Root mean square, over deployments, of the mean error that a fit on all others leaves."""
    served, found = np.array(keys), []
    for key in sorted(set(keys)):
        inside = served == key
        if FEW_VISITS <= inside.sum() <= len(served) - FEW_VISITS:
            fit = ridge(features[~inside], error[~inside])
            found.append(float((error[inside] - fit(features[inside])).mean()))
    if not found:  # one deployment: what its error is without any fit
        found = [float(error.mean()), float(error.std())]
    return float(np.sqrt(np.mean(np.square(found))))
