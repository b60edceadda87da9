"""The implementations of `Cluster` that the contract suite runs over, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.remote import RemoteCluster
from engine.cluster import Drivable, Request, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster

START = "4xtp1pp1"


class DrivenRemote(RemoteCluster):
    """The client under test; its traffic and clock are the engine's behind it."""

    def __init__(self, target: str, engine: Drivable) -> None:
        super().__init__(target)
        self._engine = engine

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def advance(self, until_s: float) -> None:
        self._engine.advance(until_s)


@contextmanager
def open_surrogate(cluster: ProfiledCluster) -> Iterator[Drivable]:
    surrogate = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(START)))
    yield surrogate
    surrogate.check_integrity()
    surrogate.close()


@contextmanager
def open_remote(open_engine: Callable[..., Any], model_dir: Path) -> Iterator[Drivable]:
    from engine.server import start_grpc
    from engine.tokenizer import Tokenizer

    with open_engine(START) as engine:
        loop = engine.on_loop(asyncio.get_running_loop)
        serving = start_grpc(engine.runtime, Tokenizer(model_dir), "tiny", "127.0.0.1", 0)
        server, port = asyncio.run_coroutine_threadsafe(serving, loop).result(30)
        try:
            with DrivenRemote(f"127.0.0.1:{port}", engine) as remote:
                yield remote
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)


@pytest.fixture(scope="module", params=["surrogate", "engine", "remote"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Drivable]:
    """One cluster per implementation, shared by the tests of the module."""
    needed = request.getfixturevalue
    implementations: dict[str, Callable[[], AbstractContextManager[Drivable]]] = {
        "surrogate": lambda: open_surrogate(needed("small_cluster")),
        "engine": lambda: needed("open_engine")(START),
        "remote": lambda: open_remote(needed("open_engine"), needed("tiny_model_dir")),
    }
    with implementations[request.param]() as opened:
        yield opened
