"""The log behind `Cluster.events`: what a reader that came too late is told."""

from __future__ import annotations

from engine.cluster import EventKind
from engine.events import EventLog


def filled(capacity: int, number: int) -> EventLog:
    log = EventLog(capacity)
    for i in range(number):
        log.append(float(i), EventKind.DEVICE_LOST, device=i)
    return log


def test_gap_is_counted() -> None:
    batch = filled(capacity=4, number=10).since(3)
    assert [e.seq for e in batch.events] == [6, 7, 8, 9]
    assert (batch.num_lost, batch.next_cursor) == (3, 10)  # 3, 4 and 5 are gone


def test_no_gap_at_the_edge_and_at_the_end() -> None:
    log = filled(capacity=4, number=10)
    assert [e.seq for e in log.since(6).events] == [6, 7, 8, 9]
    assert log.since(6).num_lost == 0
    assert (log.since(10).events, log.since(10).num_lost) == ((), 0)


def test_copy_keeps_bound_and_goes_its_own_way() -> None:
    log = filled(capacity=4, number=10)
    twin = log.copy()
    twin.append(10.0, EventKind.DEVICE_LOST, device=10)
    assert [e.seq for e in twin.since(0).events] == [7, 8, 9, 10]
    assert log.since(0).next_cursor == 10
