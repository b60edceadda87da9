"""What is possible with hindsight: searches for courses that can be carried out, and bounds that
cannot be beaten.

A search knows all arrivals and output lengths and tries courses of switches in the simulator. The
beam keeps the best few of each step; `refine` takes whole courses and changes them block by block
while that helps. Both are achievable references, not optima. The bounds are proven, and say how
much there is above them at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from math import ceil

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ClusterSnapshot, SwitchPlan, deployment_key
from engine.errors import InvalidRequestError, TidewrightError
from policies.base import Future, Rollout, Simulator, TrafficColumns, request_seconds

Floats = NDArray[np.float64]
Cost = Callable[[ClusterSnapshot, Rollout], float]
"""What a stretch of simulated time costs, 0 or more; given the snapshot before it."""


@dataclass(frozen=True, slots=True)
class BeamConfig:
    """Frozen before anything is compared."""

    width: int = 4  # courses kept after each step
    step_s: float = 60.0  # between decisions

    def __post_init__(self) -> None:
        if self.width < 1 or self.step_s <= 0:
            raise InvalidRequestError(
                f"a beam needs width >= 1 and step_s > 0, got {self.width} and {self.step_s}."
            )


@dataclass(frozen=True, slots=True)
class RefineConfig:
    """Frozen before anything is compared."""

    step_s: float = 60.0  # between decisions
    blocks: tuple[int, ...] = (20, 10, 5, 2, 1)  # steps that change together, one size at a time
    deployments: int = 4  # to choose from, beside those of the best courses known before

    def __post_init__(self) -> None:
        if self.step_s <= 0 or not self.blocks or min(self.blocks) < 1 or self.deployments < 1:
            raise InvalidRequestError(
                "refining needs step_s > 0, blocks of at least one step and one deployment, got "
                f"{self.step_s}, {self.blocks} and {self.deployments}."
            )


@dataclass(frozen=True, slots=True)
class World:
    """What a search knows: deployments to choose from, and the future. Requests go where least is
    going on."""

    keys: tuple[str, ...]
    plan: Callable[[ClusterSnapshot, str], SwitchPlan | None]  # None: it cannot be reached
    future: Callable[[float, float], Future]  # the arrivals in (from, to]
    cost: Cost = request_seconds


@dataclass(frozen=True, slots=True)
class Course:
    """One course of switches up to some moment: (second, key) of each switch, and its traffic."""

    simulator: Simulator
    snapshot: ClusterSnapshot
    spent: float  # the sum of `World.cost`
    switches: tuple[tuple[float, str], ...] = ()
    traffic: tuple[TrafficColumns, ...] = ()

    @property
    def key(self) -> str:
        """Of what it serves with, or is on its way to."""
        going = self.snapshot.switch_in_flight and self.switches
        return self.switches[-1][1] if going else deployment_key(self.snapshot.deployment.configs)

    @property
    def num_open(self) -> int:
        now = self.snapshot
        return now.num_arrived - now.num_finished - now.num_rejected

    @property
    def cost(self) -> float:
        """What is still in the system is charged as requests were in the mean so far."""
        return self.spent * (1.0 + self.num_open / max(self.snapshot.num_arrived, 1))

    def is_no_better_than(self, other: Course) -> bool:
        """At one time: it has cost as much, and no less is still in the system."""
        return self.spent >= other.spent and self.num_open >= other.num_open


def beam_search(start: Simulator, world: World, until_s: float, config: BeamConfig) -> Course:
    """The course with the least cost that the beam finds."""
    beam = [Course(start.fork(), start.snapshot(), 0.0)]
    now_s = beam[0].snapshot.now_s
    while now_s < until_s - 1e-9:
        end_s = min(now_s + config.step_s, until_s)
        future = world.future(now_s, end_s)
        grown = [after for course in beam for after in _grow(course, world, future, end_s)]
        beam, now_s = _best(grown, config.width), end_s
    return beam[0]


def _grow(course: Course, world: World, future: Future, end_s: float) -> list[Course]:
    """The course one step on, without a switch and with each that can be started now."""
    found = [_roll(course, world, future, end_s, None)]
    if course.snapshot.switch_in_flight:
        return found
    for key in world.keys:
        plan = None if key == course.key else world.plan(course.snapshot, key)
        if plan is None:
            continue
        try:
            found.append(_roll(course, world, future, end_s, plan))
        except TidewrightError:  # it cannot be started from here
            continue
    return found


def _roll(
    course: Course, world: World, future: Future, end_s: float, plan: SwitchPlan | None
) -> Course:
    simulator, before = course.simulator.fork(), course.snapshot
    after = simulator.rollout(end_s, future, plan)
    switches = course.switches
    if plan is not None:
        switches = (*switches, (before.now_s, deployment_key(plan.target.configs)))
    return Course(
        simulator,
        after.snapshot,
        course.spent + world.cost(before, after),
        switches,
        (*course.traffic, after.traffic),
    )


def _best(courses: list[Course], width: int) -> list[Course]:
    """The best of each deployment, and of those the best: a beam of equals sees one future."""
    kept: dict[str, Course] = {}
    for course in sorted(courses, key=lambda c: c.cost):
        kept.setdefault(course.key, course)
    return list(kept.values())[:width]


# --------------------------------------------------------------------------------------
# Refining whole courses

Wanted = tuple[str, ...]
"""The deployment wanted from each step on. While a switch is in flight the next one waits; what
cannot be reached is left."""


def wanted_of(
    first: str, switches: Iterable[tuple[float, str]], until_s: float, step_s: float
) -> Wanted:
    """What these switches, (second, key), come to on a grid of steps from 0 to `until_s`."""
    wanted = [first] * (len(_borders_s(0.0, until_s, step_s)) - 1)
    for at_s, key in sorted(switches):
        step = round(at_s / step_s)
        wanted[step:] = [key] * len(wanted[step:])
    return tuple(wanted)


def _borders_s(from_s: float, until_s: float, step_s: float) -> list[float]:
    """Of all steps; the last may be shorter."""
    number = ceil((until_s - from_s) / step_s - 1e-9)
    return [*(from_s + i * step_s for i in range(number)), until_s]


def refine(
    start: Simulator,
    world: World,
    until_s: float,
    config: RefineConfig,
    firsts: Sequence[Wanted],
    total: Callable[[Course], float],
) -> Course:
    """A course with no more of `total`, in the end, than the best of `firsts`, which want something
    in each step.

    Block by block, long ones first, another deployment is tried; what does better stays. A trial is
    given up at the end of its block, or later, where it is worse than what there is.
    """
    origin = Course(start.fork(), start.snapshot(), 0.0)
    borders_s = _borders_s(origin.snapshot.now_s, until_s, config.step_s)
    futures = list(starmap(world.future, pairwise(borders_s)))
    assert {len(wanted) for wanted in firsts} == {len(futures)}, "one for each step"

    def follow(begin: Course, wanted: Wanted, first: int) -> Iterator[Course]:
        """Where it stands after each step from `first` on."""
        course = begin
        for step in range(first, len(futures)):
            course = _towards(course, world, futures[step], borders_s[step + 1], wanted[step])
            yield course

    def try_block(wanted: Wanted, block: range) -> list[Course] | None:
        """From the block on, unless it is given up."""
        found = []
        for course in follow(best[block.start], wanted, block.start):
            found.append(course)
            step = block.start + len(found)
            if step >= block.stop and course.is_no_better_than(best[step]):
                return None
        return found

    tried = (([origin, *follow(origin, wanted, 0)], wanted) for wanted in dict.fromkeys(firsts))
    best, wanted = min(tried, key=lambda each: total(each[0][-1]))
    least = total(best[-1])
    for size in config.blocks:
        for begin in range(0, len(futures), size):
            block = range(begin, min(begin + size, len(futures)))
            for key in world.keys:
                other = (*wanted[:begin], *(key for _ in block), *wanted[block.stop :])
                found = try_block(other, block) if other != wanted else None
                if found is not None and (value := total(found[-1])) < least:
                    best, wanted, least = best[: begin + 1] + found, other, value
    return best[-1]


def _towards(course: Course, world: World, future: Future, end_s: float, key: str) -> Course:
    """One step on, with a switch to `key` if it is to be had."""
    if key != course.key and not course.snapshot.switch_in_flight:
        plan = world.plan(course.snapshot, key)
        if plan is not None:
            try:
                return _roll(course, world, future, end_s, plan)
            except TidewrightError:  # it cannot be started from here
                pass
    return _roll(course, world, future, end_s, None)


# --------------------------------------------------------------------------------------
# Bounds


def goodput_bound(
    arrival_s: Floats,
    work_s: Floats,
    patience_s: Floats,
    can_meet: NDArray[np.bool_],
    num_devices: int,
    window_s: float = 60.0,
) -> int:
    """No policy on `num_devices` devices lets more requests meet their objectives than this.

    work_s[N]: device-seconds that a request takes at least, whatever the configuration and however
    well it is batched; patience_s[N]: seconds after its arrival by which one that meets has ended;
    can_meet[N]: whether it could alone on an idle replica. Those that arrive in one window and meet
    have all their work done between its beginning and its end plus the longest patience among
    them, in which the pool has so many device-seconds: at most the requests of least work that fill
    these. Windows are bounded each for itself (a relaxation, hence still a bound).
    """
    served = 0
    window = np.floor(arrival_s / window_s).astype(np.int64)
    for number in np.unique(window):
        here = np.flatnonzero((window == number) & can_meet)
        if not len(here):
            continue
        room_s = num_devices * (window_s + float(patience_s[here].max()))
        filled = np.cumsum(np.sort(work_s[here]))
        served += int(np.searchsorted(filled, room_s, side="right"))
    return served


def latency_bound(alone_s: Sequence[float] | Floats) -> float:
    """Mean latency is no less than that of each request alone on its fastest configuration."""
    return float(np.mean(alone_s)) if len(alone_s) else 0.0
