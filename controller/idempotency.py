"""The same key with the same request gives the same answer and does nothing again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from engine.errors import InvalidRequestError

T = TypeVar("T")
MAX_KEYS = 1000
MAX_LENGTH = 200  # characters of a key


class Idempotency:
    """Remembers the answers to the latest keys. What failed may be tried again with its key."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._answers: OrderedDict[str, tuple[bytes, object]] = OrderedDict()
        self._max_keys = max_keys
        self._lock = threading.Lock()

    def once(self, key: str, asked: bytes, run: Callable[[], T]) -> T:
        """`run`'s answer, or that of the first call with this key; without a key always `run`'s.

        A second call waits for the first. Raises InvalidRequestError when the key was used for
        something else, and what `run` raises.
        """
        if not key:
            return run()
        if len(key) > MAX_LENGTH:
            raise InvalidRequestError(
                f"the idempotency key has {len(key)} characters; expected at most {MAX_LENGTH}, "
                "such as a UUID.",
                "idempotency_key",
            )
        with self._lock:
            if key not in self._answers:
                self._answers[key] = (asked, run())
                if len(self._answers) > self._max_keys:
                    self._answers.popitem(last=False)
            before, answer = self._answers[key]
        if before != asked:
            raise InvalidRequestError(
                f"idempotency key {key!r} was used for another request; take a new one.",
                "idempotency_key",
            )
        return answer  # type: ignore[return-value]
