"""Workers as Ray actors, on one machine or many: the same `Worker` that runs in local processes.

The devices of one machine are one placement group, packed strictly on one node, with a bundle per
device, so dense tp groups never cross machines. Ray starts the actors, carries their WorkerConfig
and notices their deaths; requests, tokens and tensors never touch it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import UnavailableError
from engine.executor import STOP_TIMEOUT_S, OnDeath, WorkerConfig

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0  # of all actors: each imports torch once
RESTART_TIMEOUT_S = 30.0  # of one; when its machine is gone, the next attempt may find another
POLL_S = 0.2
CONNECT_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 80_000_000  # of a cluster of our own; nothing is put there
MAX_RUN_DIR = 32  # Ray adds some 70 characters for its sockets, which may have 107
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RayConfig:
    """`address` of a running cluster, "auto" for the one this machine belongs to, or empty: a
    cluster of our own on this machine, which ends with the engine. A device asks Ray for one
    `resource`, CPU or GPU."""

    address: str
    devices_per_node: int
    resource: str = "CPU"


class RayWorker:
    """The actor. `run` is a worker's whole life; the rest is asked before."""

    def __init__(self) -> None:
        import engine.preload  # noqa: F401  the slow import, while the engine still waits for it

    def where(self) -> tuple[int, str, str]:
        """(process id, node id, the node's own address)."""
        import ray

        context = ray.get_runtime_context()
        return os.getpid(), context.get_node_id(), ray.util.get_node_ip_address()

    def run(self, config: WorkerConfig) -> None:
        from engine.worker import Worker

        worker = Worker(config)
        threading.Thread(target=_die_with_node, name="node-watch", daemon=True).start()
        worker.run()


