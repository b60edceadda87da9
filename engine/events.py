"""The bounded event log of a cluster: cursors, gap detection, something to wait on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from engine.cluster import ClusterEvent, EventBatch, EventKind


class EventLog:
    """Keeps the last `capacity` events; seq rises by one from 0. `on_append` is told of each."""

    def __init__(
        self, capacity: int = 100_000, on_append: Callable[[ClusterEvent], None] | None = None
    ) -> None:
        self._events: deque[ClusterEvent] = deque(maxlen=capacity)
        self._next_seq = 0
        self._on_append = on_append

    def append(self, at_s: float, kind: EventKind, **what: Any) -> None:
        event = ClusterEvent(self._next_seq, at_s, kind, **what)
        self._events.append(event)
        self._next_seq += 1
        if self._on_append is not None:
            self._on_append(event)

    def copy(self) -> EventLog:
        """An independent log with the same events and nobody told of new ones."""
        other = EventLog()
        other._events, other._next_seq = self._events.copy(), self._next_seq
        return other

    def since(self, cursor: int) -> EventBatch:
        """Events with seq >= cursor. A cursor beyond the end (of an earlier life) starts over."""
        first = self._next_seq - len(self._events)
        if cursor > self._next_seq:
            cursor = 0
        start = max(cursor - first, 0)
        events = tuple(islice(self._events, start, None))
        return EventBatch(events, self._next_seq, num_lost=max(first - cursor, 0))
