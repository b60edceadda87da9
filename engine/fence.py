"""Fencing: a call that belongs to an earlier switch than the latest one heard of is refused.

Every message to a worker bears the number of the latest switch (or load) at the time it was sent.
The numbers only rise, so a worker that was stopped and wakes up late, or a call that waited behind
a long one, can't act for a switch that is over.
"""

from __future__ import annotations

from threading import Lock

from engine.errors import StaleEpochError


class Fence:
    """The highest number that this process has heard of, by whichever socket."""

    def __init__(self) -> None:
        self._highest = 0
        self._lock = Lock()

    def raise_to(self, number: int) -> int:
        """Take note of a number that came; returns it."""
        with self._lock:
            self._highest = max(self._highest, number)
        return number

    def check(self, number: int) -> None:
        """Raise StaleEpochError when a higher number has come since."""
        if number < self._highest:
            raise StaleEpochError(
                f"the call is of switch {number}, switch {self._highest} has begun since; "
                "it is refused."
            )
