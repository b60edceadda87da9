"""The engine process: runtime, HTTP and gRPC on one event loop; signals drain and end it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engine.api.server import OpenAIServer
from engine.build import build_runtime, resolve_model
from engine.certificates import Certificates, tls_files
from engine.cluster import RequestStatus
from engine.config import EngineConfig
from engine.http_server import HttpServer, bind_http
from engine.logs import RequestLog
from engine.metrics import EngineMetrics
from engine.runtime import EngineRuntime
from engine.server import start_grpc
from engine.tokenizer import Tokenizer
from engine.tokens import READ, TokenFile, TokenInterceptor
from engine.tracing import start_tracing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stop:
    """What signals have asked for."""

    asked: asyncio.Event
    hurry: asyncio.Event  # asked twice: wait for nobody


@dataclass(frozen=True, slots=True)
class Ports:
    """What guards both servers; None: nothing."""

    certificates: Certificates | None = None  # of HTTP
    control_certificates: Certificates | None = None  # of gRPC, which may ask clients for theirs
    control_tokens: TokenFile | None = None  # of gRPC
    api_keys: TokenFile | None = None  # of HTTP


NO_GUARD = Ports()


def build_ports(config: EngineConfig) -> Ports:
    """Raises InvalidRequestError for files that cannot be used."""
    files = tls_files(config.tls_cert, config.tls_key)
    control_files = tls_files(config.tls_cert, config.tls_key, config.control_client_ca)
    tokens, keys = config.control_tokens, config.api_keys
    return Ports(
        None if files is None else Certificates(files),
        None if control_files is None else Certificates(control_files),
        None if tokens is None else TokenFile(tokens, "--control-tokens", (READ,)),
        None if keys is None else TokenFile(keys, "--api-keys"),
    )


def stop_on_signal(loop: asyncio.AbstractEventLoop) -> Stop:
    """The first SIGINT or SIGTERM asks to stop, the second to hurry."""
    stop = Stop(asyncio.Event(), asyncio.Event())

    def on_signal() -> None:
        if stop.asked.is_set():
            stop.hurry.set()
        stop.asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


async def serve(config: EngineConfig) -> None:
    """Run until a signal; every started thing is closed on every way out."""
    stop = stop_on_signal(asyncio.get_running_loop())
    ports = build_ports(config)
    sock = bind_http(config.host, config.port)
    try:
        model_dir = resolve_model(config.model, config.seed)
        tokenizer = Tokenizer(model_dir)
        name = config.served_model_name or (
            "tiny" if config.model == "tiny" else model_dir.resolve().name
        )
        runtime = build_runtime(config)
        runtime.requests.on_end.append(RequestLog(config.log_format))
        try:
            http = http_server(runtime, tokenizer, name, sock, ports)
            async with _traced(runtime, config, name), http:
                await _until(stop.asked, runtime.start())
                if not stop.asked.is_set():
                    await _serve(config, runtime, tokenizer, name, sock, stop, ports)
        finally:
            await runtime.close()
    finally:
        sock.close()


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Await `work`, but give up on it when `stop` is set."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _traced(runtime: EngineRuntime, config: EngineConfig, name: str) -> AsyncIterator[None]:
    if not config.otlp_traces_endpoint:
        yield
        return
    tracing = start_tracing(runtime, config.otlp_traces_endpoint, name)
    try:
        yield
    finally:
        await asyncio.to_thread(tracing.close)


@asynccontextmanager
async def http_server(
    runtime: EngineRuntime,
    tokenizer: Tokenizer,
    name: str,
    sock: socket.socket,
    ports: Ports = NO_GUARD,
) -> AsyncIterator[None]:
    """The HTTP server answers from the first moment on; /ready tells what for."""
    api = OpenAIServer(runtime, tokenizer, EngineMetrics(runtime, name), name, ports.api_keys)
    certificates = ports.certificates
    server = HttpServer(api.app, None if certificates is None else certificates.context())
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    try:
        yield
    finally:
        server.should_exit = True
        await task


async def _serve(
    config: EngineConfig,
    runtime: EngineRuntime,
    tokenizer: Tokenizer,
    name: str,
    sock: socket.socket,
    stop: Stop,
    ports: Ports,
) -> None:
    certificates, tokens = ports.control_certificates, ports.control_tokens
    grpc_server, grpc_port = await start_grpc(
        *(runtime, tokenizer, name, config.host, config.grpc_port),
        None if certificates is None else certificates.credentials(),
        () if tokens is None else (TokenInterceptor(tokens),),
    )
    scheme = "http" if certificates is None else "https"
    try:
        port = sock.getsockname()[1]
        print(
            f"tidewright engine ready: {scheme}://{config.host}:{port} "
            f"grpc {config.host}:{grpc_port} "
            f"model {name} deployment {runtime.deployment.key}",
            flush=True,
        )
        await stop.asked.wait()
        logger.info("stopping: running requests get %.0f s", config.drain_timeout_s)
        await _until(stop.hurry, runtime.drain(config.drain_timeout_s))
        if left := len(runtime.requests):
            logger.warning("%d requests are cut off", left)
            runtime.requests.end_all(RequestStatus.CANCELLED, "abort")
    finally:
        await grpc_server.stop(grace=1.0)
