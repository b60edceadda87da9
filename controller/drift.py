"""An engine that was switched by somebody else: noticed, reported, not fought. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from engine.cluster import ClusterSnapshot, SwitchPhase

MAX_KEPT = 1000  # decision ids
MAX_SAVED = 20  # of them, the latest
COMMITTED = (SwitchPhase.COMMIT, SwitchPhase.RELEASE, SwitchPhase.DONE)


@dataclass(frozen=True, slots=True)
class DriftEvent:
    """The deployment changed, and not by this controller."""

    at_s: float
    from_key: str
    to_key: str
    who: str  # "by hand", "by decision ..." of another controller, or "by the engine"

    @property
    def is_wanted(self) -> bool:
        """Somebody meant it; the engine changes by itself only to go on serving."""
        return self.who != "by the engine"


class DriftWatch:
    """Knows the decisions of this controller; every other switch is somebody else's."""

    def __init__(self) -> None:
        self._ours: dict[str, None] = {}
        self.reset()

    def reset(self) -> None:
        """Of an engine that was started again nothing is expected; decisions stay known."""
        self._epoch, self._key, self._seen = -1, "", ""

    def expect(self, decision_id: str) -> None:
        """A switch of that decision is about to be handed to the engine."""
        self._ours[decision_id] = None
        if len(self._ours) > MAX_KEPT:
            del self._ours[next(iter(self._ours))]

    def saved(self) -> dict[str, Any]:
        latest = list(islice(reversed(self._ours), MAX_SAVED))[::-1]
        return {"epoch": self._epoch, "key": self._key, "seen": self._seen, "ours": latest}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._epoch, self._key = int(saved["epoch"]), str(saved["key"])
        self._seen, self._ours = str(saved["seen"]), dict.fromkeys(map(str, saved["ours"]))

    def observe(self, snapshot: ClusterSnapshot) -> DriftEvent | None:
        """The first snapshot is taken as it is."""
        epoch, key, ticket = self._epoch, self._key, snapshot.switch
        self._epoch, self._key = snapshot.epoch, snapshot.deployment.key
        if epoch >= 0 and (epoch, key) == (self._epoch, self._key):
            return None
        cause = ticket if ticket is not None and ticket.phase in COMMITTED else None
        if cause is not None and cause.ticket_id == self._seen:
            cause = None  # of an earlier change
        self._seen = cause.ticket_id if cause is not None else self._seen
        if epoch < 0:
            return None
        if cause is None:
            who = "by the engine"
        elif cause.decision_id in self._ours:
            return None
        else:
            who = f"by decision {cause.decision_id}" if cause.decision_id else "by hand"
        return DriftEvent(snapshot.now_s, key, snapshot.deployment.key, who)
