"""Readers of trace files, streaming: normalised CSV, Azure 2023 and 2024, BurstGPT, Mooncake.

The first line says which format it is; columns are found by name, gzip by its first bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
from array import array
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from engine.cluster import Request
from engine.errors import InvalidRequestError
from envs.workload import Trace

__all__ = ["Trace", "TraceReader", "load_trace", "read_trace"]

GZIP_MAGIC = b"\x1f\x8b"
AZURE_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d):([0-5]\d(?:\.\d{1,9})?)(Z|[+-]\d\d:\d\d)?", re.ASCII
)
SECONDS_EXPECTED = "seconds, a number not below the row before"
MILLISECONDS_EXPECTED = "milliseconds, a number not below the row before"
TIME_EXPECTED = "a time such as 2023-11-16 18:17:03.9799600, not before the row before"
TOKENS_EXPECTED = "a whole number of tokens, at least 1"


@lru_cache(maxsize=4)
def _minute_s(minute: str, offset: str) -> float:
    return datetime.fromisoformat(f"{minute}:00{offset}").timestamp()


def _azure_seconds(text: str) -> float:
    """Seconds since 1970 of '2023-11-16 18:17:03.9799600'; fraction and offset may be absent."""
    match = AZURE_TIME.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return _minute_s(match[1], match[3] or "+00:00") + float(match[2])


class _Format(NamedTuple):
    columns: tuple[str, str, str]  # time, prompt tokens, output tokens
    parse_time: Callable[[str], float]  # to seconds
    time_expected: str
    starts_at_zero: bool  # times are already relative to the start of the file
    has_failures: bool = False  # marked by 0 output tokens

    def values(self, fields: tuple[str, str, str], last_s: float) -> tuple[float, int, int]:
        """(seconds, prompt tokens, output tokens), 0 of output for a failure. ValueError."""
        at_s, prompt, output = self.parse_time(fields[0]), int(fields[1]), int(fields[2])
        if not last_s <= at_s < math.inf:
            raise ValueError(fields[0])
        failed = self.has_failures and output == 0 and prompt >= 0
        if not failed and (prompt < 1 or output < 1):
            raise ValueError(fields)
        return at_s, prompt, output

    def wrong_column(self, fields: tuple[str, str, str], last_s: float) -> tuple[int, str]:
        """The first column that `values` refuses, and what it expected there."""
        trials = ((fields[0], "1", "1"), (fields[0], fields[1], "1"))
        for column, expected in enumerate((self.time_expected, TOKENS_EXPECTED)):
            try:
                self.values(trials[column], last_s)
            except ValueError:
                return column, expected
        return 2, TOKENS_EXPECTED + (", or 0 for a failed request" if self.has_failures else "")


def _milliseconds(text: str) -> float:
    return float(text) / 1000.0


CSV_FORMATS = (
    _Format(("timestamp_s", "input_tokens", "output_tokens"), float, SECONDS_EXPECTED, True),
    _Format(
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure_seconds, TIME_EXPECTED, False
    ),
    _Format(
        ("Timestamp", "Request tokens", "Response tokens"), float, SECONDS_EXPECTED, False, True
    ),
)
MOONCAKE = _Format(
    ("timestamp", "input_length", "output_length"), _milliseconds, MILLISECONDS_EXPECTED, True
)


class _MooncakeLine(msgspec.Struct):
    """Values as they are written; the other fields of a line are skipped."""

    timestamp: msgspec.Raw
    input_length: msgspec.Raw
    output_length: msgspec.Raw


Fields = tuple[int, tuple[str, str, str]]  # line number, and a row's columns as text


def _open_text(path: Path) -> io.TextIOBase:
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
        open_text = gzip.open if is_gzip else open
        opened = open_text(path, "rt", newline="", encoding="utf-8-sig")
    except OSError as error:
        raise InvalidRequestError(
            f"trace {path} cannot be read ({error.strerror}); give the path of a CSV or JSON lines "
            "file, plain or gzip'd."
        ) from error
    assert isinstance(opened, io.TextIOBase)
    return opened


class TraceReader(Iterator[Request]):
    """The requests of a file one after another, ids r0, r1, ...; see `read_trace`.

    `num_failed` counts the failed requests left out so far.
    """

    def __init__(
        self,
        path: str | Path,
        seconds: tuple[float, float] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        if seconds is not None and rows is not None:
            raise InvalidRequestError("a trace is cut by seconds or by rows; give one of them.")
        for name, part in (("seconds", seconds), ("rows", rows)):
            if part is not None and not 0 <= part[0] < part[1]:
                raise InvalidRequestError(
                    f"{name} of a trace are (first, stop) with 0 <= first < stop, got {part}."
                )
        self.num_failed = 0
        self.last_s = 0.0  # of the last row looked at, from the start of the file
        self._path, self._seconds, self._rows = Path(path), seconds, rows
        self._line, self._index = 1, 0
        self._parts = self.parts()

    def __next__(self) -> Request:
        self._index += 1
        return Request(f"r{self._index - 1}", *next(self._parts))

    def parts(self) -> Iterator[tuple[float, int, int]]:
        """(arrival_s, prompt tokens, output tokens) of the requests asked for."""
        first_s, stop_s = self._seconds or (0.0, math.inf)
        first, stop = self._rows or (0, None)
        origin_s = first_s
        for row, (at_s, prompt, output) in enumerate(self._everything()):
            if at_s >= stop_s or row == stop:
                return
            if row == first and first > 0:
                origin_s = at_s
            if at_s >= first_s and row >= first:
                yield at_s - origin_s, prompt, output

    def _everything(self) -> Iterator[tuple[float, int, int]]:
        with _open_text(self._path) as text:
            try:
                first = text.readline()
                if first.lstrip().startswith("{"):
                    known, fields = MOONCAKE, self._json_fields(first, text)
                else:
                    known, fields = self._csv_fields(first, text)
                yield from self._succeeded(known, fields)
            except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
                raise InvalidRequestError(
                    f"trace {self._path}, after line {self._line}: not readable as text ({error}); "
                    "the file is damaged or of another kind."
                ) from error

    def _succeeded(
        self, known: _Format, rows: Iterator[Fields]
    ) -> Iterator[tuple[float, int, int]]:
        origin_s, last_s = (0.0, 0.0) if known.starts_at_zero else (None, -math.inf)
        for line, fields in rows:
            self._line = line
            try:
                last_s, prompt, output = known.values(fields, last_s)
            except ValueError:
                self._refuse(line, known, fields, last_s)
            if origin_s is None:
                origin_s = last_s
            self.last_s = last_s - origin_s
            if output:
                yield self.last_s, prompt, output
            else:
                self.num_failed += 1

    def _refuse(
        self, line: int, known: _Format, fields: tuple[str, str, str], last_s: float
    ) -> None:
        column, expected = known.wrong_column(fields, last_s)
        raise InvalidRequestError(
            f"trace {self._path}, line {line}, column {known.columns[column]}: got "
            f"{fields[column]!r}, expected {expected}; correct or remove the line."
        ) from None

    # -- formats ------------------------------------------------------------------------

    def _csv_fields(self, first: str, text: io.TextIOBase) -> tuple[_Format, Iterator[Fields]]:
        header = next(csv.reader([first]), [])
        for known in CSV_FORMATS:
            if set(known.columns) <= set(header):
                return known, self._csv_rows(header, known, text)
        expected = " or ".join(repr(",".join(f.columns)) for f in CSV_FORMATS)
        raise InvalidRequestError(
            f"trace {self._path}, line 1: the header is {','.join(header)!r}, expected "
            f"{expected}, or JSON lines with {', '.join(MOONCAKE.columns)}; convert the file or "
            "correct its first line."
        )

    def _csv_rows(self, header: list[str], known: _Format, text: io.TextIOBase) -> Iterator[Fields]:
        lines, count = csv.reader(text), len(header)
        pick = itemgetter(*(header.index(column) for column in known.columns))
        for fields in lines:
            if len(fields) != count:
                raise InvalidRequestError(
                    f"trace {self._path}, line {lines.line_num + 1}: {len(fields)} columns "
                    f"({','.join(fields)!r}), expected {count} ({', '.join(header)}); correct or "
                    "remove the line."
                )
            yield lines.line_num + 1, pick(fields)

    def _json_fields(self, first: str, text: io.TextIOBase) -> Iterator[Fields]:
        decode = msgspec.json.Decoder(_MooncakeLine).decode
        line, source = 1, first
        while source:
            try:
                found = decode(source)
            except msgspec.DecodeError as error:
                raise InvalidRequestError(
                    f"trace {self._path}, line {line}: got {source.rstrip()[:80]!r} ({error}), "
                    f"expected a JSON object with {', '.join(MOONCAKE.columns)}; correct or remove "
                    "the line."
                ) from None
            values = (found.timestamp, found.input_length, found.output_length)
            yield line, tuple(bytes(raw).decode() for raw in values)  # type: ignore[misc]
            line, source = line + 1, text.readline()


def read_trace(
    path: str | Path,
    seconds: tuple[float, float] | None = None,
    rows: tuple[int, int] | None = None,
) -> TraceReader:
    """Requests one after another, without keeping them.

    seconds: (first, stop) of the file; arrivals then count from `first`.
    rows: (first, stop) of its requests, failed ones not counted; arrivals then count from the
    first of them. Reading ends at `stop`. Raises InvalidRequestError as rows are read.
    """
    return TraceReader(path, seconds, rows)


def load_trace(
    path: str | Path,
    seconds: tuple[float, float] | None = None,
    rows: tuple[int, int] | None = None,
) -> Trace:
    """The same in memory, 24 bytes a request. Raises InvalidRequestError, also for no requests."""
    reader = TraceReader(path, seconds, rows)
    arrival_s, prompt, output = array("d"), array("q"), array("q")
    for at_s, prompt_tokens, output_tokens in reader.parts():
        arrival_s.append(at_s)
        prompt.append(prompt_tokens)
        output.append(output_tokens)
    if not arrival_s:
        part = f" in seconds {seconds}" if seconds else f" in rows {rows}" if rows else ""
        raise InvalidRequestError(
            f"trace {path} has no requests{part} ({reader.num_failed} failed ones are left out); "
            "give a file or a part of it with some."
        )
    span_s = min(reader.last_s, seconds[1]) - seconds[0] if seconds else -1.0
    return Trace(
        np.frombuffer(arrival_s, np.float64),
        np.frombuffer(prompt, np.int64),
        np.frombuffer(output, np.int64),
        span_s,
        reader.num_failed,
    )
