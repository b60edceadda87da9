"""Fits a StepTimeModel to measured steps: robust, non-negative, refused when it is no fit. Pure.

Errors are relative to what the fit itself predicts, so that a step of 5 ms counts as much as one of
500 ms and one measured far too short no more than one measured far too long. Each coefficient is a
cost, hence not negative. Steps whose error exceeds a few times the usual one count less by Huber's
weights (P. J. Huber, Robust Statistics, 1981), in iteratively reweighted non-negative least
squares, which start from least absolute errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import StepTimeModel

Floats = NDArray[np.float64]

SHARES, ROUNDS = 16, 4  # tried, of a pipeline's stage; fits of each
MAX_RESIDUAL_P50 = 0.3  # of |predicted / measured - 1|; a fit above it is refused
HUBER = 1.345  # standard deviations: 95 % efficient on normal errors (Huber)
MAD_TO_STD = 1.4826  # of normal errors
LEAST_SCALE = 1e-4  # relative; an exact fit has none
MAX_ITERATIONS, CONVERGED = 100, 1e-6
LEAST_SHARE = 1e-2  # of the measured time: a lesser prediction is no unit of error
RANK_TOLERANCE = 1e-6
LARGE_TOKENS = 64  # a step of more is a large one
ALIKE_CONTEXT = 64  # tokens
REGIMES = ("prefill", "decode", "mixed", "small", "large")


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSteps:
    """Columns of equal length, an entry per step of replicas of one configuration."""

    tokens: Floats
    decoding: Floats  # sequences that decode, one token each; the others prefill
    sequences: Floats
    context_tokens: Floats  # sum over sequences, after the step
    pairs: Floats  # sum over sequences of `engine.profile.attention_pairs`
    step_s: Floats
    memory: Floats  # how many times as long what memory bounds took

    @classmethod
    def of(cls, rows: ArrayLike) -> MeasuredSteps:
        """From rows in the order of the columns but the last, which is 1."""
        table = np.array(rows, np.float64).reshape(-1, 6)
        columns = [*table.T, np.ones(len(table))]
        return cls(*columns)

    def averaged(self) -> MeasuredSteps:
        """One step for all that are alike (in context to `ALIKE_CONTEXT` tokens), with their means:
        where a host's scheduler makes single steps now short, now long, means are what adds up."""
        context = self.context_tokens // ALIKE_CONTEXT
        alike = np.column_stack([self.tokens, self.decoding, self.sequences, context, self.memory])
        _, group = np.unique(alike, axis=0, return_inverse=True)
        count = np.bincount(group)
        columns = (getattr(self, name) for name in self.__slots__)
        return MeasuredSteps(*(np.bincount(group, column) / count for column in columns))

    def regimes(self) -> dict[str, NDArray[np.bool_]]:
        """Which steps belong to each of `REGIMES`: one of three kinds, one of two sizes."""
        prefill, decode = self.decoding == 0, self.decoding == self.sequences
        large = self.tokens > LARGE_TOKENS
        kinds = (prefill, decode, ~(prefill | decode), ~large, large)
        return dict(zip(REGIMES, kinds, strict=True))

    def predicted(self, model: StepTimeModel) -> Floats:
        """Seconds of each step by the model."""
        columns = (self.tokens, self.sequences, self.context_tokens, self.pairs, self.memory)
        return np.array([model.step_s(*row) for row in zip(*columns, strict=True)])


@dataclass(frozen=True, slots=True)
class Residual:
    """Errors predicted / measured - 1 of some measurements; nan for none."""

    count: int
    p50: float  # of the absolute error
    p90: float
    bias: float  # median of the error

    @classmethod
    def of(cls, predicted: ArrayLike, measured: ArrayLike) -> Residual:
        error = np.asarray(predicted, np.float64) / np.asarray(measured, np.float64) - 1.0
        if error.size == 0:
            return cls(0, np.nan, np.nan, np.nan)
        p50, p90 = np.quantile(np.abs(error), (0.5, 0.9)).tolist()
        return cls(error.size, p50, p90, float(np.median(error)))