def _die_with_node() -> None:
    """End this process when its raylet has: Ray's own exit waits for the running task, for ever."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(POLL_S)
    os._exit(1)


class RayExecutor:
    """Owns its actors, their placement groups, and the Ray cluster where it started one."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._places: dict[int, tuple[int, str, str]] = {}
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, tuple[WorkerConfig, Any]] = {}  # and its actor, by call of `run`
        self._groups: list[Any] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()  # a close during a start waits for it to notice
        self._restarting: dict[int, threading.Lock] = {}  # by device; the same for restarts
        self._watcher: threading.Thread | None = None
        self._connected = False

    # ---------------------------------------------------------------- start

    def start(self, configs: Sequence[WorkerConfig], on_death: OnDeath) -> None:
        with self._lock:
            self._connect(len(configs), configs[0].run_dir)
            self._place(len(configs))
            self._actors = {config.device: self._new_actor(config.device) for config in configs}
            references = [actor.where.remote() for actor in self._actors.values()]
            places = self._await(references, "actors", START_TIMEOUT_S)
            self._places = dict(zip(self._actors, places, strict=True))
            for config in configs:
                self._run(config)
            self._restarting = {config.device: threading.Lock() for config in configs}
            self._watcher = threading.Thread(
                target=self._watch, args=(on_death,), name="ray-watch", daemon=True
            )
            self._watcher.start()

    def _connect(self, num_devices: int, run_dir: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        _check_address(self._config.address)
        options: dict[str, Any] = {"address": self._config.address}
        if not self._config.address:
            options = {"address": "local", "include_dashboard": False}
            options |= {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": num_devices}
            if len(run_dir) <= MAX_RUN_DIR:
                options["_temp_dir"] = f"{run_dir}/ray"  # goes with the engine
        try:
            ray.init(**options, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = self._config.address or "local"
            raise UnavailableError(
                f"Ray cluster {where!r} cannot be joined: {error}; check --ray-address."
            ) from error
        self._connected = True

    def _place(self, num_devices: int) -> None:
        from ray.util.placement_group import placement_group

        left, size = num_devices, self._config.devices_per_node
        while left:
            bundles = [{self._config.resource: 1.0}] * min(size, left)
            self._groups.append(placement_group(bundles, strategy="STRICT_PACK"))
            left -= len(bundles)
        self._await([group.ready() for group in self._groups], "placement groups", 30.0)

    def _new_actor(self, device: int) -> Any:
        """In the device's own bundle; Ray starts it when it can."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, bundle = divmod(device, self._config.devices_per_node)
        gpu = self._config.resource == "GPU"
        kind = ray.remote(RayWorker).options(
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
            max_restarts=0,  # the engine restarts, when no switch runs
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._groups[group], bundle),
        )
        return kind.remote()

    def _run(self, config: WorkerConfig) -> None:
        """Let the device's actor live its life."""
        own = replace(config, host=self._host_of(config))
        actor = self._actors[config.device]
        self._running[actor.run.remote(own)] = config, actor

    def restart(self, config: WorkerConfig) -> None:
        device = config.device
        with self._restarting[device]:
            if self._stop.is_set():
                raise UnavailableError("the engine is closing; no worker is started any more.")
            self.kill(device)
            actor = self._actors[device] = self._new_actor(device)
            place = self._await([actor.where.remote()], f"worker {device}", RESTART_TIMEOUT_S)
            self._places[device] = place[0]
            self._run(config)

    def _await(self, references: list[Any], what: str, timeout_s: float) -> list[Any]:
        """Their values. Raises UnavailableError at the deadline, on failure, or on `close`."""
        import ray

        deadline = time.monotonic() + timeout_s
        waiting = references
        while waiting:
            if self._stop.is_set() or time.monotonic() > deadline:
                raise UnavailableError(
                    f"Ray did not give the {what} of {self._config.devices_per_node} x "
                    f"{self._config.resource} per node within {timeout_s:.0f} s; the cluster has "
                    f"{ray.cluster_resources()}. Fewer --num-workers, or another "
                    "--devices-per-node."
                )
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        try:
            return list(ray.get(references))
        except ray.exceptions.RayError as error:
            raise UnavailableError(f"Ray could not start the {what}: {error}") from error

    def _host_of(self, config: WorkerConfig) -> str:
        """The address that a worker binds its own sockets to."""
        import ray

        address = self._places[config.device][2]
        if config.host != LOOPBACK:
            return address
        if address not in (LOOPBACK, ray.util.get_node_ip_address()):
            raise UnavailableError(
                f"worker {config.device} runs on {address} and cannot reach the engine on "
                f"{LOOPBACK}; give an address of this machine with --channel-host."
            )
        return LOOPBACK

    # ---------------------------------------------------------------- life and death

    def _watch(self, on_death: OnDeath) -> None:
        import ray

        while not self._stop.is_set():
            if not self._running:
                self._stop.wait(POLL_S)
                continue
            ended, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            for reference in ended:
                config, actor = self._running.pop(reference)
                if not self._stop.is_set():
                    _log_end(config.device, reference)
                    ray.kill(actor, no_restart=True)  # "unavailable" may come back: no more
                    on_death(config.device, config.incarnation)

    def pid(self, device: int) -> int:
        return self._places[device][0]

    def node_id(self, device: int) -> str:
        """Ray's name of the machine that a device is on."""
        return self._places[device][1]

    def kill(self, device: int) -> None:
        import ray

        if device in self._actors:
            ray.kill(self._actors[device], no_restart=True)

    def close(self) -> None:
        self._stop.set()
        with self._lock, ExitStack() as restarts:
            for lock in self._restarting.values():
                restarts.enter_context(lock)
            if self._watcher is not None:
                self._watcher.join()
                self._watcher = None
            if self._connected:
                self._end_actors()

    def _end_actors(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        if self._running:  # they were told to shut down
            ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_TIMEOUT_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        for group in self._groups:
            remove_placement_group(group)
        self._actors, self._groups, self._running = {}, [], {}
        ray.shutdown()
        self._connected = False


def _check_address(address: str) -> None:
    """Raise UnavailableError when nobody listens at host:port; Ray itself would wait for long."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local", or empty
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UnavailableError(
            f"no Ray cluster answers at {address} ({error}); check --ray-address, or start one "
            "with 'ray start --head'."
        ) from error


def _log_end(device: int, reference: Any) -> None:
    """Why a worker ended, as Ray tells it."""
    import ray

    try:
        ray.get(reference, timeout=1.0)
        logger.error("worker %d ended by itself", device)
    except ray.exceptions.RayError as error:
        logger.error("worker %d: %s", device, str(error).splitlines()[0])
