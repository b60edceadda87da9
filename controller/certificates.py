"""The server's certificate, read again when its files change: no restart, no connection is cut.

A new certificate counts from the next handshake on. Files that do not fit together, as while they
are being replaced, leave the last good ones in force.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from controller.private_files import Stamp, check_private, stamp_of
from engine.errors import InvalidRequestError

logger = logging.getLogger(__name__)


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


class Certificates:
    """What new connections are met with. Raises InvalidRequestError at the start."""

    def __init__(self, files: TlsFiles) -> None:
        self.files, self._lock = files, threading.Lock()
        self._stamps = files.stamps
        self._first = _load(files)
        self.num_reloads, self.num_failed_reloads = 0, 0

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._first, self.changed, self.files.client_ca is not None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files hold now; None when that is not new, or no use. gRPC asks before each
        handshake, from a thread of its own."""
        with self._lock:
            stamps = self.files.stamps
            if stamps == self._stamps:
                return None
            try:
                found = _load(self.files)
            except InvalidRequestError as error:
                self.num_failed_reloads += 1
                logger.error("the certificate read before stays in force: %s", error)
                return None
            finally:
                self._stamps = stamps
            self.num_reloads += 1
            logger.info("the certificate %s was read again", self.files.cert)
            return found


def _load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    check_private(files.key, "private key", "--tls-key")
    try:
        _check_pair(files)
        authorities = None if files.client_ca is None else files.client_ca.read_bytes()
        pair = (files.key.read_bytes(), files.cert.read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequestError(
            f"{files.cert}, {files.key}"
            + (f" and {files.client_ca}" if files.client_ca else "")
            + f" are no certificate with its key in PEM: {error}."
        ) from error
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def _check_pair(files: TlsFiles) -> None:
    """gRPC itself would say what is wrong only when a client connects."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key, password=_no_password)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)


def _no_password() -> str:
    """Instead of a prompt on the terminal: a key with a password is refused."""
    return ""
