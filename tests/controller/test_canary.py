"""The canary's blocks and its sequential test: the arithmetic by hand, the errors by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.random import Generator

from controller.canary import ACTIVE, CANARY, Bets, Block, Canary, CanaryConfig
from engine.cluster import ClusterEvent, EventKind, RequestOutcome, RequestStatus, SloSpec
from engine.errors import InvalidRequestError

SLO = SloSpec(1.0, 0.0)
GRID_S = 15.0


def _ended(arrival_s: float, good: bool) -> ClusterEvent:
    first_s = arrival_s + (0.5 if good else 2.0)
    outcome = RequestOutcome("r", RequestStatus.FINISHED, arrival_s, first_s, first_s, 10, 1, 0)
    return ClusterEvent(0, first_s, EventKind.ENDED, outcome=outcome)


def _run(canary: Canary, goodput: dict[str, float], seconds: float, per_tick: int = 10) -> str:
    """Every tick so many requests end, that share of them in time; the verdict, or none."""
    served: dict[str, float] = {ACTIVE: 0.0, CANARY: 0.0}
    for tick in range(1, int(seconds / GRID_S)):
        now_s, events, arm = GRID_S * tick, [], canary.arm
        for i in range(per_tick):
            served[arm] += goodput[arm]
            good = served[arm] >= 1.0
            served[arm] -= good
            events.append(_ended(now_s - 10.0 + i / per_tick, good))
        if verdict := canary.observe(now_s, events):
            return verdict
    return ""


def test_blocks_are_of_20_to_30_minutes_and_their_arms_are_drawn() -> None:
    canary = Canary("x", CanaryConfig(0.3), SLO, 0.0, np.random.default_rng(0))
    ends = [canary._ends_s]
    for tick in range(1, 40_000):
        canary.observe(GRID_S * tick, [_ended(GRID_S * tick - 1.0, True)] * 5)
        if canary._ends_s != ends[-1]:
            ends.append(canary._ends_s)
    lengths = np.diff([0.0, *ends])
    assert lengths.min() >= 1200.0
    assert lengths.max() <= 1800.0 + GRID_S
    arms = [block.arm for block in canary.blocks]
    assert len(arms) == len(ends) - 1
    share = arms.count(CANARY) / len(arms)
    assert abs(share - 0.3) < 3 * (0.21 / len(arms)) ** 0.5
    assert canary.evidence < 20.0


def test_the_first_minutes_of_a_block_are_not_counted() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 0.0, np.random.default_rng(0))
    canary.observe(200.0, [_ended(299.0, False)] * 30)
    canary.observe(600.0, [_ended(300.0, True)] * 30)
    canary.observe(1801.0, [])
    assert canary.blocks == [Block(canary.blocks[0].arm, 1.0, 30)]


def test_a_block_with_too_few_requests_does_not_count() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 0.0, np.random.default_rng(0))
    canary.observe(1801.0, [_ended(400.0, False)] * 19)
    assert canary.blocks == []


def test_the_bets_by_hand() -> None:
    """p = 1/2: no payoff is below -2.02, so the first stake is a quarter of 0.8 / 2.02."""
    bets = Bets(0.5, 0.02)
    stake = 0.25 * 0.8 / 2.02
    first = bets.bet(True, 0.5, 0.8)  # a canary block 0.3 below: 0.6 - 0.02
    assert first == pytest.approx(0.58)
    assert bets.evidence == pytest.approx(1 + stake * 0.58)
    second = bets.bet(False, 0.9, 0.8)  # an active block 0.1 above: 0.2 - 0.02
    assert second == pytest.approx(0.18)
    before = (1 + stake * 0.58) * (1 + stake * 0.18)
    assert bets.evidence == pytest.approx(before)
    bets.bet(False, 0.6, 0.8)  # and one 0.2 below speaks for the canary: -0.4 - 0.02
    bold = min(0.38 / ((0.58**2 + 0.18**2) / 2), 0.8 / 2.02)
    assert bets.evidence == pytest.approx(before * (1 - bold * 0.42))


def _evidence(rng: Generator, p: float, canary: float, active: float, blocks: int) -> float:
    """The highest that the process gets with noisy blocks and a level that drifts by the hour."""
    bets, total, highest = Bets(p, 0.02), active, 1.0
    for i in range(blocks):
        is_canary = bool(rng.random() < p)
        level = 0.1 * math.sin(i / 5) + (canary if is_canary else active)
        goodput = min(max(level + 0.08 * rng.standard_normal(), 0.0), 1.0)
        bets.bet(is_canary, goodput, total / (i + 1))
        total += goodput
        highest = max(highest, bets.evidence)
    return highest


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_one_that_is_no_worse_is_rarely_rolled_back(p: float) -> None:
    """Looked at after every block for two weeks, in at most one of twenty lives; 3 sigma above."""
    rng, lives = np.random.default_rng(1), 200
    alarms = sum(_evidence(rng, p, 0.7, 0.7, 800) >= 20.0 for _ in range(lives))
    assert alarms / lives <= 0.05 + 3 * (0.05 * 0.95 / lives) ** 0.5


def test_one_that_is_worse_is_rolled_back() -> None:
    rng = np.random.default_rng(2)
    found = [_evidence(rng, 0.5, 0.5, 0.8, 60) >= 20.0 for _ in range(50)]
    assert np.mean(found) > 0.9


def test_the_verdict_is_given_with_figures() -> None:
    config = CanaryConfig(0.5)
    canary = Canary("x", config, SLO, 0.0, np.random.default_rng(3))
    verdict = _run(canary, {ACTIVE: 0.9, CANARY: 0.6}, 400_000)
    assert verdict.startswith("evidence ")
    assert verdict.endswith("that it is worse: goodput 0.60 against 0.90")
    assert canary.evidence >= config.threshold


def test_one_that_is_far_worse_is_ended_without_waiting_for_evidence() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 0.0, np.random.default_rng(3))
    verdict = _run(canary, {ACTIVE: 0.9, CANARY: 0.1}, 400_000)
    assert verdict == "goodput 0.10 in a block, 0.90 without it"
    assert canary.blocks[-1].arm == CANARY
    assert len(canary.blocks) <= 3


def test_one_that_is_better_stays() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 0.0, np.random.default_rng(3))
    assert _run(canary, {ACTIVE: 0.7, CANARY: 0.9}, 200_000) == ""


def test_failures_end_it() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 0.0, np.random.default_rng(0))
    assert canary.failed("late") == canary.failed("late") == ""
    assert canary.failed("late") == "3 failures, the last: late"


def test_after_a_restart_of_the_engine_a_block_begins_anew() -> None:
    canary = Canary("x", CanaryConfig(0.5), SLO, 5000.0, np.random.default_rng(0))
    canary.observe(5400.0, [_ended(5350.0, False)] * 30)
    canary.restarted(0.0)
    assert canary.observe(1000.0, []) == ""
    assert canary.blocks == []
    assert canary._ends_s <= 1800.0


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_one_out_is_refused(fraction: float) -> None:
    with pytest.raises(InvalidRequestError, match="more than 0 and less than 1"):
        CanaryConfig(fraction)
