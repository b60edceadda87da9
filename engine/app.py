"""The engine process: runtime, HTTP and gRPC on one event loop; signals drain and end it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path

import uvicorn

from engine.build import build_runtime, resolve_model
from engine.config import EngineConfig
from engine.errors import UnavailableError
from engine.metrics import EngineMetrics
from engine.openai_api import OpenAIServer
from engine.runtime import EngineRuntime
from engine.server import start_grpc
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the process decides when to stop."""

    def install_signal_handlers(self) -> None:
        return


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UnavailableError when the port cannot be had."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"HTTP port {port} on {host} cannot be bound ({error.strerror}); choose another with "
            "--port, or 0 for any."
        ) from error
    return sock


def stop_on_signal(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def serve(config: EngineConfig) -> None:
    """Run until a signal; every started thing is closed on every way out."""
    stop = stop_on_signal(asyncio.get_running_loop())
    sock = bind_http(config.host, config.port)
    try:
        model_dir = resolve_model(config.model, config.seed)
        tokenizer = Tokenizer(model_dir)
        runtime = build_runtime(config)
        try:
            await _until(stop, runtime.start())
            if not stop.is_set():
                await _serve(config, model_dir, tokenizer, runtime, sock, stop)
        finally:
            await runtime.close()
    finally:
        sock.close()


async def _until(stop: asyncio.Event, work: object) -> None:
    """Await `work`, but give up on it when `stop` is set."""
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _serve(
    config: EngineConfig,
    model_dir: Path,
    tokenizer: Tokenizer,
    runtime: EngineRuntime,
    sock: socket.socket,
    stop: asyncio.Event,
) -> None:
    name = config.served_model_name or (
        "tiny" if config.model == "tiny" else model_dir.resolve().name
    )
    api = OpenAIServer(runtime, tokenizer, EngineMetrics(runtime, name), name)
    grpc_server, grpc_port = await start_grpc(
        runtime, tokenizer, name, config.host, config.grpc_port
    )
    http = _Server(
        uvicorn.Config(api.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    )
    http_task = asyncio.create_task(http.serve(sockets=[sock]))
    try:
        port = sock.getsockname()[1]
        print(
            f"tidewright engine ready: http://{config.host}:{port} grpc {config.host}:{grpc_port} "
            f"model {name} deployment {runtime.deployment.key}",
            flush=True,
        )
        await stop.wait()
        api.draining = True
        if not await runtime.drain(config.drain_timeout_s):
            logger.warning("requests still running after the drain time-out are cut off")
    finally:
        await grpc_server.stop(grace=1.0)
        http.should_exit = True
        await http_task
