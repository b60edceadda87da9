"""The calls that bring the ranks of replicas to life, at start and in a switch alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from engine.cluster import ClusterSpec, Replica
from engine.errors import UnavailableError
from engine.messages import (
    Abandon,
    Activate,
    BindRank,
    BuildRank,
    HostStore,
    RankSpec,
    Reply,
    SizeKv,
)
from engine.shards import num_kv_blocks

CallWorker = Callable[..., Awaitable[Reply]]  # (device, kind, **fields)
Endpoints = dict[int, list[str]]  # input endpoints of a replica's ranks, in rank order


async def await_all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await every call, then raise what failed, all of it in one error: which of them is the cause
    is for people to see. None is left running."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    failures = [r for r in results if isinstance(r, BaseException)]
    if len(failures) > 1 and all(isinstance(f, UnavailableError) for f in failures):
        raise UnavailableError("; ".join(dict.fromkeys(map(str, failures))))
    if failures:
        raise failures[0]
    return list(results)


def rank_spec(
    spec: ClusterSpec, replica: Replica, rank: int, nonce: str, is_bare: bool = False
) -> RankSpec:
    """What the worker of `rank` is told of `replica`. A bare one has no KV cache yet."""
    return RankSpec(
        replica_id=replica.replica_id,
        parallel=replica.parallel,
        rank=rank,
        num_blocks=0 if is_bare else num_kv_blocks(spec, replica.parallel),
        nonce=nonce,
    )


async def host_store(call: CallWorker, device: int, name: str) -> str:
    """Address of a rendezvous store that `device` hosts."""
    return (await call(device, HostStore, name=name)).endpoint


async def meet_at(
    call: CallWorker, devices: Sequence[int], store: str, calls: Iterable[Awaitable[Reply]]
) -> list[Reply]:
    """`await_all` of calls in which the devices meet at a store. When one fails, the others are
    told to wait no longer."""
    tasks = [asyncio.ensure_future(c) for c in calls]
    _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if waiting:
        told = (call(device, Abandon, store=store) for device in devices)
        await asyncio.gather(*told, return_exceptions=True)
    return await await_all(tasks)


async def build_ranks(
    call: CallWorker,
    spec: ClusterSpec,
    replicas: Sequence[Replica],
    nonce: str,
    from_disk: bool,
    is_bare: bool = False,
) -> Endpoints:
    """Groups, modules, storage and input sockets of all ranks of `replicas`. Bare ones have no KV
    cache yet and only those weights that their device holds already."""
    built = await await_all(_build(call, spec, r, nonce, from_disk, is_bare) for r in replicas)
    return {r.replica_id: endpoints for r, endpoints in zip(replicas, built, strict=True)}


async def _build(
    call: CallWorker,
    spec: ClusterSpec,
    replica: Replica,
    nonce: str,
    from_disk: bool,
    is_bare: bool,
) -> list[str]:
    devices, store = replica.placement.devices, ""
    if len(devices) > 1:
        store = await host_store(call, devices[0], f"{nonce}-{replica.replica_id}")
    calls = (
        call(
            device,
            BuildRank,
            spec=rank_spec(spec, replica, rank, nonce, is_bare),
            from_disk=from_disk,
            store=store,
            is_bare=is_bare,
        )
        for rank, device in enumerate(devices)
    )
    replies = await meet_at(call, devices, store, calls)
    return [reply.endpoint for reply in replies]


async def bind_ranks(call: CallWorker, replicas: Iterable[Replica]) -> None:
    """All weights are there: bind them."""
    await await_all(
        call(device, BindRank, replica_id=r.replica_id)
        for r in replicas
        for device in r.placement.devices
    )


async def size_kv(call: CallWorker, replica: Replica, num_blocks: int) -> None:
    """Another KV cache, empty, for all ranks of a replica that stands still; 0 drops it."""
    await await_all(
        call(device, SizeKv, replica_id=replica.replica_id, num_blocks=num_blocks)
        for device in replica.placement.devices
    )


async def activate_ranks(
    call: CallWorker, replicas: Sequence[Replica], endpoints: Endpoints
) -> None:
    """The ranks serve from now on: followers first, so that a leader finds them listening."""
    for leaders in (False, True):
        await await_all(
            call(device, Activate, replica_id=r.replica_id, peers=endpoints[r.replica_id])
            for r in replicas
            for rank, device in enumerate(r.placement.devices)
            if (rank == 0) == leaders
        )
