"""The estimators of `policies.ope`: from evidence to a statistic of drawn decisions. Pure numpy.

`no_difference` is the trivial one; `pdis` and `wpdis` weight rewards by the ratios of the effect
window; `direct` is a regression on the mean reward of the effect window; `fqe` is fitted Q
evaluation, discounted at the effect window; `wdr` is that, corrected by weights over windows that
begin at each decision; `replay` is a model's difference; `replay_fit` and `replay_dr` are those of
`policies.ope_replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.errors import InvalidRequestError
from policies.ope_data import (
    Floats,
    Ints,
    LoggedDecisions,
    OverlapConfig,
    TargetDecisions,
    effect_weights,
    generator_refusal,
    ratios,
)
from policies.ope_episodes import doubly_robust
from policies.ope_interval import Statistic
from policies.ope_linear import Linear, linear_fqe, ridge
from policies.ope_replay import (
    ModelRun,
    ReplayEvidence,
    carried_window,
    replay_corrected,
    replay_difference,
)


@dataclass(frozen=True, slots=True)
class OpeConfig:
    """How a log is read."""

    window: int = 40  # decisions whose effects last: 10 minutes of 15 s
    block: int = 80  # decisions drawn together by the bootstrap; longer than the window
    draws: int = 200  # of the bootstrap
    level: float = 0.95
    overlap: OverlapConfig = field(default_factory=OverlapConfig)

    def __post_init__(self) -> None:
        if not 0 < self.window < self.block or self.draws < 2 or not 0 < self.level < 1:
            raise InvalidRequestError(
                f"off-policy evaluation needs 0 < window < block, at least 2 draws and a level in "
                f"(0, 1), got {self.window}, {self.block}, {self.draws} and {self.level}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All that an estimator may use. Without `logged_run` and `target_runs` there is no replay."""

    log: LoggedDecisions
    target: TargetDecisions
    logged_run: ModelRun | None = None
    target_runs: tuple[ModelRun, ...] = ()
    drawn_runs: tuple[tuple[ModelRun, ModelRun], ...] = ()  # of both, in other models

    @property
    def replay(self) -> ReplayEvidence:
        if self.logged_run is None or not self.target_runs:
            raise InvalidRequestError(
                "this estimator needs a replay of the logged arrivals: give a model's run with the "
                "decisions as logged, and at least one under the target."
            )
        return ReplayEvidence(self.log.reward, self.logged_run, self.target_runs, self.drawn_runs)


# --------------------------------------------------------------------------------------
# Weights alone


def _no_difference(evidence: Evidence, config: OpeConfig) -> Statistic:
    reward = evidence.log.reward
    return lambda index: np.array([reward[index].mean(), 0.0])


def _pdis(evidence: Evidence, config: OpeConfig) -> Statistic:
    log = evidence.log
    weights = effect_weights(ratios(log, evidence.target), log.segment, config.window)

    def statistic(index: Ints) -> Floats:
        value = float((weights[index] * log.reward[index]).mean())
        return np.array([value, value - log.reward[index].mean()])

    return statistic


def _wpdis(evidence: Evidence, config: OpeConfig) -> Statistic:
    log = evidence.log
    weights = effect_weights(ratios(log, evidence.target), log.segment, config.window)

    def statistic(index: Ints) -> Floats:
        drawn = weights[index]
        value = float(drawn @ log.reward[index] / max(drawn.sum(), 1e-300))
        return np.array([value, value - log.reward[index].mean()])

    return statistic


# --------------------------------------------------------------------------------------
# Regression on features


def _mean_features(log: LoggedDecisions, probabilities: Floats) -> Floats:
    """[T, F] of what is executed, averaged over a policy's choices."""
    return np.asarray(np.einsum("tk,tkf->tf", log.image(probabilities), log.features))


def _executed_features(log: LoggedDecisions) -> Floats:
    return np.asarray(log.features[np.arange(len(log)), log.executed])


def window_means(reward: Floats, segment: Ints, window: int) -> Floats:
    """[T] mean reward of the `window` intervals from each decision on, of those in its segment."""
    total = np.concatenate([[0.0], np.cumsum(reward)])
    starts = np.arange(len(reward))
    ends = np.minimum(starts + window, np.searchsorted(segment, segment, side="right"))
    return np.asarray((total[ends] - total[starts]) / (ends - starts))


def _direct(evidence: Evidence, config: OpeConfig) -> Statistic:
    log = evidence.log
    executed = _executed_features(log)
    wanted = _mean_features(log, evidence.target.probabilities)
    ahead = window_means(log.reward, log.segment, config.window)

    def statistic(index: Ints) -> Floats:
        fit = ridge(executed[index], ahead[index])
        gain = float((fit(wanted[index]) - fit(executed[index])).mean())
        return np.array([log.reward[index].mean() + gain, gain])

    return statistic