def fit_step_times(
    parallel: ParallelConfig,
    steps: MeasuredSteps,
    knots: Sequence[int] = (),
    max_residual_p50: float = MAX_RESIDUAL_P50,
) -> StepTimeModel:
    """Step times of one configuration that has its devices to itself; stage_share is left at 1.

    With `knots` (two or more, ascending) the token term is a rising line through them, which goes
    on at its last slope; it is nought up to the first. Raises InvalidRequestError for fewer steps
    than twice the coefficients, steps that do not tell the coefficients apart, times that are not
    positive, and a median error above `max_residual_p50`.
    """
    token_columns = _token_columns(steps.tokens, knots)
    by_memory = [np.ones_like(steps.tokens), steps.sequences, steps.context_tokens]
    columns = [*(steps.memory * column for column in by_memory), steps.pairs]
    design = np.column_stack([*columns, token_columns])
    times = steps.step_s
    scaled = design / np.maximum(np.linalg.norm(design, axis=0), 1e-300)
    rank, needed = np.linalg.matrix_rank(scaled, RANK_TOLERANCE), design.shape[1]
    if len(times) < 2 * needed or rank < needed or not np.all(np.isfinite(times) & (times > 0)):
        raise InvalidRequestError(
            f"the steps of {parallel.key} do not give its {needed} coefficients: they tell {rank} "
            f"apart, and of {len(times)} steps {int(np.sum(~(times > 0)))} took no time; measure "
            f"at least {2 * needed}, prefills and decodes of several sizes and context lengths."
        )
    coefficients = _robust_nnls(design, times)
    residual = Residual.of(design @ coefficients, times)
    if residual.p50 > max_residual_p50:
        raise _no_fit(parallel, residual.p50, len(times), max_residual_p50)
    base_s, per_seq_s, per_context_s, per_pair_s, *slopes = coefficients.tolist()
    rises = np.diff(knots) * slopes if knots else np.zeros(0)
    return StepTimeModel(
        parallel,
        base_s,
        per_token_s=slopes[-1],
        per_seq_s=per_seq_s,
        per_context_token_s=per_context_s,
        per_pair_s=per_pair_s,
        token_knots=tuple(knots),
        token_s=tuple(np.concatenate([[0.0], np.cumsum(rises)]).tolist()) if knots else (),
        residual_p50=residual.p50,
    )


def _no_fit(parallel: ParallelConfig, error: float, count: int, most: float) -> InvalidRequestError:
    return InvalidRequestError(
        f"the step times of {parallel.key} are no fit: the median error over {count} steps is "
        f"{100 * error:.0f} %, at most {100 * most:.0f} % is allowed; measure that configuration "
        "again with less else running on the machine."
    )


Slowdowns = Callable[[float], tuple[float, float]]
"""Steps of a replica that are at work together -> (slowdown of them, of memory besides)."""


def no_slowdown(at_work: float) -> tuple[float, float]:
    return 1.0, 1.0


def fit_pipeline(
    parallel: ParallelConfig,
    steps: MeasuredSteps,
    gap_s: Floats,
    knots: Sequence[int] = (),
    leader_computes: bool = False,
    slowdowns: Slowdowns = no_slowdown,
) -> StepTimeModel:
    """Step times and stage share of steps that were partly in flight together, in the order of
    their ends.

    `step_s` is from when a step could start to when its end was seen, `gap_s` from that of the one
    before it, inf where none was in flight when it started. A step ends after its own time, or its
    stage share of that after the one before, whichever is later, and with `leader_computes` that is
    seen when the leader is done with the first stage of a later one. Which of these it was follows
    from the fit, which is therefore repeated, for each of several shares. The one with the least
    error of all ends is taken, and its times are scaled to add up to those measured. The times
    fitted are free of `slowdowns`.
    """
    flight = _Flight.of(steps, gap_s)
    tried = [
        _fit_with_share(parallel, flight, share, knots, leader_computes, slowdowns)
        for share in np.linspace(1.0 / parallel.pp, 1.0, 1 if parallel.pp == 1 else SHARES)
    ]
    _, model, predicted_s = min(tried, key=lambda found: found[0])
    residual = Residual.of(predicted_s, steps.step_s)
    if residual.p50 > MAX_RESIDUAL_P50:
        raise _no_fit(parallel, residual.p50, residual.count, MAX_RESIDUAL_P50)
    model = model.scaled(float(steps.step_s.sum() / predicted_s.sum()))
    return replace(model, residual_p50=residual.p50)


