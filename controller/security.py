"""What guards the control service, as its configuration says; what it would be unsafe to start."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from controller.access import AccessFile
from controller.audit import AuditLog
from controller.config import ControllerConfig
from controller.control_channel import is_loopback
from controller.gate import Gate
from controller.rate_limits import RateLimits
from engine.certificates import Certificates, tls_files
from engine.errors import InvalidRequestError
from engine.grpc_server import MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Security:
    """Of one control service. `certificates` None: no TLS."""

    gate: Gate = field(default_factory=Gate)
    certificates: Certificates | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES

    @property
    def credentials(self) -> grpc.ServerCredentials | None:
        return None if self.certificates is None else self.certificates.credentials()

    def close(self) -> None:
        self.gate.audit.close()


def build_security(config: ControllerConfig) -> Security:
    """Raises InvalidRequestError for files that cannot be used and for an unsafe address."""
    _check_address(config)
    files = tls_files(config.tls_cert, config.tls_key, config.tls_client_ca)
    return Security(
        gate=Gate(
            None if config.access is None else AccessFile(config.access),
            RateLimits(config.rate_per_s, config.rate_burst),
            AuditLog(config.audit),
        ),
        certificates=None if files is None else Certificates(files),
        max_message_bytes=config.max_message_mb * 10**6,
    )


def _check_address(config: ControllerConfig) -> None:
    if is_loopback(config.host) or config.insecure:
        return
    if config.tls_cert is None:
        raise InvalidRequestError(
            f"--host {config.host} is reached by other machines, and without TLS they would read "
            "and change what passes; give --tls-cert and --tls-key, or say --insecure if a network "
            "of your own is in between."
        )
    if config.access is None and config.tls_client_ca is None:
        raise InvalidRequestError(
            f"--host {config.host} is reached by other machines, and whoever calls could switch "
            "the engine; give --access with tokens, or --tls-client-ca, or say --insecure."
        )
