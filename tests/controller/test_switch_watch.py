"""Undo after a switch that cost goodput: when it fires, and the many times when it must not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.switch_watch import SwitchWatch, Undo, WatchConfig, is_good
from engine.cluster import (
    Arrival,
    ClusterEvent,
    EventKind,
    RequestOutcome,
    RequestStatus,
    SloSpec,
    SwitchPhase,
    SwitchTicket,
)

SLO = SloSpec(1.0, 0.1)
CONFIG = WatchConfig(num_ticks=3, drop=0.2, min_requests=10, window_s=60.0, horizon_s=120.0)
GRID_S = 10.0
DONE = SwitchTicket("t1", SwitchPhase.DONE, "4xtp1pp1", "1xtp4pp1", 0, 60.0, 62.0, "d1")


def _outcome(
    name: str, arrival_s: float, ttft_s: float, status: str = "finished"
) -> RequestOutcome:
    first_s = arrival_s + ttft_s
    return RequestOutcome(name, RequestStatus(status), arrival_s, first_s, first_s + 0.5, 10, 11, 0)


def _traffic(from_s: float, number: int, ttft_s: float, good: int) -> list[ClusterEvent]:
    """Arrivals in one grid interval; the first `good` of them in time, the others five times late;
    all ended by its end."""
    events = []
    for i in range(number):
        at_s = from_s + 4.0 * i / number
        name = f"r{at_s}"
        events.append(ClusterEvent(0, at_s, EventKind.ARRIVED, arrival=Arrival(name, at_s, 10)))
        ended = _outcome(name, at_s, ttft_s if i < good else 5.0 * ttft_s)
        events.append(ClusterEvent(0, ended.finish_s, EventKind.ENDED, outcome=ended))
    return events


def _run(
    watch: SwitchWatch, good: list[int], ticket: SwitchTicket = DONE, number: int = 20
) -> list[Undo | None]:
    """Six intervals before the switch with all in time, then one for each of `good`."""
    for tick in range(6):
        assert (
            watch.observe(GRID_S * (tick + 1), _traffic(GRID_S * tick, 20, 0.5, 20), None) is None
        )
    found = [watch.observe(70.0, [], ticket)]
    for tick, well in enumerate(good):
        from_s = 70.0 + GRID_S * tick
        found.append(watch.observe(from_s + GRID_S, _traffic(from_s, number, 0.5, well), ticket))
    return found


def test_it_fires_at_the_third_bad_tick_in_a_row() -> None:
    found = _run(SwitchWatch(CONFIG, SLO), [12, 12, 12, 12])
    assert [u is not None for u in found] == [False, False, False, True, False]
    (undo,) = [u for u in found if u]
    assert (undo.to_key, undo.from_key, undo.ticket_id) == ("4xtp1pp1", "1xtp4pp1", "t1")
    assert (undo.goodput_before, undo.goodput_after) == (1.0, 0.6)
    assert undo.reason == "undo: goodput 0.60 after the switch to 1xtp4pp1, 1.00 before"


@pytest.mark.parametrize(
    "good",
    [
        [20, 20, 20, 20],
        [16, 16, 16, 16],  # a loss of 0.2 is not more than 0.2
        [12, 12, 20, 12, 12],  # not three in a row
    ],
)
def test_it_is_silent_when_goodput_holds(good: list[int]) -> None:
    assert not any(_run(SwitchWatch(CONFIG, SLO), good))


def test_it_is_silent_when_much_more_arrives_than_before() -> None:
    assert not any(_run(SwitchWatch(CONFIG, SLO), [10, 10, 10, 10], number=40))


def test_it_is_silent_when_too_little_arrives_to_tell() -> None:
    assert not any(_run(SwitchWatch(CONFIG, SLO), [0, 0, 0, 0], number=3))


@pytest.mark.parametrize("phase", [SwitchPhase.ROLLED_BACK, SwitchPhase.CANCELLED])
def test_what_was_not_done_is_not_undone(phase: SwitchPhase) -> None:
    assert not any(_run(SwitchWatch(CONFIG, SLO), [5] * 5, replace(DONE, phase=phase)))


def test_an_undo_is_not_watched_in_turn() -> None:
    watch = SwitchWatch(CONFIG, SLO)
    watch.leave_out("d1")
    assert not any(_run(watch, [5] * 5))


def test_a_later_switch_ends_the_watch() -> None:
    watch = SwitchWatch(CONFIG, SLO)
    _run(watch, [12, 12])
    flying = replace(DONE, ticket_id="t2", phase=SwitchPhase.TRANSFER)
    assert watch.observe(100.0, _traffic(90.0, 20, 0.5, 5), flying) is None
    assert watch.observe(110.0, _traffic(100.0, 20, 0.5, 5), flying) is None


def test_requests_that_never_end_count_as_not_served() -> None:
    watch = SwitchWatch(CONFIG, SLO)
    _run(watch, [])
    found = []
    for tick in range(5):
        from_s = 70.0 + GRID_S * tick
        arrivals = [e for e in _traffic(from_s, 20, 0.5, 20) if e.arrival is not None]
        found.append(watch.observe(from_s + GRID_S, arrivals, DONE))
    assert [u.goodput_after for u in found if u] == [0.0]


def test_without_targets_it_compares_with_twice_the_ninetieth_percentile() -> None:
    """Before, all first tokens took 0.5 s; after, 0.9 s is as good and 2.5 s is not."""
    assert not any(_run(SwitchWatch(CONFIG), [20] * 5))
    fired = _run(SwitchWatch(CONFIG), [10] * 5)
    assert [u.goodput_after for u in fired if u] == [0.5]


def test_after_the_horizon_nobody_is_blamed() -> None:
    assert not any(
        _run(SwitchWatch(replace(CONFIG, horizon_s=40.0), SLO), [20, 20, 20, 20, 5, 5, 5, 5])
    )


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"first_token_s": 1.01, "finish_s": 1.5}, False),
        ({"finish_s": 1.51}, False),  # 10 tokens after the first in 1.01 s
        ({"first_token_s": None}, False),
        ({"status": RequestStatus.REJECTED, "first_token_s": None}, False),
        ({"status": RequestStatus.CANCELLED, "first_token_s": None}, True),
    ],
)
def test_what_served_well_means(changes: dict[str, object], good: bool) -> None:
    served = RequestOutcome("r", RequestStatus.FINISHED, 0.0, 0.5, 1.5, 100, 11, 0)
    assert is_good(SLO, replace(served, **changes)) is good  # type: ignore[arg-type]
