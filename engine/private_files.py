"""Files with secrets: nobody but their owner may touch them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from engine.errors import InvalidRequestError

Stamp = tuple[int, int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Changes whenever the file does; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def check_private(path: Path, what: str, flag: str) -> None:
    """Raises InvalidRequestError when there is no such file, or others than its owner, who is this
    user or root, may read or write it."""
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidRequestError(
            f"{what} {path} cannot be read: {error.strerror}; name another with {flag}."
        ) from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequestError(f"{what} {path} is no file; name another with {flag}.")
    if mode & 0o077:
        raise InvalidRequestError(
            f"{what} {path} has mode {mode:04o}, so that others than its owner may use it; "
            f"run `chmod 600 {path}`."
        )
    if found.st_uid not in (0, os.geteuid()):
        raise InvalidRequestError(
            f"{what} {path} belongs to user {found.st_uid}; it must be this user's "
            f"({os.geteuid()}) or root's."
        )
