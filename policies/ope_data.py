"""Logged decisions as off-policy evaluation needs them, and what they can carry. Pure numpy.

What is executed is identified by its key. Guards send each candidate row to the row that is
executed in its place, so the probability that counts is P(executed): the mass of all rows that
end there. A guard map that sends every row to one says that the environment decided (a time-out,
an operator): both policies execute the same, and its ratio is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation, Policy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TINY = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class LoggedDecisions:
    """T decisions in order of time, of up to K candidates each.

    Raises InvalidRequestError when they contradict themselves.
    """

    at_s: Floats  # [T]
    keys: tuple[tuple[str, ...], ...]  # [T] of each filled row; row 0 is keep
    behaviour: Floats  # [T, K] probabilities of the policy that ran, before guards
    guard_map: Ints  # [T, K] row -> row executed in its place
    executed: Ints  # [T] row
    reward: Floats  # [T] of the interval after each decision
    features: Floats  # [T, K, F] of state and candidate; what models may use
    segment: Ints  # [T] number of the unbroken stretch of log; effects do not cross its ends
    generator: str  # version of what proposed the candidates

    def __post_init__(self) -> None:
        t, k = self.behaviour.shape
        shapes = (self.at_s.shape, self.executed.shape, self.reward.shape, self.segment.shape)
        if t == 0 or set(shapes) != {(t,)} or self.guard_map.shape != (t, k):
            raise InvalidRequestError(
                f"logged decisions need one time, executed row, reward and segment per row of the "
                f"probabilities, at least one; got probabilities {self.behaviour.shape}, guard map "
                f"{self.guard_map.shape} and {shapes}."
            )
        check_probabilities(self.behaviour)
        impossible = np.flatnonzero(self.propensity <= TINY)
        if len(impossible):
            at_s = self.at_s[impossible[0]]
            raise InvalidRequestError(
                f"{len(impossible)} decisions executed what their policy had no probability for, "
                f"the first at {at_s:g} s; such a log has no propensities to weight with."
            )

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def propensity(self) -> Floats:
        """[T] P(executed) under the policy that ran."""
        return self.executed_mass(self.behaviour)

    @property
    def executed_keys(self) -> tuple[str, ...]:
        return tuple(keys[row] for keys, row in zip(self.keys, self.executed, strict=True))

    def image(self, probabilities: Floats) -> Floats:
        """[T, K] the mass of each row as executed, after the guard map."""
        moved = np.zeros_like(probabilities)
        np.add.at(moved, (np.arange(len(self))[:, None], self.guard_map), probabilities)
        return moved

    def executed_mass(self, probabilities: Floats) -> Floats:
        """[T] P(executed) under these pre-guard probabilities, [T, K]."""
        mapped = self.guard_map == self.executed[:, None]
        return np.asarray((probabilities * mapped).sum(axis=1))

    @property
    def free(self) -> NDArray[np.bool_]:
        """[T] whether guards left more than one row of those that had candidates."""
        filled = np.array([len(keys) for keys in self.keys])
        is_row = np.arange(self.guard_map.shape[1]) < filled[:, None]
        first = self.guard_map[:, :1]
        return np.asarray(((self.guard_map != first) & is_row).any(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class TargetDecisions:
    """What a policy would have done at each logged decision, with the candidates of the log."""

    probabilities: Floats  # [T, K] before guards
    generator: str  # version of what proposes candidates where it would run


def check_probabilities(probabilities: Floats) -> None:
    """Raises InvalidRequestError for rows that are no distributions."""
    wrong = np.flatnonzero(
        (np.abs(probabilities.sum(axis=1) - 1.0) > 1e-4) | (probabilities < -TINY).any(axis=1)
    )
    if len(wrong):
        raise InvalidRequestError(
            f"{len(wrong)} rows of probabilities do not sum to 1, the first is row {wrong[0]} with "
            f"{probabilities[wrong[0]].tolist()}; give each policy's whole distribution."
        )


def same_keys_once(keys: Sequence[str], guard_map: Ints) -> Ints:
    """The guard map with rows of equal keys executed as the first of them, [K]."""
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return np.array([first[keys[row]] if row < len(keys) else row for row in guard_map.tolist()])


def decide_on(
    policy: Policy, observations: Sequence[Observation], segment: Ints, generator: str
) -> TargetDecisions:
    """A policy's distributions over logged observations, with its memory of that log: it is reset
    where a segment begins."""
    rows, last = [], None
    for observation, number in zip(observations, segment.tolist(), strict=True):
        if number != last:
            policy.reset()
            last = number
        rows.append(policy.probabilities(observation))
    return TargetDecisions(np.array(rows, np.float64), generator)


# --------------------------------------------------------------------------------------
# Weights, and whether they can be relied on


def generator_refusal(log: LoggedDecisions, target: TargetDecisions) -> str:
    """Why importance weights mean nothing here; empty when they do."""
    if log.generator == target.generator:
        return ""
    return (
        f"the log's candidates were proposed by generator {log.generator}, the target's would be "
        f"by {target.generator}, so their rows differ: replay the arrivals instead, or log with "
        "the target's generator."
    )


def ratios(log: LoggedDecisions, target: TargetDecisions) -> Floats:
    """[T] P(executed) under the target over that under the policy that ran. Raises
    InvalidRequestError when the target has another generator or other shapes."""
    refusal = generator_refusal(log, target)
    if refusal:
        raise InvalidRequestError(refusal)
    if target.probabilities.shape != log.behaviour.shape:
        raise InvalidRequestError(
            f"the target has probabilities {target.probabilities.shape} for logged "
            f"{log.behaviour.shape}; give one row per logged decision and candidate."
        )
    check_probabilities(target.probabilities)
    return log.executed_mass(target.probabilities) / log.propensity


def effect_weights(ratio: Floats, segment: Ints, window: int) -> Floats:
    """[T] product of the ratios of the last `window` decisions, this one included, in its segment:
    what the reward of its interval depends on. A window of 0 gives ones."""
    logs = np.log(np.maximum(ratio, 1e-300))
    total = np.concatenate([[0.0], np.cumsum(logs)])
    ends = np.arange(1, len(ratio) + 1)
    starts = np.searchsorted(segment, segment, side="left")
    return np.asarray(np.exp(total[ends] - total[np.maximum(ends - window, starts)]))


def effective_size(weights: Floats) -> float:
    """Kish's effective sample size: (sum w)^2 / sum w^2."""
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0


