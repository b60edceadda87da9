"""The same key with the same request gives the same answer and does nothing again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from engine.errors import InvalidRequestError

MAX_KEYS = 1000
MAX_LENGTH = 200  # characters of a key


class Idempotency:
    """Remembers the answers to the latest keys. What failed may be tried again with its key.

    `on_answer(key, digest of what was asked, answer)` is told of each, so that it can be
    `recall`ed by the next life of the controller.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._answers: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self.on_answer: Callable[[str, str, bytes], None] = lambda key, asked, answer: None

    def recall(self, key: str, asked: str, answer: bytes) -> None:
        self._answers[key] = (asked, answer)
        if len(self._answers) > self._max_keys:
            self._answers.popitem(last=False)

    def once(self, key: str, asked: bytes, run: Callable[[], bytes]) -> bytes:
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
        digest = hashlib.sha256(asked).hexdigest()
        with self._lock:
            if key not in self._answers:
                answer = run()
                self.recall(key, digest, answer)
                self.on_answer(key, digest, answer)
            before, answer = self._answers[key]
        if before != digest:
            raise InvalidRequestError(
                f"idempotency key {key!r} was used for another request; take a new one.",
                "idempotency_key",
            )
        return answer
