"""Estimators over one long log: against linear equations, by hand, and when they must refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.evaluating.chain import GENERATOR, Chain
from engine.errors import InvalidRequestError
from policies.ope import diagnose, estimate
from policies.ope_data import (
    LoggedDecisions,
    TargetDecisions,
    effect_weights,
    overlap,
    ratios,
    same_keys_once,
)
from policies.ope_estimators import (
    ESTIMATORS,
    Evidence,
    OpeConfig,
    usable_window,
    window_means,
)
from policies.ope_interval import Estimate, draw_blocks, interval, standard_errors, t_quantile

Floats = NDArray[np.float64]
CHAIN = Chain()
BEHAVIOUR = np.array([[0.4, 0.6], [0.6, 0.4]])  # of switching, by load and deployment
TARGET = np.array([[0.2, 0.8], [0.75, 0.25]])
WRONG = Chain(serve=((0.7, 0.1), (-0.9, 0.6)), switch_cost=0.0)
CONFIG = OpeConfig(window=8, block=40, draws=20)


def draw(
    decisions: int,
    seed: int = 0,
    model: Chain = WRONG,
    chain: Chain = CHAIN,
    behaviour: Floats = BEHAVIOUR,
    target: Floats = TARGET,
    runs: int = 8,
) -> Evidence:
    rng = np.random.default_rng(seed)
    loads = chain.loads(1, decisions, rng)
    logged = chain.simulate(behaviour, loads, rng)
    replays = chain.simulate(target, np.repeat(loads, runs, axis=0), rng)
    return Evidence(
        logged.log(0, behaviour),
        logged.target(0, target),
        logged.model_run(0, model),
        tuple(replays.model_run(run, model) for run in range(runs)),
    )


def gain_of(name: str, evidence: Evidence, config: OpeConfig = CONFIG) -> float:
    found = estimate(name, evidence, config, np.random.default_rng(0))
    assert found.gain is not None, found.refusal
    return found.gain


def true_gain(chain: Chain = CHAIN) -> float:
    return chain.value(TARGET) - chain.value(BEHAVIOUR)


# --------------------------------------------------------------------------------------
# Values


def test_the_chain_does_what_its_equations_say() -> None:
    rng = np.random.default_rng(5)
    runs = CHAIN.simulate(TARGET, CHAIN.loads(200, 4000, rng), rng)
    means = runs.rewards().mean(axis=1)
    assert abs(means.mean() - CHAIN.value(TARGET)) < 4 * means.std(ddof=1) / np.sqrt(200)
    assert 0.05 < true_gain() < 0.5


def test_gains_over_many_logs_are_those_of_the_equations() -> None:
    """30 logs of 3,000 decisions: within four standard errors, and 0.01 for weights that sum to
    one and for deployments older than the window."""
    logs = [draw(3000, seed) for seed in range(30)]
    for name in ("pdis", "wpdis", "replay_dr", "replay_fit"):
        found = np.array([gain_of(name, log) for log in logs])
        error = found.std(ddof=1) / np.sqrt(len(found))
        assert abs(found.mean() - true_gain()) < 4 * error + 0.01, name


def test_the_model_alone_is_wrong_and_far_more_than_when_corrected() -> None:
    evidence = draw(20_000)
    assert abs(gain_of("replay", evidence) - true_gain()) > 0.03
    assert abs(gain_of("replay_dr", evidence) - true_gain()) < 0.015


def test_fitted_q_is_the_discounted_value_from_where_the_log_was() -> None:
    evidence = draw(30_000, runs=1)
    gamma, start = 1 - 1 / CONFIG.window, CHAIN.stationary(BEHAVIOUR)
    exact = CHAIN.discounted_value(TARGET, start, gamma) - CHAIN.value(BEHAVIOUR)
    for name in ("fqe", "wdr"):
        assert gain_of(name, evidence) == pytest.approx(exact, abs=0.02), name


def test_direct_is_one_step_of_the_target_and_then_the_log() -> None:
    """Against the same quantity by matrix powers."""
    moves, reward = CHAIN.transitions(BEHAVIOUR)
    first_moves, first_reward = CHAIN.transitions(TARGET)
    start, power, ahead = CHAIN.stationary(BEHAVIOUR), np.eye(8), np.zeros(8)
    for _ in range(CONFIG.window - 1):
        ahead += power @ reward
        power = power @ moves
    value = start @ (first_reward + first_moves @ ahead) / CONFIG.window
    exact = value - CHAIN.value(BEHAVIOUR)
    assert gain_of("direct", draw(30_000, runs=1)) == pytest.approx(exact, abs=0.01)


def test_weights_alone_have_no_bias_on_short_logs() -> None:
    """Where the target's choice does not depend on what serves, effects last two decisions. Over
    2,000 logs of 50 decisions, within four standard errors."""
    chain = replace(CHAIN, dwell=False)
    behaviour = np.array([[0.5, 0.5], [0.5, 0.5]])
    target = np.array([[0.2, 0.8], [0.7, 0.3]])
    rng = np.random.default_rng(7)
    runs = chain.simulate(behaviour, chain.loads(2000, 50, rng), rng)
    found = []
    for run in range(2000):
        log = runs.log(run, behaviour)
        weights = effect_weights(ratios(log, runs.target(run, target)), log.segment, 2)
        found.append(float((weights * log.reward)[1:].mean()))
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - chain.value(target)) < 4 * error


def test_a_right_model_needs_no_right_weights() -> None:
    evidence = draw(20_000, model=CHAIN)
    log = evidence.log
    nonsense = replace(log, behaviour=np.random.default_rng(0).dirichlet((5, 5), len(log)))
    for name in ("replay", "replay_fit", "replay_dr"):
        found = gain_of(name, replace(evidence, log=nonsense))
        assert found == pytest.approx(true_gain(), abs=0.02), name


def test_right_weights_need_no_right_model() -> None:
    """A model that has everything the wrong way round."""
    backwards = Chain(serve=((-0.9, -0.5), (0.6, -0.3)), switch_cost=-1.0)
    evidence = draw(20_000, model=backwards)
    assert gain_of("replay_dr", evidence) == pytest.approx(true_gain(), abs=0.03)


def test_the_same_policy_gains_nothing() -> None:
    evidence = draw(2000, target=BEHAVIOUR, runs=64)
    for name in ESTIMATORS:
        assert gain_of(name, evidence) == pytest.approx(0.0, abs=0.03), name
    for name in ("pdis", "wpdis", "direct", "no_difference"):
        close = 0.02 if name == "direct" else 1e-12
        assert gain_of(name, evidence) == pytest.approx(0.0, abs=close), name


# --------------------------------------------------------------------------------------
# Propensities


def by_hand(**changes: object) -> LoggedDecisions:
    """Three decisions over three rows; the second is vetoed to keep in the last two."""
    log = LoggedDecisions(
        at_s=np.array([0.0, 15.0, 30.0]),
        keys=(("A", "B", "C"), ("B", "A", "C"), ("B", "A")),
        behaviour=np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.25, 0.75, 0.0]]),
        guard_map=np.array([[0, 1, 2], [0, 0, 2], [0, 0, 0]]),
        executed=np.array([1, 0, 0]),
        reward=np.array([1.0, 2.0, 3.0]),
        features=np.zeros((3, 3, 1)),
        segment=np.array([0, 0, 0]),
        generator="g1",
    )
    return replace(log, **changes)  # type: ignore[arg-type]


WANTED = TargetDecisions(np.array([[0.1, 0.6, 0.3], [0.2, 0.1, 0.7], [1.0, 0.0, 0.0]]), "g1")


def test_what_counts_is_the_executed_key_after_guards() -> None:
    log = by_hand()
    np.testing.assert_allclose(log.propensity, [0.3, 0.9, 1.0])
    np.testing.assert_allclose(ratios(log, WANTED), [2.0, 0.3 / 0.9, 1.0])
    assert log.executed_keys == ("B", "B", "B")
    assert log.free.tolist() == [True, True, False]


def test_weights_stay_in_their_window_and_segment() -> None:
    ratio, segment = np.array([2.0, 3.0, 5.0, 7.0]), np.array([0, 0, 0, 1])
    np.testing.assert_allclose(effect_weights(ratio, segment, 2), [2, 6, 15, 7])
    np.testing.assert_allclose(effect_weights(ratio, segment, 9), [2, 6, 30, 7])
    np.testing.assert_allclose(effect_weights(ratio, segment, 0), [1, 1, 1, 1])
    reward = np.array([1.0, 2.0, 6.0, 7.0])
    np.testing.assert_allclose(window_means(reward, segment, 2), [1.5, 4.0, 6.0, 7.0])


def test_a_zero_ratio_forgets_nothing_after_its_window() -> None:
    ratio, segment = np.array([0.0, 3.0, 5.0]), np.zeros(3, np.int64)
    np.testing.assert_allclose(effect_weights(ratio, segment, 2), [0.0, 0.0, 15.0], atol=1e-200)


def test_rows_of_one_key_are_one_action() -> None:
    found = same_keys_once(("A", "B", "B"), np.array([0, 1, 2]))
    assert found.tolist() == [0, 1, 1]


def test_a_log_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="had no probability for, the first at 30 s"):
        by_hand(executed=np.array([1, 0, 2]))
    with pytest.raises(InvalidRequestError, match="do not sum to 1, the first is row 1"):
        by_hand(behaviour=np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.2], [0.25, 0.75, 0.0]]))
    with pytest.raises(InvalidRequestError, match="one time, executed row"):
        by_hand(reward=np.zeros(2))


# --------------------------------------------------------------------------------------
# Refusals


def refusal(name: str, evidence: Evidence, config: OpeConfig = CONFIG) -> str:
    found = estimate(name, evidence, config, np.random.default_rng(0))
    assert (found.value, found.gain, found.gain_interval) == (None, None, None)
    return found.refusal


def test_another_generator_leaves_replay_alone() -> None:
    evidence = draw(2000)
    other = replace(evidence, target=replace(evidence.target, generator="newer"))
    for name in ("pdis", "wpdis", "wdr", "direct", "fqe"):
        assert "proposed by generator chain, the target's would be by newer" in refusal(name, other)
        found = estimate(name, other, CONFIG, np.random.default_rng(0), refuse=False)
        assert found.is_refused
    assert usable_window(other, CONFIG) == 0
    assert gain_of("replay_dr", other) == gain_of("replay_fit", evidence)
    assert diagnose(other, CONFIG)[0] is None


def test_a_deterministic_log_says_what_to_explore() -> None:
    never = np.zeros((2, 2))
    evidence = draw(2000, behaviour=never, target=np.array([[1.0, 0.0], [1.0, 0.0]]))
    reason = refusal("wpdis", evidence)
    assert "100% of its free decisions had one outcome" in reason
    assert "give some probability to" in reason
    assert "configurations that the log hardly has" in refusal("replay_dr", evidence)


def test_too_little_overlap_says_how_much_more_to_log() -> None:
    always = np.array([[0.02, 0.98], [0.98, 0.02]])
    evidence = draw(400, target=always)
    found, _ = diagnose(evidence, CONFIG)
    assert found is not None
    assert found.effective_windows < 5
    assert "times as many decisions" in refusal("pdis", evidence)
    assert 0 < usable_window(evidence, CONFIG) < CONFIG.window
    unrefused = estimate("pdis", evidence, CONFIG, np.random.default_rng(0), refuse=False)
    assert unrefused.gain is not None


def test_a_short_log_and_a_model_of_something_else_are_refused() -> None:
    assert "log 80 more" in refusal("no_difference", draw(120))
    evidence = draw(2000)
    assert evidence.logged_run is not None
    noise = np.random.default_rng(0).normal(size=2000)
    nothing = replace(
        evidence.logged_run, reward=noise, features=noise[:, None], keys=("A",) * 2000
    )
    runs = (replace(nothing, reward=noise[::-1]),)
    blind = replace(evidence, logged_run=nothing, target_runs=runs)
    assert "calibrate it on a profile measured on this system" in refusal("replay_dr", blind)
    with pytest.raises(InvalidRequestError, match="needs a replay"):
        estimate("replay", Evidence(evidence.log, evidence.target), CONFIG, np.random.default_rng())


def test_unknown_names_and_settings_are_one_sentence() -> None:
    with pytest.raises(InvalidRequestError, match="no estimator 'magic'; expected one of no_diff"):
        estimate("magic", draw(400), CONFIG, np.random.default_rng(0))
    with pytest.raises(InvalidRequestError, match="0 < window < block"):
        OpeConfig(window=40, block=40)


def test_overlap_by_hand() -> None:
    found = overlap(by_hand(), WANTED, window=1)
    weights = np.array([2.0, 1 / 3, 1.0])
    assert found.effective_decisions == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.largest_share == pytest.approx(2 / weights.sum())
    assert (found.free_share, found.deterministic_share, found.unsupported) == (2 / 3, 0.0, 0.0)
    assert GENERATOR != "g1"


# --------------------------------------------------------------------------------------
# Intervals


def test_student_quantiles_are_those_of_the_tables() -> None:
    table = {4: 2.776, 9: 2.262, 19: 2.093, 60: 2.000}
    for degrees, value in table.items():
        assert t_quantile(0.975, degrees) == pytest.approx(value, rel=0.01)
    low, high = interval(1.0, 0.5, 20, 0.95)
    assert (high - 1.0) / 0.5 == pytest.approx(2.093, abs=0.002)
    assert low + high == pytest.approx(2.0)


def test_blocks_run_on_and_cover_the_log_evenly() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(100)
    for _ in range(3000):
        index = draw_blocks(100, 7, rng)
        steps = np.diff(index.reshape(-1)[:7]) % 100
        assert len(index) == 100
        assert (steps == 1).all()
        counts += np.bincount(index, minlength=100)
    np.testing.assert_allclose(counts, 3000, rtol=0.15)


def test_standard_errors_of_independent_values_are_those_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=4000)
    errors = standard_errors(
        lambda i: np.array([values[i].mean(), 0.0]), 4000, 20, 800, np.random.default_rng(2)
    )
    assert errors[0] == pytest.approx(values.std() / np.sqrt(4000), rel=0.12)


def test_intervals_cover_the_true_gain() -> None:
    """120 logs; the benchmark has over 1,000. Nine in ten is what chance leaves of 95 %."""
    covered = 0
    for seed in range(120):
        found = _found(seed)
        assert found.gain_interval is not None
        low, high = found.gain_interval
        covered += low <= true_gain() <= high
    assert covered >= 0.89 * 120


def _found(seed: int) -> Estimate:
    evidence = draw(1600, seed, runs=4)
    config = replace(CONFIG, draws=60)
    return estimate("replay_dr", evidence, config, np.random.default_rng(seed))
