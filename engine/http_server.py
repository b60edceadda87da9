"""What every HTTP server here shares: a listening socket, and uvicorn without signal handling."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from engine.errors import UnavailableError

GRACE_S = 2  # that open answers have when it stops


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling, logs and life cycle: the process decides when to
    stop. `tls` is what new connections are met with; without it there is no TLS."""

    def __init__(self, app: Any, tls: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        if tls is not None:
            config.load()  # which would otherwise set it anew
            config.ssl = tls

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind_http(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket. Raises UnavailableError when the port cannot be had; `option` is what
    chooses another."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"HTTP port {port} on {host} cannot be bound ({error.strerror}); choose another with "
            f"{option}, or 0 for any."
        ) from error
    return sock
