"""The ZeroMQ sockets of one process: `ipc://` on one machine, `tcp://` with CURVE between several.

All members of one engine share one CURVE key pair, made at its start. Whoever binds lets in
clients with that public key only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

LINGER_MS = 200


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A key pair in Z85 text, as `zmq.curve_keypair` gives it."""

    public: bytes
    secret: bytes = field(repr=False)


def make_curve_keys() -> CurveKeys:
    return CurveKeys(*zmq.curve_keypair())


class _OnlyMembers:
    """Credentials provider of the ZAP authenticator: one known client key."""

    def __init__(self, keys: CurveKeys) -> None:
        self._public = keys.public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class Sockets:
    """Makes sockets in `context`, which it owns. `host` is this process's own address for
    `tcp://`; empty for `ipc://` files under `run_dir`."""

    def __init__(
        self, context: zmq.Context[Any], run_dir: str, host: str = "", keys: CurveKeys | None = None
    ) -> None:
        self.context, self._run_dir, self._host, self._keys = context, run_dir, host, keys
        self._authenticator: ThreadAuthenticator | None = None
        if keys is not None:
            # a plain view of the context: an asyncio one would make sockets its thread cannot use
            self._authenticator = ThreadAuthenticator(zmq.Context.shadow(context.underlying))
            self._authenticator.start()
            self._authenticator.configure_curve_callback(
                domain="*", credentials_provider=_OnlyMembers(keys)
            )

    def bind(self, kind: int, name: str) -> tuple[Any, str]:
        """A bound socket and the endpoint that others connect to; `name` is unique per engine."""
        socket = self._socket(kind)
        if self._keys is not None:
            socket.curve_server = True
        socket.bind(f"tcp://{self._host}:0" if self._host else f"ipc://{self._run_dir}/{name}")
        return socket, socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def connect(self, kind: int, endpoint: str, identity: bytes = b"") -> Any:
        """A socket connected to an endpoint of `bind`; that may be bound later."""
        socket = self._socket(kind)
        if identity:
            socket.setsockopt(zmq.IDENTITY, identity)
        if self._keys is not None:
            socket.curve_serverkey = self._keys.public
        socket.connect(endpoint)
        return socket

    def _socket(self, kind: int) -> Any:
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        if self._keys is not None:
            socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        return socket

    def close(self) -> None:
        """Close every socket made here; messages under way get `LINGER_MS`."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self.context.destroy(linger=LINGER_MS)
