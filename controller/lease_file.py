"""A lease as a file, for controllers on one machine.

`PATH` tells holder, epoch and until when, on the machine's monotonic clock; it is read and written
with `PATH.lock` locked. For its life the holder has `PATH.EPOCH` locked. So a controller that was
killed is succeeded at once, since the kernel drops its lock, and one that hangs when its lease is
over. Locks are `flock`, which no file system shared between machines is trusted with here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError, UnavailableError


class FileLease:
    """A `LeaseStore`. Raises InvalidRequestError when there can be no file."""

    def __init__(self, path: Path, holder: str, ttl_s: float) -> None:
        self._path, self._name, self.ttl_s = path, holder, ttl_s
        self._epoch = 0
        self._life: int | None = None  # file descriptor of PATH.EPOCH
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise InvalidRequestError(
                f"lease {path} cannot be written: {error.strerror}; choose another with "
                "--lease; without it is beside the log."
            ) from error

    @property
    def where(self) -> str:
        return str(self._path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else reads or writes it meanwhile."""
        guard = os.open(self._path.with_name(f"{self._path.name}.lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield
        finally:
            os.close(guard)

    def _read(self) -> dict[str, Any]:
        try:
            told = json.loads(self._path.read_text())
            known = {"epoch": int(told["epoch"]), "until_s": float(told["until_s"])}
            return known | {"holder": str(told.get("holder", ""))}
        except (OSError, ValueError, KeyError, TypeError):
            return {"epoch": 0, "until_s": 0.0, "holder": ""}

    def _write(self, until_s: float) -> None:
        told = {"holder": self._name, "epoch": self._epoch, "until_s": until_s}
        new = self._path.with_name(f"{self._path.name}.new")
        with new.open("w") as file:
            json.dump(told, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)

    def _life_path(self, epoch: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{epoch}")

    def _is_alive(self, epoch: int) -> bool:
        """Whether the holder of that epoch still runs, or hangs."""
        try:
            life = os.open(self._life_path(epoch), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            return False
        finally:
            os.close(life)

    def acquire(self, above: int) -> int:
        try:
            with self._locked():
                told = self._read()
                if time.monotonic() < told["until_s"] and self._is_alive(told["epoch"]):
                    return 0
                self._life_path(told["epoch"]).unlink(missing_ok=True)
                self._epoch = max(told["epoch"], above) + 1
                self._life = os.open(self._life_path(self._epoch), os.O_RDWR | os.O_CREAT)
                fcntl.flock(self._life, fcntl.LOCK_EX)
                self._write(time.monotonic() + self.ttl_s)
                return self._epoch
        except OSError as error:
            raise UnavailableError(f"lease {self._path} cannot be taken: {error}.") from error

    def renew(self) -> bool:
        try:
            with self._locked():
                if self._read()["epoch"] != self._epoch:
                    return False
                self._write(time.monotonic() + self.ttl_s)
                return True
        except OSError as error:
            raise UnavailableError(f"lease {self._path} cannot be renewed: {error}.") from error

    def release(self) -> None:
        try:
            with self._locked():
                if self._read()["epoch"] == self._epoch:
                    self._write(0.0)
        except OSError as error:
            raise UnavailableError(f"lease {self._path} cannot be released: {error}.") from error
        finally:
            if self._life is not None:
                os.close(self._life)
                self._life = None

    def holder(self) -> str:
        told = self._read()
        return str(told.get("holder", "")) if self._is_alive(told["epoch"]) else ""