@dataclass(frozen=True, slots=True, eq=False)
class _Transitions:
    """Features of decisions and of the decisions after them, under target and log's policy."""

    log: LoggedDecisions
    executed: Floats  # [T, F]
    wanted: Floats  # [T, F] averaged over the target's choices
    ran: Floats  # [T, F] averaged over those of the policy that ran
    gamma: float

    def q(self, index: Ints, values: Floats) -> Linear:
        """Fitted on the drawn decisions that have another after them; `values` is `wanted` or
        `ran`."""
        segment = self.log.segment
        has_next = np.append(segment[1:] == segment[:-1], False)
        use = index[has_next[index]]
        after, reward = values[use + 1], self.log.reward[use]
        return linear_fqe(self.executed[use], after, reward, self.gamma)


def _transitions(evidence: Evidence, config: OpeConfig) -> _Transitions:
    log = evidence.log
    return _Transitions(
        log,
        _executed_features(log),
        _mean_features(log, evidence.target.probabilities),
        _mean_features(log, log.behaviour),
        1.0 - 1.0 / config.window,
    )


def _fqe(evidence: Evidence, config: OpeConfig) -> Statistic:
    found = _transitions(evidence, config)
    share = 1.0 - found.gamma

    def statistic(index: Ints) -> Floats:
        of_target, of_log = found.q(index, found.wanted), found.q(index, found.ran)
        gain = share * float((of_target(found.wanted[index]) - of_log(found.ran[index])).mean())
        return np.array([found.log.reward[index].mean() + gain, gain])

    return statistic


def _wdr(evidence: Evidence, config: OpeConfig) -> Statistic:
    """Windows that begin at each decision, as episodes."""
    found, log = _transitions(evidence, config), evidence.log
    ratio, window = ratios(log, evidence.target), config.window
    last = np.searchsorted(log.segment, log.segment, side="right")
    is_start = np.arange(len(log)) + window < last

    def corrected(starts: Ints, values: Floats, weigh: Floats, fit: Linear) -> float:
        steps = starts[:, None] + np.arange(window + 1)
        here = steps[:, :-1]
        q, v = fit(found.executed), fit(values)
        return (1.0 - found.gamma) * doubly_robust(
            weigh[here], log.reward[here], q[here], v[steps], found.gamma, weighted=True
        )

    def statistic(index: Ints) -> Floats:
        starts = index[is_start[index]]
        gain = corrected(starts, found.wanted, ratio, found.q(index, found.wanted))
        gain -= corrected(starts, found.ran, np.ones_like(ratio), found.q(index, found.ran))
        return np.array([log.reward[index].mean() + gain, gain])

    return statistic


# --------------------------------------------------------------------------------------
# Replay


def _replay(evidence: Evidence, config: OpeConfig) -> Statistic:
    return replay_difference(evidence.replay)


def _replay_fit(evidence: Evidence, config: OpeConfig) -> Statistic:
    return replay_corrected(evidence.replay, None)


def _replay_dr(evidence: Evidence, config: OpeConfig) -> Statistic:
    log = evidence.log
    window = usable_window(evidence, config)
    if not window:
        return _replay_fit(evidence, config)
    weights = effect_weights(ratios(log, evidence.target), log.segment, window)
    return replay_corrected(evidence.replay, weights)


def usable_window(evidence: Evidence, config: OpeConfig) -> int:
    """Of the effect window, the decisions that weights of this log can correct for."""
    log, target = evidence.log, evidence.target
    if generator_refusal(log, target):
        return 0
    ratio = ratios(log, target)
    return carried_window(ratio, log.segment, config.window, config.overlap.min_windows)


# --------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True, slots=True)
class Estimator:
    """How to build it, and what it stands on."""

    build: Callable[[Evidence, OpeConfig], Statistic]
    weights: bool = False
    candidates: bool = False  # of the log: the target acts on them
    replay: bool = False


DEFAULT_ESTIMATOR = "replay_dr"
ESTIMATORS: Mapping[str, Estimator] = {
    "no_difference": Estimator(_no_difference),
    "pdis": Estimator(_pdis, weights=True, candidates=True),
    "wpdis": Estimator(_wpdis, weights=True, candidates=True),
    "direct": Estimator(_direct, candidates=True),
    "fqe": Estimator(_fqe, candidates=True),
    "wdr": Estimator(_wdr, weights=True, candidates=True),
    "replay": Estimator(_replay, replay=True),
    "replay_fit": Estimator(_replay_fit, replay=True),
    "replay_dr": Estimator(_replay_dr, replay=True),
}
