"""A channel to a controller or an engine, with what it asks of clients: TLS, a certificate, a
token."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from engine.errors import InvalidRequestError
from engine.private_files import check_private

Metadata = tuple[tuple[str, str], ...]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may mean anything
        return False


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """Files: the authority of the server's certificate, a certificate of one's own with its key,
    and a bearer token. All None: a plain channel, as on loopback. `prefix` is that of the options
    which name them."""

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    prefix: str = ""

    @property
    def has_tls(self) -> bool:
        return self.tls_ca is not None

    def metadata(self, target: str) -> Metadata:
        """What goes with every call. Raises InvalidRequestError, also where a token would cross a
        network in plain text."""
        if self.token_file is None:
            return ()
        if not self.has_tls and not is_loopback(target.rpartition(":")[0]):
            raise InvalidRequestError(
                f"the token would go to {target} unencrypted; give --{self.prefix}tls-ca."
            )
        check_private(self.token_file, "token file", f"--{self.prefix}token-file")
        token = _read(self.token_file).decode(errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise InvalidRequestError(
                f"token file {self.token_file} must hold one token and nothing else."
            )
        return (("authorization", f"Bearer {token}"),)


NO_ACCESS = ClientAccess()


def open_channel(target: str, access: ClientAccess, options: Sequence[Any]) -> grpc.Channel:
    """Raises InvalidRequestError for files that cannot be read."""
    if (access.tls_cert is None) != (access.tls_key is None):
        raise InvalidRequestError(
            f"a client certificate needs both --{access.prefix}tls-cert and "
            f"--{access.prefix}tls-key."
        )
    if not access.has_tls:
        if access.tls_cert is not None:
            raise InvalidRequestError(f"a client certificate needs --{access.prefix}tls-ca too.")
        return grpc.insecure_channel(target, options)
    parts = (access.tls_ca, access.tls_key, access.tls_cert)
    pem = [None if path is None else _read(path) for path in parts]
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*pem), options)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from error
