"""An engine that has lost every replica loads its last deployment from disk again.

It waits until all workers of that deployment are there. Past a deadline it loads the replicas
whose workers are, and fails the requests that wait when there are none; but it goes on trying.
While some replica is left, what to do with the devices is the controller's to decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from engine.cluster import Deployment, Replica
from engine.errors import TidewrightError
from engine.worker_pool import Backoff, RecoveryConfig

logger = logging.getLogger(__name__)
POLL_S = 1.0
SETTLE_S = 0.5  # a rank may fail because of a death that is told of a moment later


class HealingHost(Protocol):
    """What is needed of the engine."""

    @property
    def deployment(self) -> Deployment: ...
    @property
    def dead_devices(self) -> set[int]: ...
    def now_s(self) -> float: ...
    async def wait_for_change(self, timeout_s: float) -> None: ...
    async def until_idle(self) -> None:
        """Return when no switch runs."""
        ...

    async def reload(self, replicas: Sequence[Replica]) -> None:
        """Load them from disk and make them the deployment."""
        ...

    def fail_held(self) -> None:
        """End the requests that wait for a replica."""
        ...


class Healing:
    """Owns the task that heals. `wanted` is the deployment that was last chosen."""

    def __init__(self, host: HealingHost, config: RecoveryConfig, wanted: Deployment) -> None:
        self._host, self._config, self.wanted = host, config, wanted
        self._task: asyncio.Task[None] | None = None
        self.is_loading = False

    @property
    def status(self) -> str:
        """What goes on, for those that are turned away."""
        if self.is_loading:
            return f"{self.wanted.key} is being loaded again"
        missing = sorted(self._host.dead_devices & self.wanted.devices)
        return f"{self.wanted.key} is loaded again when workers {missing} are back"

    def start(self) -> None:
        """No replica is left. A no-op while that is known."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._heal(), name="healing")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _heal(self) -> None:
        host, backoff = self._host, Backoff(self._config)
        deadline_s = host.now_s() + self._config.heal_timeout_s
        await asyncio.sleep(SETTLE_S)
        while True:
            await host.until_idle()
            if host.deployment.replicas:
                return  # a switch has brought some
            is_late = host.now_s() >= deadline_s
            if await self._load(is_late):
                return
            if is_late:
                host.fail_held()
            if not self._startable(is_late):
                await host.wait_for_change(POLL_S)
            else:  # it was tried
                await asyncio.sleep(backoff.next_wait_s())

    def _startable(self, is_late: bool) -> tuple[Replica, ...]:
        """All replicas when their workers are there; late, those whose workers are."""
        dead, wanted = self._host.dead_devices, self.wanted.replicas
        alive = tuple(r for r in wanted if not dead & set(r.placement.devices))
        return alive if is_late or alive == wanted else ()

    async def _load(self, is_late: bool) -> bool:
        """Whether the engine has replicas again."""
        replicas = self._startable(is_late)
        if not replicas:
            return False
        self.is_loading = True
        logger.warning("no replica is left; %s is loaded again", Deployment(replicas).key)
        try:
            await self._host.reload(replicas)
        except TidewrightError as error:
            logger.error("%s could not be loaded again: %s", self.wanted.key, error)
            return False
        finally:
            self.is_loading = False
        return True