def _fit_with_share(
    parallel: ParallelConfig,
    flight: _Flight,
    share: float,
    knots: Sequence[int],
    leader_computes: bool,
    slowdowns: Slowdowns,
) -> tuple[float, StepTimeModel, Floats]:
    """(seconds of error over all ends, model, seconds that it gives each step)."""
    together = slowdowns(min(float(parallel.pp), 1.0 / share))
    slowdown, memory = (
        np.where(flight.is_together, *both) for both in zip(together, slowdowns(1.0), strict=True)
    )
    steps, own_s = replace(flight.steps, memory=memory), flight.steps.step_s
    for _ in range(ROUNDS):
        alike = replace(steps, step_s=own_s / slowdown).averaged()
        model = fit_step_times(parallel, alike, knots, np.inf)
        model = replace(model, stage_share=share, leader_computes=leader_computes)
        seen_s, own_s = flight.ends(model, slowdown * steps.predicted(model))
    return float(np.abs(seen_s - steps.step_s).sum()), model, seen_s


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """Measured steps on a clock: when each could start and when its end was seen. Spans without a
    step in flight have no length."""

    steps: MeasuredSteps
    start_s: Floats
    seen_s: Floats
    is_together: NDArray[np.bool_]  # another was in flight for some of its time

    @classmethod
    def of(cls, steps: MeasuredSteps, gap_s: Floats) -> _Flight:
        seen_s = np.cumsum(np.where(np.isfinite(gap_s), gap_s, steps.step_s))
        start_s, is_behind = seen_s - steps.step_s, np.isfinite(gap_s)
        is_before = np.append(is_behind[1:] & (start_s[1:] < seen_s[:-1]), False)
        return cls(steps, start_s, seen_s, is_behind | is_before)

    def ends(self, model: StepTimeModel, own_s: Floats) -> tuple[Floats, Floats]:
        """Seconds from each start until the model sees its end, with steps of `own_s`; and how long
        each took by itself as far as its measured end tells, else `own_s`."""
        share, free_s = model.stage_share, -np.inf
        found, told = np.empty_like(own_s), np.empty_like(own_s)
        for i, (start_s, seen_s, step_s) in enumerate(
            zip(self.start_s, self.seen_s, own_s, strict=True)
        ):
            alone_s, behind_s = start_s + step_s, free_s + share * step_s
            last_s = end_s = max(alone_s, behind_s)
            free_s = min(last_s, seen_s)  # no later than it was seen
            later = i + 1
            while model.leader_computes and later < len(own_s) and self.start_s[later] < seen_s:
                if self.start_s[later] < end_s:
                    end_s = max(end_s, self.start_s[later] + share * own_s[later])
                later += 1
            told[i] = seen_s - start_s
            if end_s > last_s:
                told[i] = step_s
            elif behind_s > alone_s:
                told[i] = min(seen_s - behind_s + share * step_s, told[i]) / share
            found[i] = end_s - start_s
        return found, np.maximum(told, LEAST_SHARE * own_s)


def _token_columns(tokens: Floats, knots: Sequence[int]) -> Floats:
    """Tokens of each step within each segment between knots, [steps, segments]; the last segment
    has no end. Without knots the tokens themselves."""
    if not knots:
        return tokens[:, None]
    if len(knots) == 1:
        raise InvalidRequestError(f"a token term needs two knots or none, got {tuple(knots)}.")
    starts = np.array(knots[:-1], np.float64)
    lengths = np.array([*np.diff(knots[:-1]), np.inf])
    return np.clip(tokens[:, None] - starts, 0.0, lengths)


def _robust_nnls(design: Floats, times: Floats) -> Floats:
    """Coefficients >= 0 with design @ coefficients near the times, in relative error."""
    norms = np.linalg.norm(design / times[:, None], axis=0)
    scaled, found = design / norms, np.zeros(design.shape[1])
    unit, weights = times, np.ones(len(times))
    for weigh in (_absolute, _huber):
        for _ in range(MAX_ITERATIONS):
            root = np.sqrt(weights) / unit
            before, (found, _) = found, nnls(scaled * root[:, None], times * root)
            unit = np.maximum(scaled @ found, LEAST_SHARE * times)
            weights = weigh(np.abs(times / unit - 1.0))
            if np.abs(found - before).max() <= CONVERGED * found.max():
                break
    return np.asarray(found / norms)


def _absolute(error: Floats) -> Floats:
    return 1.0 / np.maximum(error, LEAST_SCALE)


def _huber(error: Floats) -> Floats:
    limit = HUBER * max(MAD_TO_STD * float(np.median(error)), LEAST_SCALE)
    return np.minimum(1.0, limit / np.maximum(error, limit))
