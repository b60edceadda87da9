"""The certificate of a server, read again when its files change: no restart, no connection is cut.

A new certificate counts from the next handshake on. Files that do not fit together, as while they
are being replaced, leave the last good ones in force.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from engine.errors import InvalidRequestError
from engine.private_files import Stamp, check_private, stamp_of

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; with `client_ca`, clients must have a certificate of that authority."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def stamps(self) -> tuple[Stamp | None, ...]:
        paths = (self.cert, self.key, self.client_ca)
        return tuple(None if path is None else stamp_of(path) for path in paths)


def tls_files(
    cert: Path | None, key: Path | None, client_ca: Path | None = None
) -> TlsFiles | None:
    """None without any. Raises InvalidRequestError for half of what it takes."""
    if cert is not None and key is not None:
        return TlsFiles(cert, key, client_ca)
    if any((cert, key, client_ca)):
        raise InvalidRequestError(
            "TLS needs both --tls-cert and --tls-key; an authority of clients goes with them."
        )
    return None


class _Reloaded(Generic[Loaded]):
    """What `load` makes of the files; made anew when they change. Raises InvalidRequestError at the
    start."""

    def __init__(self, files: TlsFiles, load: Callable[[TlsFiles], Loaded]) -> None:
        self._files, self._load, self._lock = files, load, threading.Lock()
        self._stamps = files.stamps
        self.current = load(files)
        self.num_reloads, self.num_failed_reloads = 0, 0

    def changed(self) -> Loaded | None:
        """What the files hold now; None when that is not new, or no use."""
        with self._lock:
            stamps = self._files.stamps
            if stamps == self._stamps:
                return None
            try:
                found = self._load(self._files)
            except InvalidRequestError as error:
                self.num_failed_reloads += 1
                logger.error("the certificate read before stays in force: %s", error)
                return None
            finally:
                self._stamps = stamps
            self.num_reloads += 1
            self.current = found
            logger.info("the certificate %s was read again", self._files.cert)
            return found


class Certificates:
    """What new connections are met with, over gRPC and HTTP. Raises InvalidRequestError at the
    start."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._pair, self._contexts = _Reloaded(files, _load), _Reloaded(files, _context_of)

    @property
    def num_reloads(self) -> int:
        return self._pair.num_reloads

    @property
    def num_failed_reloads(self) -> int:
        return self._pair.num_failed_reloads

    def credentials(self) -> grpc.ServerCredentials:
        """gRPC asks before each handshake, from a thread of its own."""
        return grpc.dynamic_ssl_server_credentials(
            self._pair.current, self._pair.changed, self.files.client_ca is not None
        )

    def context(self) -> ssl.SSLContext:
        """For any other server: each handshake is handed on to a context of the files as they
        are."""
        context = self._contexts.current

        def meet(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            self._contexts.changed()
            connection.context = self._contexts.current

        context.sni_callback = meet  # asked for clients that name no server, too
        return context


def _load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    check_private(files.key, "private key", "--tls-key")
    try:
        _read(files)  # gRPC itself would say what is wrong only when a client connects
        authorities = None if files.client_ca is None else files.client_ca.read_bytes()
        pair = (files.key.read_bytes(), files.cert.read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequestError(
            f"{files.cert}, {files.key}"
            + (f" and {files.client_ca}" if files.client_ca else "")
            + f" are no certificate with its key in PEM: {error}."
        ) from error
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def _context_of(files: TlsFiles) -> ssl.SSLContext:
    """Raises InvalidRequestError."""
    _load(files)
    context = _read(files)
    context.options |= ssl.OP_NO_TICKET  # no session outlives the authority that it was checked by
    context.num_tickets = 0
    return context


def _read(files: TlsFiles) -> ssl.SSLContext:
    """Raises OSError and ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key, password=_no_password)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    """Instead of a prompt on the terminal: a key with a password is refused."""
    return ""
