"""The decision log: JSON lines from which off-line evaluation can replay every decision.

Why JSON lines and not SQLite: there is one writer that only appends, readers take whole files in
order, and a record that is one line can be read by any tool, also from a log that was cut off. A
database would add locking, a second file that must not be lost, and nothing that is needed.

Each line is one JSON object that ends in `"crc32"`, of the bytes of the line before it. A record is
one write, synchronised with the disk, so a killed controller or a lost machine leaves at most one
torn line, the last; the next life starts on a line of its own. `n` counts the records of a life (a
header has that of the record after it), so a reader knows of records that are gone. At `max_bytes`
the file is put aside as `.1`, what was `.1` becomes `.2`, and so on up to `max_files`; every file
starts with a header. What the records hold is in `controller.log_records`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import InvalidRequestError

logger = logging.getLogger(__name__)
SCHEMA = 2
READABLE = (1, 2)  # 1 has no checksums and counts no records
MAX_BYTES, MAX_FILES = 64 << 20, 16
CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')


class DecisionLog:
    """Appends records to one file; `path` None keeps nothing.

    Raises InvalidRequestError when the file cannot be opened. Later, what cannot be written is
    counted in `num_lost`, and steering goes on.
    """

    def __init__(
        self,
        path: Path | None,
        header: Mapping[str, Any],
        max_bytes: int = MAX_BYTES,
        max_files: int = MAX_FILES,
        sync: bool = True,
    ) -> None:
        if max_bytes < 1 or max_files < 1:
            raise InvalidRequestError(
                f"a decision log needs max_bytes and max_files of 1 or more, got {max_bytes} and "
                f"{max_files}."
            )
        self._path, self._sync = path, sync
        self._max_bytes, self._max_files = max_bytes, max_files
        self._header = {"schema": SCHEMA, "life": secrets.token_hex(8)} | dict(header)
        self._file: BinaryIO | None = None
        self._next, self._part = 0, 0
        self.num_lost = 0
        self.may_write: Callable[[], bool] = lambda: True  # False: the log may be another's by now
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise InvalidRequestError(
                    f"decision log {path} cannot be written: {error.strerror}; choose another with "
                    "--log."
                ) from error

    @property
    def life(self) -> str:
        """Names this run of the controller, also in resume tokens."""
        return str(self._header["life"])

    def append(self, kind: str, record: Mapping[str, Any]) -> None:
        """Raises ValueError for what is no JSON, such as NaN; nothing for a full disk."""
        if self._path is None or not self.may_write():
            return
        line = encode(kind, self._next, record)
        try:
            if self._file is None:
                self._open(self._path)
            elif self._file.tell() + len(line) > self._max_bytes:
                self._rotate(self._path)
            self._write(line)
        except OSError as error:
            self.num_lost += 1
            logger.error("record %d of decision log %s is lost: %s", self._next, self._path, error)
            self.close()  # the next record tries again, on a line of its own
        self._next += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> None:
        """For appending; a torn last line of an earlier life is ended first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = path.open("a+b", buffering=0)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        self._part += 1
        self._write(encode("header", self._next, self._header | {"part": self._part}))

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        if self._file.write(line) != len(line):
            raise OSError("the disk took only a part of the record")
        if self._sync:
            os.fsync(self._file.fileno())

    def _rotate(self, path: Path) -> None:
        self.close()
        for number in range(self._max_files - 1, 0, -1):
            older = _numbered(path, number)
            newer = _numbered(path, number - 1) if number > 1 else path
            if newer.exists():
                os.replace(newer, older)
        if self._max_files == 1:
            path.unlink()
        self._open(path)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def encode(kind: str, n: int, record: Mapping[str, Any]) -> bytes:
    """One line with its checksum. Raises ValueError for what is no JSON, such as NaN."""
    told = {"record": kind, "n": n} | dict(record)
    body = json.dumps(told, allow_nan=False, default=_plain).encode()[:-1]
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def _plain(value: Any) -> Any:
    """numpy arrays and scalars as JSON."""
    return value.tolist()


# ------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line that is no record, or records that are not there."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class LogContents:
    """What a log held, oldest first, and what of it could not be used."""

    records: tuple[dict[str, Any], ...]
    skipped: tuple[Skipped, ...]


def log_files(path: Path) -> list[Path]:
    """The files of a log, oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)$")
    found = [(int(m[1]), p) for p in path.parent.iterdir() if (m := pattern.match(p.name))]
    older = [p for _, p in sorted(found, reverse=True)]
    return [*older, path] if path.exists() or not older else older


def read_log(path: Path) -> LogContents:
    """Read a log with what was put aside of it, also one whose last record is torn.

    Raises OSError when there is no file.
    """
    reader = LogReader()
    for file in log_files(path):
        reader.read(file)
    return LogContents(tuple(reader.records), tuple(reader.skipped))


def read_tail(path: Path, max_bytes: int) -> tuple[dict[str, Any], ...]:
    """The last records of a log, about so many bytes of them, oldest first; none without a file."""
    reader, left = LogReader(), max_bytes
    parts: list[tuple[Path, int]] = []  # newest first: file, where to begin
    for file in reversed(log_files(path) if path.parent.is_dir() else []):
        if file.exists() and left > 0:
            size = file.stat().st_size
            parts.append((file, max(0, size - left)))
            left -= size
    for file, start in reversed(parts):
        reader.read(file, start)
    return tuple(reader.records)


class LogReader:
    """Takes lines in order; knows the life and the schema that it is in the middle of."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.skipped: list[Skipped] = []
        self._schema, self._life, self._due = READABLE[0], "", 0

    def read(self, path: Path, start: int = 0) -> None:
        """From the first line that begins after so many bytes."""
        if start:
            self._schema = SCHEMA
        for number, line in enumerate(_lines(path, start), start=1):
            self.take(path.name, number, line)

    def take(self, file: str, number: int, line: bytes) -> None:
        record, problem = self._record(line)
        if record is not None:
            problem = self._follow(record)
            self.records.append(record)
        if problem:
            self.skipped.append(Skipped(file, number, problem))

    def _record(self, line: bytes) -> tuple[dict[str, Any] | None, str]:
        """What the line says, or why it is not used."""
        text = line.removesuffix(b"\n")
        checksum = CHECKSUM.search(text)
        if checksum and int(checksum[1], 16) != zlib.crc32(text[: checksum.start()]):
            return None, "checksum does not fit: the record was changed"
        try:
            record = json.loads(text)
        except ValueError as error:
            torn = "not JSON" if line.endswith(b"\n") else "torn record"
            return None, f"{torn}: {error}"
        if not isinstance(record, dict) or "record" not in record:
            return None, "not a record of this log"
        if record["record"] == "header":
            self._schema = record.get("schema", 0)
        if self._schema not in READABLE:
            return None, f"schema {self._schema}; this version reads {READABLE}"
        if self._schema >= 2 and not checksum:
            return None, "no checksum: the record was written by something else"
        return record, ""

    def _follow(self, record: Mapping[str, Any]) -> str:
        """Says how many records of this life are missing before this one."""
        if self._schema < 2:
            return ""
        n, life = record.get("n", self._due), record.get("life", self._life)
        missing = n - self._due if life == self._life else 0
        self._life, self._due = life, n + (record["record"] != "header")
        return f"records missing before this one: {missing}" if missing > 0 else ""


def _lines(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        yield from file
