"""A profile set right by a log: where the log speaks, and where only the prior does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.build import load_profiled_cluster
from engine.profile import ProfiledCluster
from envs.build import DEFAULT_PROFILE
from envs.recalibration import (
    COMMON,
    DOUBLED,
    OF_SWITCHES,
    OWN,
    STEP_ERROR,
    SWITCH,
    SWITCH_ERROR,
    Signals,
    Simulate,
    pace_of,
    recalibrate,
    scaled,
)

Floats = NDArray[np.float64]
CLUSTER = load_profiled_cluster(DEFAULT_PROFILE)
NAMES = [steps.parallel.key for steps in CLUSTER.profile.steps]
KEYS = ["4xtp1pp1"] * 300 + ["2xtp1pp2"] * 300
CHANGES = np.arange(600) % 3 == 0  # intervals in which a switch costs


NONE = np.zeros(0)


def logarithms(keys: list[str]) -> Simulate:
    """Rewards that are less what steps and switches take, in logarithms: linear in theta. Switches
    take their overhead and two seconds of waiting, which no factor changes. No request ends."""
    served = [NAMES.index(key.partition("x")[2]) for key in keys]

    def simulate(cluster: ProfiledCluster) -> Signals:
        base = np.log([steps.base_s for steps in cluster.profile.steps])
        overhead_s, unknown = cluster.profile.switch_overhead_s, np.full(len(keys), np.nan)
        if len(set(keys)) == 1:
            return Signals(np.asarray(-base[served]), unknown, NONE)
        reward = -base[served] - np.log(overhead_s) * CHANGES[: len(keys)]
        return Signals(np.asarray(reward), unknown, 20.0 * overhead_s + np.array([2.0]))

    return simulate


def test_every_time_is_scaled() -> None:
    theta = np.linspace(-0.2, 0.3, len(NAMES) + 1)
    found, were = scaled(CLUSTER, theta).profile, CLUSTER.profile
    for before, after, log_factor in zip(were.steps, found.steps, theta, strict=False):
        assert after == before.scaled(float(np.exp(log_factor)))
    assert found.switch_overhead_s == pytest.approx(were.switch_overhead_s * np.exp(0.3))
    assert found.link_bytes_per_s == pytest.approx(were.link_bytes_per_s / np.exp(0.3))


def logged_under(theta: Floats, simulate: Simulate, noise: Floats) -> Signals:
    found = simulate(scaled(CLUSTER, theta))
    return Signals(found.reward + noise, found.pace + noise, found.switch_s)


def test_what_the_log_shows_is_found() -> None:
    theta = np.zeros(len(NAMES) + 1)
    theta[NAMES.index("tp1pp1")], theta[NAMES.index("tp1pp2")], theta[-1] = 0.4, -0.1, 0.7
    simulate, rng = logarithms(KEYS), np.random.default_rng(0)
    logged = logged_under(theta, simulate, 0.05 * rng.standard_normal(len(KEYS)))
    found = recalibrate(CLUSTER, simulate, KEYS, logged, block=10)
    for name, actual in (("tp1pp1", 0.4), ("tp1pp2", -0.1), (SWITCH, 0.7)):
        factor, error = found.factors()[name]
        assert 0.0 < error <= 0.1
        assert np.log(factor) == pytest.approx(actual, abs=3 * error)
    again = simulate(found.cluster)
    np.testing.assert_allclose(again.reward.mean(), logged.reward.mean(), atol=0.02)
    np.testing.assert_allclose(again.switch_s, logged.switch_s, rtol=0.02)


@pytest.mark.parametrize(("other", "alike"), [("tp4pp1", 2), ("tp1pp4", 0), ("tp1pp1", 0)])
def test_what_it_does_not_show_is_as_likely_as_what_it_does(other: str, alike: int) -> None:
    """tp2pp1 known well; of another the mean and spread given it, in closed form: of tp4pp1 two
    doublings are as one is there, of tp1pp4 two others, of tp1pp1 none."""
    theta = np.zeros(len(NAMES) + 1)
    theta[NAMES.index("tp2pp1")] = 0.3
    keys = ["2xtp2pp1"] * 300
    simulate = logarithms(keys)
    logged = logged_under(theta, simulate, 1e-3 * np.tile([1.0, -1.0, -1.0, 1.0], 75))
    found = recalibrate(CLUSTER, simulate, keys, logged, block=2)
    assert found.theta[NAMES.index("tp2pp1")] == pytest.approx(0.3, abs=1e-3)
    known = COMMON**2 + DOUBLED**2 + OWN**2
    doublings = 0 if other == "tp1pp1" else 2
    spread = COMMON**2 + DOUBLED**2 * doublings**2 + OWN**2
    shared = COMMON**2 + DOUBLED**2 * alike
    at = NAMES.index(other)
    assert found.theta[at] == pytest.approx(0.3 * shared / known, abs=1e-3)
    expected = spread - shared**2 / known + STEP_ERROR**2
    assert found.covariance[at, at] == pytest.approx(expected, rel=1e-3)
    assert found.factors()[SWITCH] == pytest.approx((1.0, OF_SWITCHES))  # it never switched


def test_a_short_stay_is_not_lost_in_its_block() -> None:
    """One interval in forty, as in every other block: means over blocks could not tell it apart."""
    theta = np.zeros(len(NAMES) + 1)
    theta[NAMES.index("tp1pp2")] = 0.3
    keys = (["4xtp1pp1"] * 39 + ["2xtp1pp2"]) * 15
    simulate, rng = logarithms(keys), np.random.default_rng(4)
    logged = logged_under(theta, simulate, 0.02 * rng.standard_normal(len(keys)))
    found = recalibrate(CLUSTER, simulate, keys, logged, block=40)
    factor, error = found.factors()["tp1pp2"]
    assert error < 0.2 * np.hypot(COMMON, OWN)
    assert np.log(factor) == pytest.approx(0.3, abs=3 * error)


def test_the_pace_of_requests_tells_what_rewards_do_not() -> None:
    """One interval in forty of a configuration that rewards say nothing of, and in half of these
    no request ended."""
    keys = (["4xtp1pp1"] * 39 + ["2xtp1pp2"]) * 15
    served = np.array([NAMES.index(key.partition("x")[2]) for key in keys])
    ended = (np.arange(len(keys)) // 40) % 2 == 0
    theta, rng = np.zeros(len(NAMES) + 1), np.random.default_rng(6)
    theta[NAMES.index("tp1pp2")] = 0.3

    def simulate(cluster: ProfiledCluster) -> Signals:
        base = np.log([steps.base_s for steps in cluster.profile.steps])
        return Signals(np.zeros(len(keys)), np.where(ended, base[served], np.nan), NONE)

    logged = logged_under(theta, simulate, 0.02 * rng.standard_normal(len(keys)))
    found = recalibrate(CLUSTER, simulate, keys, logged, block=40)
    for name, actual in (("tp1pp1", 0.0), ("tp1pp2", 0.3)):
        factor, error = found.factors()[name]
        assert error < 0.3 * np.hypot(COMMON, OWN)
        assert np.log(factor) == pytest.approx(actual, abs=3 * error)


def test_the_pace_of_an_interval_is_a_mean_of_logarithms() -> None:
    assert pace_of(np.array([0.1, 0.0, 0.4])) == pytest.approx(np.log(0.2))  # one took no time
    assert np.isnan(pace_of(np.zeros(2)))
    assert np.isnan(pace_of(NONE))


def test_switches_are_as_long_as_those_logged_in_the_mean_of_logarithms() -> None:
    overhead_s, zeros = CLUSTER.profile.switch_overhead_s, np.zeros(len(KEYS))

    def simulate(cluster: ProfiledCluster) -> Signals:
        factor = cluster.profile.switch_overhead_s / overhead_s
        return Signals(zeros, zeros, factor * np.array([0.5, 2.0]))

    logged = Signals(zeros, zeros, 0.6 * np.array([0.4, 1.0, 2.5]))
    found = recalibrate(CLUSTER, simulate, KEYS, logged, block=10)
    assert found.factors()[SWITCH] == pytest.approx((0.6, SWITCH_ERROR))
    assert np.abs(found.theta[:-1]).max() < 1e-9


def test_models_are_drawn_as_widely_as_the_log_allows() -> None:
    simulate = logarithms(KEYS)
    found = recalibrate(CLUSTER, simulate, KEYS, simulate(CLUSTER), block=10)
    rng, were = np.random.default_rng(1), CLUSTER.profile.switch_overhead_s
    drawn = [found.draw(rng).profile for _ in range(400)]
    others = np.log([p.steps[NAMES.index("tp4pp1")].base_s for p in drawn])
    known = np.log([p.steps[NAMES.index("tp1pp1")].base_s for p in drawn])
    error = found.factors()["tp4pp1"][1]
    assert float(others.std()) == pytest.approx(error, rel=0.15)
    assert float(known.std()) == pytest.approx(STEP_ERROR, rel=0.15)
    assert float(np.log([p.switch_overhead_s / were for p in drawn]).std()) < OF_SWITCHES


def test_too_little_log_changes_nothing() -> None:
    def never(cluster: ProfiledCluster) -> Signals:
        raise AssertionError("there is nothing to fit")

    found = recalibrate(CLUSTER, never, KEYS[:5], Signals(np.zeros(5), np.zeros(5), NONE), block=10)
    assert found.cluster == scaled(CLUSTER, np.zeros(len(NAMES) + 1))
    assert found.factors()["tp1pp1"] == pytest.approx((1.0, np.hypot(COMMON, OWN)))
