"""The audit log: who made which call that changes something, and what came of it.

In the format of the decision log: checksummed JSON lines, appended, put aside at a size. A record
`call` has the caller's name and role, where the call came from, the method, the request, the status
and why, and the seconds it took. Credentials are in the call's metadata, which is not recorded.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from controller.decision_log import DecisionLog
from engine.errors import InvalidRequestError

MAX_BYTES, MAX_FILES = 16 * 10**6, 16


class AuditLog:
    """Appends from any thread; `path` None keeps nothing. Raises InvalidRequestError when the file
    cannot be opened."""

    def __init__(
        self, path: Path | None, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES
    ) -> None:
        self._lock = threading.Lock()
        try:
            self._log = DecisionLog(path, {"log": "audit"}, max_bytes, max_files)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"audit log {path} cannot be written; choose another with --audit."
            ) from error

    @property
    def num_lost(self) -> int:
        """Records that could not be written."""
        return self._log.num_lost

    def append(self, told: dict[str, Any]) -> None:
        with self._lock:
            self._log.append("call", {"at": datetime.now(UTC).isoformat()} | told)

    def close(self) -> None:
        with self._lock:
            self._log.close()
