"""Readers of trace files: the normalised CSV and the raw Azure 2023 CSV, gzip'd or plain."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.cluster import Request
from engine.errors import InvalidRequestError
from envs.workload import Trace

__all__ = ["Trace", "load_trace", "read_trace"]

GZIP_MAGIC = b"\x1f\x8b"
SECONDS_EXPECTED = "seconds, a number not below the row before"
TIME_EXPECTED = "a time such as 2023-11-16 18:17:03.9799600, not before the row before"
TOKENS_EXPECTED = "a whole number of tokens, at least 1"


def _seconds(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value


def _azure_seconds(text: str) -> float:
    """Seconds since 1970 of '2023-11-16 18:17:03.9799600', up to 9 digits, offset allowed."""
    whole, rest = text[:19], text[19:]
    fraction, sign, offset = rest, "", ""
    for mark in "+-":
        if mark in rest:
            fraction, sign, offset = *rest.partition(mark)[:2], rest.partition(mark)[2]
    moment = datetime.fromisoformat(whole + (sign + offset if offset else "+00:00"))
    return moment.astimezone(UTC).timestamp() + float(fraction or 0)


def _tokens(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


class _Format(NamedTuple):
    header: tuple[str, str, str]
    parse_time: Callable[[str], float]
    time_expected: str
    starts_at_zero: bool  # times are already relative to the start of the file


FORMATS = (
    _Format(("timestamp_s", "input_tokens", "output_tokens"), _seconds, SECONDS_EXPECTED, True),
    _Format(
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure_seconds, TIME_EXPECTED, False
    ),
)
Row = tuple[float, int, int]


def _open_text(path: Path) -> io.TextIOBase:
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
        open_text = gzip.open if is_gzip else open
        opened = open_text(path, "rt", newline="")
    except OSError as error:
        raise InvalidRequestError(
            f"trace {path} cannot be read ({error.strerror}); give the path of a CSV file, plain "
            "or gzip'd."
        ) from error
    assert isinstance(opened, io.TextIOBase)
    return opened


def _format_of(path: Path, header: list[str]) -> _Format:
    for known in FORMATS:
        if tuple(header) == known.header:
            return known
    expected = " or ".join(repr(",".join(f.header)) for f in FORMATS)
    raise InvalidRequestError(
        f"trace {path}, line 1: the header is {','.join(header)!r}, expected {expected}; convert "
        "the file or correct its first line."
    )


def _parse_row(path: Path, line: int, fields: list[str], known: _Format, last_s: float) -> Row:
    if len(fields) != 3:
        raise InvalidRequestError(
            f"trace {path}, line {line}: {len(fields)} columns ({','.join(fields)!r}), expected 3 "
            f"({', '.join(known.header)}); correct or remove the line."
        )
    parsers = (known.parse_time, _tokens, _tokens)
    expected = (known.time_expected, TOKENS_EXPECTED, TOKENS_EXPECTED)
    values: list[float] = []
    for column, text, parse, what in zip(known.header, fields, parsers, expected, strict=True):
        try:
            value = parse(text)
            if not values and value < last_s:
                raise ValueError(text)
        except ValueError:
            raise InvalidRequestError(
                f"trace {path}, line {line}, column {column}: got {text!r}, expected {what}; "
                "correct or remove the line."
            ) from None
        values.append(value)
    return values[0], int(values[1]), int(values[2])


def _rows(path: Path) -> Iterator[Row]:
    """(arrival_s from the start, prompt tokens, output tokens) of each row, as it is read."""
    with _open_text(path) as text:
        lines = csv.reader(text)
        try:
            known = _format_of(path, next(lines, []))
            origin_s, last_s = 0.0, -np.inf if not known.starts_at_zero else 0.0
            for fields in lines:
                row = _parse_row(path, lines.line_num, fields, known, last_s)
                if not known.starts_at_zero and last_s == -np.inf:
                    origin_s = row[0]
                last_s = row[0]
                yield row[0] - origin_s, row[1], row[2]
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise InvalidRequestError(
                f"trace {path}, after line {lines.line_num}: not readable as CSV text ({error}); "
                "the file is damaged or of another kind."
            ) from error


def read_trace(path: str | Path) -> Iterator[Request]:
    """Requests one after another, ids r0, r1, ... Raises InvalidRequestError as rows are read."""
    for index, row in enumerate(_rows(Path(path))):
        yield Request(f"r{index}", *row)


def load_trace(path: str | Path) -> Trace:
    """The whole file in memory. Raises InvalidRequestError, also for a file without requests."""
    table = np.array(list(_rows(Path(path))), dtype=np.float64).reshape(-1, 3)
    if not len(table):
        raise InvalidRequestError(f"trace {path} has no requests; give a file with some.")
    lengths = table[:, 1:].astype(np.int64)
    return Trace(table[:, 0].copy(), lengths[:, 0].copy(), lengths[:, 1].copy())
