"""The workers of an engine: one per device, started, called, watched, and restarted when lost.

A lost worker is replaced after a wait that doubles with every further loss. Its successor holds
nothing; it takes part again with the next deployment. While a switch runs nobody is replaced, so
that a switch never meets a successor where it left a worker that held something.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from engine.channel import ChannelConfig, WorkerChannel
from engine.cluster import HEAL_TIMEOUT_S
from engine.errors import UnavailableError
from engine.executor import Executor, WorkerConfig
from engine.messages import Reply

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
MAX_RESTARTS_AT_ONCE = 4  # each takes a thread until the predecessor is gone


@dataclass(frozen=True, slots=True)
class RecoveryConfig:
    """What is waited before a lost worker is restarted: `first_wait_s`, doubled with each further
    loss up to `longest_wait_s`, from the start again once a worker has lived for `steady_s`.
    Requests wait for `heal_timeout_s` at most while no replica is left."""

    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    steady_s: float = 60.0
    heal_timeout_s: float = HEAL_TIMEOUT_S


class Backoff:
    """The waits between attempts at something that keeps failing."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._wait_s = config.first_wait_s

    def next_wait_s(self, lived_s: float = 0.0) -> float:
        """The wait after something that was well for `lived_s`."""
        config = self._config
        if lived_s >= config.steady_s:
            self._wait_s = config.first_wait_s
        wait_s = self._wait_s
        self._wait_s = min(2 * wait_s, config.longest_wait_s)
        return wait_s


class PoolHost(Protocol):
    """What is told of workers, and asked before one is restarted."""

    def on_message(self, message: Any) -> None:
        """What a worker says that is no reply."""
        ...

    def on_lost(self, device: int) -> None: ...
    def on_joined(self, device: int) -> None:
        """A successor of a lost worker is there."""
        ...

    async def until_idle(self) -> None:
        """Return when no switch runs."""
        ...


class WorkerPool:
    """Owns executor and channel. `dead_devices` have no worker, or one that is only starting."""

    def __init__(
        self,
        host: PoolHost,
        executor: Executor,
        configs: Sequence[WorkerConfig],
        channel_config: ChannelConfig,
        recovery: RecoveryConfig,
    ) -> None:
        self._host, self._executor = host, executor
        self._channel_config, self._recovery = channel_config, recovery
        self._configs = {config.device: config for config in configs}
        self._backoffs = {device: Backoff(recovery) for device in self._configs}
        self._joined_s: dict[int, float] = {}
        self.channel: WorkerChannel | None = None  # until `start`
        self.dead_devices: set[int] = set()
        self.num_lost = self.num_restarted = 0
        self._restarts: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(MAX_RESTARTS_AT_ONCE)
        self._is_open = self._is_closing = False

    async def start(self, run_dir: Path) -> None:
        """Start all workers. Raises UnavailableError; until this returns none is restarted."""
        channel = WorkerChannel(
            run_dir, self._channel_config, self._host.on_message, self._on_silence
        )
        self.channel = channel
        channel.start()
        for device, config in self._configs.items():
            self._configs[device] = replace(config, engine_endpoint=channel.endpoint)
            channel.expect(device, config.incarnation)
        loop = asyncio.get_running_loop()

        def on_death(device: int, incarnation: int) -> None:
            loop.call_soon_threadsafe(self._on_death, device, incarnation)

        await asyncio.to_thread(self._executor.start, list(self._configs.values()), on_death)
        for device in self._configs:
            await channel.wait_for_hello(device, START_TIMEOUT_S)
            self._joined_s[device] = time.monotonic()

    def open(self) -> None:
        """The engine serves: from now on lost workers are restarted."""
        self._is_open = True
        for device in self.dead_devices:  # lost since `start`
            self._restart_later(device)

    async def close(self) -> None:
        """End every worker and what restarts them."""
        self._is_open, self._is_closing = False, True
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        if self.channel is None:
            return
        self.channel.shut_down()
        await asyncio.to_thread(self._executor.close)
        await self.channel.close()

    # ---------------------------------------------------------------- what is said to workers

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        """See `WorkerChannel.call`."""
        assert self.channel is not None
        return await self.channel.call(device, kind, **fields)

    def send(self, device: int, message: Any) -> None:
        assert self.channel is not None
        self.channel.send(device, message)

    def raise_fence(self) -> int:
        """A number for a switch or load that begins; whatever bears a lower one is stale."""
        assert self.channel is not None
        self.channel.fence += 1
        return self.channel.fence

    def lives(self, devices: Iterable[int]) -> dict[int, int | None]:
        """The incarnation of each device's worker, None where none is there."""
        return {
            d: None if d in self.dead_devices else self._configs[d].incarnation for d in devices
        }

    def pid(self, device: int) -> int:
        """Process id of a device's worker, on the machine where it runs."""
        return self._executor.pid(device)

    # ---------------------------------------------------------------- loss and return

    def _on_silence(self, device: int) -> None:
        """A rank that gives no sign of life is killed, not waited for."""
        self._executor.kill(device)
        self._lose(device)

    def _on_death(self, device: int, incarnation: int) -> None:
        assert self.channel is not None
        if self._configs[device].incarnation == incarnation:
            self.channel.mark_dead(device)
            self._lose(device)

    def _lose(self, device: int) -> None:
        """Also called for one that is restarted and died before its hello: `_bring_back` sees to
        that."""
        if device in self.dead_devices or self._is_closing:
            return
        logger.error("worker %d is lost", device)
        self.dead_devices.add(device)
        self.num_lost += 1
        self._host.on_lost(device)
        if self._is_open:
            self._restart_later(device)

    def _restart_later(self, device: int) -> None:
        lived_s = time.monotonic() - self._joined_s[device]
        task = asyncio.create_task(self._bring_back(device, lived_s), name=f"restart-{device}")
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _bring_back(self, device: int, lived_s: float) -> None:
        """Restart until a worker is there."""
        while True:
            wait_s = self._backoffs[device].next_wait_s(lived_s)
            logger.warning("worker %d is restarted in %.1f s", device, wait_s)
            await asyncio.sleep(wait_s)
            await self._host.until_idle()
            try:
                async with self._slots:
                    await self._restart(device)
                break
            except (UnavailableError, OSError) as error:
                logger.error("worker %d could not be restarted: %s", device, error)
                lived_s = 0.0
        logger.warning("worker %d is back", device)
        self.dead_devices.discard(device)
        self._joined_s[device] = time.monotonic()
        self.num_restarted += 1
        self._host.on_joined(device)

    async def _restart(self, device: int) -> None:
        assert self.channel is not None
        config = self._configs[device]
        self._configs[device] = config = replace(config, incarnation=config.incarnation + 1)
        self.channel.expect(device, config.incarnation)
        await asyncio.to_thread(self._executor.restart, config)
        await self.channel.wait_for_hello(device, START_TIMEOUT_S)
