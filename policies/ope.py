"""Off-policy evaluation: what the log of one policy says about another that did not run.

The log is one long stretch of decisions under traffic that changes; a decision matters for the
rewards of an effect window after it. Values are mean rewards per decision; what counts is the gain
over the policy that ran. `estimate` gives a number with an interval, or refuses it and says why.
"""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidRequestError
from policies.ope_data import Overlap, generator_refusal, overlap
from policies.ope_estimators import ESTIMATORS, Estimator, Evidence, OpeConfig, usable_window
from policies.ope_interval import Estimate, interval, standard_errors
from policies.ope_replay import Calibration, calibrate

MIN_EXPLAINED = 0.2  # share of the log's changes below which a model says nothing
MAX_UNTRIED = 0.5  # share of a replay in parallel configurations that the log hardly has, as well


def estimate(
    name: str,
    evidence: Evidence,
    config: OpeConfig,
    rng: np.random.Generator,
    refuse: bool = True,
) -> Estimate:
    """`refuse` False gives the number whatever the diagnostics say. Raises InvalidRequestError."""
    if name not in ESTIMATORS:
        raise InvalidRequestError(
            f"no estimator {name!r}; expected one of {', '.join(ESTIMATORS)}."
        )
    chosen, log = ESTIMATORS[name], evidence.log
    refusal = refusal_of(chosen, evidence, config)
    another_generator = chosen.candidates and generator_refusal(log, evidence.target)
    if refusal and (refuse or another_generator):
        return Estimate(name, None, None, refusal=refusal)
    statistic = chosen.build(evidence, config)
    value, gain = statistic(np.arange(len(log))).tolist()
    if len(log) < 2 * config.block:
        return Estimate(name, value, gain, note="the log is too short for an interval")
    errors = standard_errors(statistic, len(log), config.block, config.draws, rng)
    if chosen.replay:
        errors = np.hypot(errors, calibrate(evidence.replay, config.block).error)
    blocks = len(log) / config.block
    return Estimate(
        name,
        value,
        gain,
        interval(value, float(errors[0]), blocks, config.level),
        interval(gain, float(errors[1]), blocks, config.level),
        note=_note(name, evidence, config),
    )


def _note(name: str, evidence: Evidence, config: OpeConfig) -> str:
    if name != "replay_dr":
        return ""
    window = usable_window(evidence, config)
    return f"corrected for the last {window} of the {config.window} decisions of the effect window"


def diagnose(evidence: Evidence, config: OpeConfig) -> tuple[Overlap | None, Calibration | None]:
    """What there is to say of weights and of the model; None for what there is not."""
    log, target = evidence.log, evidence.target
    weighed = not generator_refusal(log, target)
    return (
        overlap(log, target, config.window, config.overlap) if weighed else None,
        calibrate(evidence.replay, config.block) if evidence.target_runs else None,
    )


def refusal_of(chosen: Estimator, evidence: Evidence, config: OpeConfig) -> str:
    """Why that estimator gives no number here, and what data is missing; empty when it does."""
    log, target = evidence.log, evidence.target
    needed = config.overlap.min_blocks * config.block
    if len(log) < needed:
        return (
            f"the log has {len(log)} decisions; an interval needs {config.overlap.min_blocks} "
            f"blocks of {config.block}: log {needed - len(log)} more."
        )
    if chosen.candidates and (refusal := generator_refusal(log, target)):
        return refusal
    if chosen.weights and (refusal := overlap(log, target, config.window, config.overlap).refusal):
        return refusal
    if chosen.replay:
        return _model_refusal(calibrate(evidence.replay, config.block))
    return ""


def _model_refusal(found: Calibration) -> str:
    if found.explained < MIN_EXPLAINED:
        return (
            f"the model explains {found.explained:.0%} of how the log's rewards change, of the "
            f"{MIN_EXPLAINED:.0%} needed: calibrate it on a profile measured on this system."
        )
    if found.untried_share > MAX_UNTRIED:
        return (
            f"{found.untried_share:.0%} of the replay is spent in deployments with parallel "
            "configurations that the log hardly has: log some time in those that the target goes "
            "to."
        )
    return ""
