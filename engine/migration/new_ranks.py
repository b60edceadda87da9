"""The ranks of the replicas that come with a switch in place: from bare to ready, or from disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from engine.cluster import Replica
from engine.errors import UnavailableError
from engine.messages import ReleaseRank
from engine.migration.host import SwitchHost
from engine.rank_calls import (
    Endpoints,
    activate_ranks,
    bind_ranks,
    build_ranks,
    size_kv,
)
from engine.shards import num_kv_blocks


class NewRanks:
    """Bare ranks have groups and modules, no KV cache, and only the weights that their device held
    anyway. Ready ones serve, and have nothing to run before the commit."""

    def __init__(self, host: SwitchHost, replicas: Sequence[Replica], nonce: str) -> None:
        self._host, self._replicas, self._nonce = host, replicas, nonce
        self._endpoints: Endpoints = {}
        self._lives: dict[int, dict[int, int | None]] = {}  # of the workers they were built on
        self._tried: set[int] = set()  # replicas that were to be made ready, by id
        self._ready: set[int] = set()  # those that are

    async def build_bare(self) -> None:
        self._note_lives(self._replicas)
        self._endpoints = await build_ranks(
            self._host.call, self._host.spec, self._replicas, self._nonce, False, is_bare=True
        )

    async def make_ready(self, replica: Replica) -> None:
        """All weights are there: bind them, make KV caches, activate."""
        host = self._host
        self._tried.add(replica.replica_id)
        await bind_ranks(host.call, [replica])
        await size_kv(host.call, replica, num_kv_blocks(host.spec, replica.parallel))
        await activate_ranks(host.call, [replica], self._endpoints)
        self._ready.add(replica.replica_id)

    async def complete(self, replica: Replica, is_whole: bool) -> None:
        """Make a replica ready after a failure: as it is when it `is_whole`, else from disk."""
        replica_id, is_lost = replica.replica_id, self.is_lost(replica)
        if replica_id in self._ready and not is_lost:
            return
        if not is_whole or is_lost or replica_id in self._tried:
            await self._rebuild(replica)
        await self.make_ready(replica)

    async def _rebuild(self, replica: Replica) -> None:
        self._note_lives([replica])
        if self.is_lost(replica):
            raise UnavailableError(self.why_lost(replica))
        await release_ranks(self._host, [replica])
        nonce = f"{self._nonce}-disk"
        self._endpoints |= await build_ranks(
            self._host.call, self._host.spec, [replica], nonce, from_disk=True
        )

    def _note_lives(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            self._lives[replica.replica_id] = self._host.lives(replica.placement.devices)

    def is_lost(self, replica: Replica) -> bool:
        """Whether a worker has died since its ranks were built, even if there is another by now."""
        built_on = self._lives.get(replica.replica_id, {})
        now = self._host.lives(replica.placement.devices)
        return built_on != now or None in now.values()

    def why_lost(self, replica: Replica) -> str:
        built_on = self._lives.get(replica.replica_id, {})
        now = self._host.lives(replica.placement.devices)
        return f"workers {[d for d in now if now[d] is None or now[d] != built_on.get(d)]} died"


async def release_ranks(host: SwitchHost, replicas: Iterable[Replica]) -> None:
    """Drop their ranks on every device that answers."""
    calls = [
        host.call(device, ReleaseRank, replica_id=r.replica_id)
        for r in replicas
        for device in r.placement.devices
    ]
    await asyncio.gather(*calls, return_exceptions=True)
