"""What a switch needs of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

from engine.cluster import ClusterSpec, Deployment, SwitchTicket
from engine.messages import Reply


class SwitchCancelledError(Exception):
    """Somebody asked for the switch to be cancelled before it committed."""


class SwitchHost(Protocol):
    """What a switch needs of the engine."""

    @property
    def spec(self) -> ClusterSpec: ...
    @property
    def deployment(self) -> Deployment: ...
    @property
    def dead_devices(self) -> Collection[int]: ...
    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply: ...
    def now_s(self) -> float: ...
    def num_outstanding(self, replica_id: int) -> int: ...
    def kv_blocks_used(self, replica_id: int) -> int:
        """As its leader reported last."""
        ...

    def request_id_of(self, key: str) -> str:
        """The caller's id of the request that leaders know as `key`."""
        ...

    async def wait_until_ended(self, keys: Iterable[str], timeout_s: float) -> None:
        """Return when none of these requests exists any more, at the latest after `timeout_s`."""
        ...

    def lives(self, devices: Iterable[int]) -> dict[int, int | None]:
        """The incarnation of each device's worker, None where none is there."""
        ...

    def lose(self, replica_id: int, reason: str) -> None:
        """The switch leaves this replica of the present deployment broken: the engine is to
        recover its requests when the switch has ended."""
        ...

    def hold(self, replica_ids: Iterable[int]) -> None:
        """Send these replicas no further request until `commit` or `unhold`."""
        ...

    def unhold(self) -> None: ...
    def commit(self, target: Deployment, owner: dict[str, int]) -> None:
        """Make `target` current; `owner` names the new replica of every request that moved."""
        ...

    def abort_ended(self, owner: dict[str, int]) -> None:
        """Tell the new replicas of requests that were cancelled while they moved."""
        ...

    def publish(self, ticket: SwitchTicket) -> None: ...
    def failpoint(self, name: str) -> None:
        """Raises when a test wants this point to fail."""
        ...
