"""The decision log: JSON lines from which off-line evaluation can replay every decision.

One `header` record, then per tick a `decision`, and an `outcome` when a switch ends. A record is
one write and one flush, so a killed controller leaves at most one torn line, the last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SCHEMA = 1


class DecisionLog:
    """Appends records to one file; `path` None keeps nothing."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self.append("header", {"schema": SCHEMA} | dict(header))

    def append(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"record": kind} | dict(record), allow_nan=False, default=_plain)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    """numpy arrays and scalars as JSON."""
    return value.tolist()


@dataclass(frozen=True, slots=True)
class LogContents:
    """What a log held; `skipped` says for each unreadable line its number and why."""

    records: tuple[dict[str, Any], ...]
    skipped: tuple[tuple[int, str], ...]


def read_log(path: Path) -> LogContents:
    """Read a log, also one whose last record is torn. Raises OSError when there is no file."""
    records, skipped = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                torn = "torn record" if not line.endswith("\n") else "not JSON"
                skipped.append((number, f"{torn}: {error}"))
                continue
            if isinstance(record, dict) and "record" in record:
                records.append(record)
            else:
                skipped.append((number, "not a record of this log"))
    return LogContents(tuple(records), tuple(skipped))
