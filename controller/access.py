"""The access file: who has which role, by the hash of a bearer token or by a client certificate.

One line per right: `NAME ROLE sha256:HEX` or `NAME ROLE certificate:COMMON_NAME`, where the role is
read, operate or admin. A name may have several, as while a token is replaced. Tokens themselves are
nowhere but with their owners.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from controller.roles import Role, parse_role
from engine.errors import InvalidRequestError
from engine.private_files import RereadFile, check_private

TOKEN_BYTES = 32  # of randomness, so that a fast hash is enough
NAME = re.compile(r"[\w.@-]{1,64}")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Right:
    """One line of the file."""

    name: str
    role: Role
    token_hash: str = ""
    certificate: str = ""


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def parse_rights(text: str, where: Path) -> tuple[Right, ...]:
    """Raises InvalidRequestError with the number of the line, never with what it holds."""
    rights = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        right = _right(words)
        if right is None:
            raise InvalidRequestError(
                f"line {number} of the access file {where} is not understood; expected NAME, then "
                "read, operate or admin, then sha256: with 64 hexadecimal digits or certificate: "
                "with a common name. `python -m controller token` writes such lines."
            )
        rights.append(right)
    return tuple(rights)


def _right(words: list[str]) -> Right | None:
    if len(words) != 3 or not NAME.fullmatch(words[0]):
        return None
    role, (kind, _, value) = parse_role(words[1]), words[2].partition(":")
    if role is None:
        return None
    if kind == "sha256" and HASH.fullmatch(value):
        return Right(words[0], role, token_hash=value)
    return Right(words[0], role, certificate=value) if kind == "certificate" and value else None


class AccessFile:
    """Reads the file again when it has changed. What cannot be read leaves the last good rights in
    force, with a line in the log; a file that is gone leaves nobody any.

    Raises InvalidRequestError at the start, also when others than its owner may read it.
    """

    def __init__(self, path: Path) -> None:
        self._file: RereadFile[tuple[Right, ...]] = RereadFile(path, "access file", _read, ())

    @property
    def num_failed_reloads(self) -> int:
        return self._file.num_failed

    def find(self, token: str | None, certificates: Collection[str]) -> Right | None:
        """Of the token, else of a verified certificate's names. Looks at every right, whichever
        fits, so that the time taken tells nothing."""
        given = hash_of(token) if token is not None else ""
        found = None
        for right in self._file.present():
            if token is None:
                is_it = bool(right.certificate) and right.certificate in certificates
            else:
                is_it = hmac.compare_digest(right.token_hash, given)
            found = right if is_it and (found is None or right.role > found.role) else found
        return found


def _read(path: Path) -> tuple[Right, ...]:
    check_private(path, "access file", "--access")
    try:
        return parse_rights(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"access file {path} cannot be read: {error}.") from error


def issue_token(path: Path, name: str, role: str) -> str:
    """A new token, whose hash is added to the file. Raises InvalidRequestError."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    line = f"{name} {role} sha256:{hash_of(token)}\n"
    if _right(line.split()) is None:
        raise InvalidRequestError(
            f"{name!r} with role {role!r} is no right; expected a name of letters, digits and "
            "._@- up to 64, and read, operate or admin."
        )
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InvalidRequestError(
            f"access file {path} cannot be written: {error.strerror}."
        ) from error
    with os.fdopen(file, "a+") as opened:
        check_private(path, "access file", "--access")
        opened.seek(0)
        before = opened.read()
        opened.write(line if not before or before.endswith("\n") else f"\n{line}")
    return token
