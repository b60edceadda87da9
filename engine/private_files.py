"""Files with secrets: nobody but their owner may touch them."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import InvalidRequestError

logger = logging.getLogger(__name__)
Content = TypeVar("Content")
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


class RereadFile(Generic[Content]):
    """What a file says of who is admitted, read again when it has changed. What cannot be read
    leaves the last good content in force; a file that is gone leaves `nobody`.

    `read` raises InvalidRequestError, at the start to the caller.
    """

    def __init__(
        self, path: Path, what: str, read: Callable[[Path], Content], nobody: Content
    ) -> None:
        self._path, self._what, self._read, self._nobody = path, what, read, nobody
        self._lock, self.num_failed = threading.Lock(), 0
        self._stamp = stamp_of(path)
        self._content = read(path)

    def present(self) -> Content:
        with self._lock:
            stamp = stamp_of(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._content

    def _reload(self) -> None:
        if self._stamp is None:
            logger.error("%s %s is gone: nobody is admitted", self._what, self._path)
            self._content = self._nobody
            return
        try:
            self._content = self._read(self._path)
            logger.info("%s %s was read again", self._what, self._path)
        except InvalidRequestError as error:
            self.num_failed += 1
            logger.error("lines of the %s read before stay in force: %s", self._what, error)
