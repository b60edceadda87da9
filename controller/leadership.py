"""Which lease a controller is started with, and waiting for it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import tempfile
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from controller.config import ControllerConfig
from controller.lease import Lease, LeaseStore
from controller.lease_etcd import EtcdLease
from controller.lease_file import FileLease
from controller.lease_kubernetes import KubernetesLease, server_url
from controller.remote import RemoteCluster
from engine.errors import InvalidRequestError, UnavailableError

logger = logging.getLogger(__name__)
TRIES = 5  # per lease, of one who waits for it
DNS_NAME = "[a-z0-9]([a-z0-9.-]*[a-z0-9])?"


def build_lease(config: ControllerConfig) -> Lease | None:
    """As `--lease` says. Raises InvalidRequestError."""
    told, holder = config.lease, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    if told == "off":
        return None
    store: LeaseStore
    if told.startswith(("http://", "https://")):
        parts = urlsplit(told)
        key = parts.path.strip("/")
        if not parts.netloc or not key:
            raise InvalidRequestError(
                f"lease {told!r} names no key; expected one such as "
                "http://127.0.0.1:2379/tidewright/pool1."
            )
        store = EtcdLease(f"{parts.scheme}://{parts.netloc}", key, holder, config.lease_s)
    elif told.startswith("kubernetes://"):
        namespace, _, name = told.removeprefix("kubernetes://").partition("/")
        if not all(re.fullmatch(DNS_NAME, part) for part in (namespace, name)):
            raise InvalidRequestError(
                f"lease {told!r} names no object; expected one such as "
                "kubernetes://NAMESPACE/NAME, both of lower-case letters, digits, - and ."
            )
        where = (server_url(), config.lease_account, namespace, name)
        store = KubernetesLease(*where, holder, config.lease_s)
    else:
        store = FileLease(Path(told) if told else _default_path(config), holder, config.lease_s)
    return Lease(store)


def _default_path(config: ControllerConfig) -> Path:
    """Beside the decision log, which only one may write; else one per engine and user."""
    if config.log is not None:
        return config.log.with_name(f"{config.log.name}.lease")
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    engine = "".join(c if c.isalnum() or c in ".-" else "_" for c in config.engine)
    return folder / f"tidewright-{os.getuid()}" / f"{engine}.lease"


async def lead(lease: Lease | None, remote: RemoteCluster, stop: asyncio.Event) -> bool:
    """Wait until the lease is held; False when `stop` came first.

    Raises UnavailableError when the first try gets no answer from the store or the engine.
    """
    if lease is None:
        return True
    waits = False
    while not stop.is_set():
        try:
            if await asyncio.to_thread(lease.acquire, remote.highest_term):
                return True
            if not waits:
                holder = await asyncio.to_thread(lease.store.holder)
                print(
                    f"tidewright controller stands by: lease {lease.store.where} is held by "
                    f"{holder or 'another'}",
                    flush=True,
                )
        except UnavailableError as error:
            if not waits:
                raise
            logger.warning("standing by: %s", error)
        waits = True
        try:
            await asyncio.wait_for(stop.wait(), lease.store.ttl_s / TRIES)
        except TimeoutError:
            continue
    return False
