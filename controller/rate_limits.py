"""How often one caller may call: a token bucket each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

MAX_CALLERS = 10_000  # that are remembered; the longest unused is forgotten


@dataclass(slots=True)
class _Bucket:
    level: float
    at_s: float


class RateLimits:
    """`per_s` calls per second of each caller, `burst` at once; per_s 0: no limit."""

    def __init__(self, per_s: float, burst: int, max_callers: int = MAX_CALLERS) -> None:
        self._per_s, self._burst, self._max = per_s, float(burst), max_callers
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str, now_s: float) -> float:
        """0 when the caller may go on, else the seconds after which it may."""
        if self._per_s <= 0:
            return 0.0
        with self._lock:
            bucket = self._buckets.get(caller)
            if bucket is None:
                bucket = self._buckets[caller] = _Bucket(self._burst, now_s)
                if len(self._buckets) > self._max:
                    self._buckets.popitem(last=False)
            self._buckets.move_to_end(caller)
            gained = max(0.0, now_s - bucket.at_s) * self._per_s
            bucket.level, bucket.at_s = min(self._burst, bucket.level + gained), now_s
            if bucket.level < 1.0:
                return (1.0 - bucket.level) / self._per_s
            bucket.level -= 1.0
            return 0.0