@dataclass(frozen=True, slots=True)
class OverlapConfig:
    """When weights are refused."""

    max_unsupported: float = 0.05  # share of the target's mass on what could not be logged
    min_windows: float = 5.0  # effective number of windows that do not overlap
    min_blocks: int = 5  # blocks of the log, for an interval


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a log can say about a target by weights over an effect window."""

    window: int  # decisions
    num_decisions: int
    free_share: float  # of decisions at which guards left a choice
    deterministic_share: float  # of those, at which the policy that ran had none to make
    unsupported: float  # mean mass of the target on what the log's policy never does, of the free
    effective_decisions: float
    largest_share: float  # of all weight, that one decision has
    refusal: str  # why weights are refused and what data is missing; empty when they are not

    @property
    def effective_windows(self) -> float:
        return self.effective_decisions / max(self.window, 1)


def overlap(
    log: LoggedDecisions,
    target: TargetDecisions,
    window: int,
    config: OverlapConfig | None = None,
) -> Overlap:
    """Raises what `ratios` raises."""
    weights = effect_weights(ratios(log, target), log.segment, window)
    ran, wanted = log.image(log.behaviour), log.image(target.probabilities)
    free = log.free
    lacking = np.where(ran <= TINY, wanted, 0.0)
    num_free = max(int(free.sum()), 1)
    found = Overlap(
        window=window,
        num_decisions=len(log),
        free_share=float(free.mean()),
        deterministic_share=float((ran.max(axis=1) >= 1 - TINY)[free].sum() / num_free),
        unsupported=float(lacking.sum(axis=1)[free].sum() / num_free),
        effective_decisions=effective_size(weights),
        largest_share=float(weights.max() / max(weights.sum(), TINY)),
        refusal="",
    )
    keys = _lacking_keys(log, lacking)
    return replace(found, refusal=_refusal(found, keys, config or OverlapConfig()))


def _lacking_keys(log: LoggedDecisions, lacking: Floats) -> list[str]:
    """What the target would execute and the log's policy never does, most wanted first."""
    wanted: dict[str, float] = {}
    for t, row in np.argwhere(lacking > TINY).tolist():
        key = log.keys[t][row]
        wanted[key] = wanted.get(key, 0.0) + float(lacking[t, row])
    return sorted(wanted, key=lambda key: -wanted[key])


def _refusal(found: Overlap, keys: Sequence[str], config: OverlapConfig) -> str:
    if found.unsupported > config.max_unsupported:
        return (
            f"{found.unsupported:.0%} of what the target would do was never possible under the "
            f"policy that ran ({found.deterministic_share:.0%} of its free decisions had one "
            f"outcome): log decisions that give some probability to {', '.join(keys[:3])}."
        )
    if found.effective_windows < config.min_windows:
        short = config.min_windows / max(found.effective_windows, TINY)
        return (
            f"weights over {found.window} decisions leave {found.effective_windows:.2g} effective "
            f"windows of the {config.min_windows:g} needed: log about {short:.2g} times as many "
            "decisions, or a policy nearer to the target."
        )
    return ""
