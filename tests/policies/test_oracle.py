"""Looking ahead on a toy whose best course is known, and bounds by hand and by brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.cluster import (
    ClusterSnapshot,
    KvCostParams,
    Routing,
    SwitchPlan,
    dense_deployment,
    deployment_key,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from policies.base import (
    Future,
    LengthSampler,
    Observation,
    Rollout,
    TrafficColumns,
    request_seconds,
)
from policies.mpc import MpcConfig, MpcPolicy
from policies.oracle import (
    BeamConfig,
    RefineConfig,
    World,
    beam_search,
    goodput_bound,
    latency_bound,
    refine,
    wanted_of,
)

SLOW, FAST = "4xtp1pp1", "1xtp4pp1"
NO_ROUTING = Routing((0,))
SERVICE_S = {SLOW: 3.0, FAST: 1.0}
SWITCH_S = 5.0  # every request that arrives in it waits for its end


def plan_to(snapshot: ClusterSnapshot, key: str) -> SwitchPlan | None:
    target = dense_deployment(parse_deployment_key(key))
    return SwitchPlan(target, snapshot.epoch, (), KvCostParams(1.0, 1.0, 1.0), 0, 0, SWITCH_S, 0.0)


@dataclass
class Toy:
    """Serves each request in SERVICE_S of its deployment, any number at once."""

    key: str = SLOW
    now_s: float = 0.0
    open_until_s: float = 0.0  # a switch holds arrivals back until then
    arrived: int = 0
    finishing: tuple[tuple[float, float], ...] = ()  # (finish, arrival) of those in it

    def snapshot(self) -> ClusterSnapshot:
        finished = self.arrived - len(self.finishing)
        snapshot = ClusterSnapshot(
            self.now_s, 0, dense_deployment(parse_deployment_key(self.key)), NO_ROUTING, (), None
        )
        return replace(snapshot, num_arrived=self.arrived, num_finished=finished)

    def fork(self, lengths: LengthSampler | None = None) -> Toy:
        return replace(self)

    def rollout(
        self,
        until_s: float,
        future: Future | None = None,
        plan: SwitchPlan | None = None,
        routing: Routing | None = None,
    ) -> Rollout:
        assert future is not None
        if plan is not None:
            self.key = deployment_key(plan.target.configs)
            self.open_until_s = self.now_s + SWITCH_S
        started = np.maximum(future.arrival_s, self.open_until_s) + SERVICE_S[self.key]
        everything = [
            *self.finishing,
            *zip(started.tolist(), future.arrival_s.tolist(), strict=True),
        ]
        ended = [(f, a) for f, a in everything if f <= until_s]
        self.finishing = tuple((f, a) for f, a in everything if f > until_s)
        self.arrived += len(started)
        self.now_s = until_s
        ones = np.ones(len(ended), np.int64)
        finish_s, arrival_s = (np.array([e[i] for e in ended], np.float64) for i in (0, 1))
        columns = TrafficColumns(
            future.arrival_s,
            future.prompt_tokens,
            ones,
            ones.astype(np.bool_),
            arrival_s,
            finish_s,
            finish_s,
            ones,
            ones,
        )
        return Rollout(columns, self.snapshot())


def arrivals(times: np.ndarray) -> Future:
    ones = np.ones(len(times), np.int64)
    return Future(np.asarray(times, np.float64), ones, ones)


def spent_s(times: np.ndarray, switches: tuple[tuple[float, str], ...], until_s: float) -> float:
    """By the definition: the sum over requests of the time in the system up to `until_s`."""
    total = 0.0
    for arrival_s in times:
        key, open_s = SLOW, 0.0
        for at_s, to in switches:
            if at_s < arrival_s:
                key, open_s = to, at_s + SWITCH_S
        finish_s = max(arrival_s, open_s) + SERVICE_S[key]
        total += min(finish_s, until_s) - arrival_s
    return total


QUIET, BUSY = np.array([0.5, 9.0]), np.arange(20.5, 60.0, 0.5)


STEPS_S = np.arange(0.0, 60.0, 10.0).tolist()


def toy_world(times: np.ndarray) -> World:
    def future(a: float, b: float) -> Future:
        return arrivals(times[(times > a) & (times <= b)])

    return World((SLOW, FAST), plan_to, future)


def least_spent_s(times: np.ndarray) -> float:
    """Of every course of a switch or none at each step."""
    courses = []
    for keys in itertools.product((SLOW, FAST), repeat=len(STEPS_S)):
        before = (SLOW, *keys)
        courses.append(
            tuple((s, k) for s, k, b in zip(STEPS_S, keys, before, strict=False) if k != b)
        )
    return min(spent_s(times, course, 60.0) for course in courses)


@pytest.mark.parametrize("times", [QUIET, np.concatenate([QUIET, BUSY]), BUSY])
def test_a_wide_beam_finds_the_best_course(times: np.ndarray) -> None:
    found = beam_search(Toy(), toy_world(times), 60.0, BeamConfig(width=2, step_s=10.0))
    assert found.spent == pytest.approx(spent_s(times, found.switches, 60.0))
    assert found.spent == pytest.approx(least_spent_s(times))
    assert bool(found.switches) == (len(times) > len(QUIET))


@pytest.mark.parametrize("times", [QUIET, np.concatenate([QUIET, BUSY]), BUSY])
@pytest.mark.parametrize("first", [SLOW, FAST])
def test_refining_finds_the_best_course(times: np.ndarray, first: str) -> None:
    config = RefineConfig(step_s=10.0, blocks=(3, 2, 1))
    firsts = [(first,) * len(STEPS_S)]
    found = refine(Toy(), toy_world(times), 60.0, config, firsts, lambda c: c.spent)
    assert found.spent == pytest.approx(spent_s(times, found.switches, 60.0))
    assert found.spent == pytest.approx(least_spent_s(times))


def test_refining_ends_where_the_window_does() -> None:
    """A last step that is shorter, and deployments that cannot be reached from here."""
    world = replace(toy_world(BUSY), plan=lambda snapshot, key: None)
    config = RefineConfig(step_s=25.0, blocks=(2, 1))
    found = refine(Toy(), world, 60.0, config, [(FAST,) * 3], lambda c: c.spent)
    assert found.snapshot.now_s == 60.0
    assert not found.switches
    assert found.spent == pytest.approx(spent_s(BUSY, (), 60.0))
    with pytest.raises(AssertionError, match="one for each step"):
        refine(Toy(), world, 60.0, config, [(FAST,) * 2], lambda c: c.spent)


def test_refining_is_never_worse_than_what_it_starts_with() -> None:
    """Whatever is looked for: here to have switched often, which no single block leads to."""
    wanted = wanted_of(SLOW, [(10.0, FAST), (31.0, SLOW), (39.0, FAST)], 60.0, 10.0)
    assert wanted == (SLOW, FAST, FAST, SLOW, FAST, FAST)
    world, config = toy_world(QUIET), RefineConfig(step_s=10.0, blocks=(6,))
    firsts = [wanted, (SLOW,) * 6]
    found = refine(Toy(), world, 60.0, config, firsts, lambda c: -len(c.switches))
    assert [s for s, _ in found.switches] == [10.0, 30.0, 40.0]
    assert wanted_of(SLOW, [], 61.0, 10.0) == (SLOW,) * 7


class ToyOutlook:
    """The true future, from 20 s on."""

    def __init__(self, times: np.ndarray) -> None:
        self.times, self.asked = times, 0

    def simulator(self) -> Toy:
        self.asked += 1
        return Toy(now_s=20.0)

    def plan(self, row: int) -> SwitchPlan | None:
        return plan_to(self.simulator().snapshot(), FAST) if row == 1 else None

    def futures(self, horizon_s: float, number: int) -> list[Future]:
        upto = 20.0 + horizon_s
        return [arrivals(self.times[(self.times > 20.0) & (self.times <= upto)])] * number


def observed(legal: tuple[int, ...]) -> Observation:
    mask = np.isin(np.arange(3), legal)
    zeros = np.zeros((3, 1), np.float32)
    return Observation(np.zeros(1, np.float32), zeros, mask, (SLOW, FAST, "2xtp2pp1"))


def test_mpc_switches_when_the_horizon_pays_for_it() -> None:
    """A request each half second: the switch costs those of 5 s about 2.5 s each, and saves 2 s of
    each after it."""
    for horizon_s, expected in ((4.0, 0), (40.0, 1)):
        outlook = ToyOutlook(BUSY)
        rule = MpcPolicy(outlook, MpcConfig(horizon_s, decisions=2, num_futures=2))
        assert rule.probabilities(observed((0, 1, 2))).argmax() == expected  # row 2: no plan
        asked = outlook.asked
        assert rule.probabilities(observed((0, 1, 2))).argmax() == 0  # not due
        assert outlook.asked == asked
        assert rule.probabilities(observed((0,))).argmax() == 0  # nothing to choose
        assert outlook.asked == asked
        assert rule.probabilities(observed((0, 1))).argmax() == 0  # the fourth: not due


def test_request_seconds_by_hand() -> None:
    toy = Toy()
    before = toy.snapshot()
    after = toy.rollout(10.0, arrivals(np.array([1.0, 9.0])))
    assert request_seconds(before, after) == pytest.approx(3.0 + 1.0)
    again = toy.rollout(20.0, arrivals(np.zeros(0)))
    assert request_seconds(after.snapshot, again) == pytest.approx(2.0)


def test_goodput_bound_by_hand() -> None:
    """10 s windows of 2 devices, 5 s patience: 30 device-seconds each. The first window has three
    requests of 12: two fit; the second one of 25 and one that cannot meet anyhow."""
    arrival_s = np.array([0.0, 1.0, 2.0, 11.0, 12.0])
    work_s = np.array([12.0, 12.0, 12.0, 25.0, 1.0])
    can = np.array([True, True, True, True, False])
    assert goodput_bound(arrival_s, work_s, np.full(5, 5.0), can, 2, 10.0) == 3


def test_goodput_bound_is_no_less_than_the_best_schedule() -> None:
    """One device, work done one after another: all subsets by brute force, earliest deadline first
    (optimal for one machine with preemption)."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        arrival_s = np.sort(rng.uniform(0.0, 20.0, 6))
        work_s, patience_s = rng.uniform(0.5, 6.0, 6), rng.uniform(1.0, 8.0, 6)
        best = max(
            len(subset)
            for size in range(7)
            for subset in itertools.combinations(range(6), size)
            if _feasible(arrival_s, work_s, patience_s, subset)
        )
        can = work_s <= patience_s
        assert goodput_bound(arrival_s, work_s, patience_s, can, 1, 10.0) >= best


def _feasible(
    arrival_s: np.ndarray, work_s: np.ndarray, patience_s: np.ndarray, subset: tuple[int, ...]
) -> bool:
    """Demand criterion: between any arrival and any deadline no more work than time."""
    due_s = arrival_s + patience_s
    return all(
        sum(work_s[i] for i in subset if arrival_s[i] >= arrival_s[a] and due_s[i] <= due_s[d])
        <= due_s[d] - arrival_s[a]
        for a in subset
        for d in subset
        if due_s[d] > arrival_s[a]
    )


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidRequestError, match="width >= 1"):
        BeamConfig(width=0)
    with pytest.raises(InvalidRequestError, match="horizon_s > 0"):
        MpcConfig(horizon_s=0.0)
    assert latency_bound([1.0, 3.0]) == 2.0
    assert latency_bound([]) == 0.0
