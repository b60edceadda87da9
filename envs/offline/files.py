"""Results as files: written whole or not at all, and refused before an hour of work, not after."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError
from envs.experiment import git_revision


def check_writable(path: Path) -> None:
    """Raises InvalidRequestError when no file can be put there."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{folder} is no folder that can be written"
        raise InvalidRequestError(f"{path} cannot be written: {why}; give another file.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Raises InvalidRequestError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.") from error


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, allow_nan=False) + "\n")


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """With the keys of the first row as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def has_parquet() -> bool:
    """Whether pyarrow is installed."""
    return find_spec("pyarrow") is not None


def require_parquet() -> None:
    """Raises InvalidRequestError."""
    if not has_parquet():
        raise InvalidRequestError(
            "Parquet files need pyarrow: pip install 'tidewright[parquet]', or leave out --parquet."
        )


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The columns of `to_csv`, with their types."""
    from pyarrow import BufferOutputStream, Table
    from pyarrow.parquet import write_table

    sink = BufferOutputStream()
    write_table(Table.from_pylist([dict(row) for row in rows]), sink)
    return bytes(sink.getvalue().to_pybytes())


def origin(argv: Sequence[str]) -> dict[str, Any]:
    """The exact command, and the versions of all that a result depends on."""
    libraries = ("tidewright", "numpy", "scipy", "numba", "torch", "highspy")
    return {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "git_revision": git_revision(),
        "versions": {name: version(name) for name in libraries}
        | {"python": platform.python_version()},
    }


def say(enabled: bool) -> Any:
    """A report on stderr of what has begun, or none."""

    def report(what: str) -> None:
        if enabled:
            print(what, file=sys.stderr, flush=True)

    return report
