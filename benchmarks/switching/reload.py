"""The same transitions without a live switch: affected ranks loaded from disk again, or a new
engine process from nothing."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from engine.cluster import Deployment, SwitchPlan
from engine.messages import Quiesce, ReleaseRank
from engine.rank_calls import activate_ranks, await_all, bind_ranks, build_ranks
from engine.runtime import EngineRuntime

# ------------------------------------------------------------------------------------
# Page cache


def warm_page_cache(folder: Path) -> float:
    """Read the checkpoint once; the share of its pages that is in memory then."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                continue
    return resident_share(folder)


def drop_page_cache(folder: Path) -> float:
    """Give the checkpoint's pages back, which needs no privilege for pages that are written and
    not mapped; the share that is still in memory."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident_share(folder)


def resident_share(folder: Path) -> float:
    """Share of the checkpoint's pages that is in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), size, flags=mmap.MAP_PRIVATE)  # writable view
            pages = -(-size // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * pages)()
            view = ctypes.c_ubyte.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), size, flags)
            del view
            mapped.close()
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        resident += sum(flag & 1 for flag in flags)
        total += pages
    return resident / total


# ------------------------------------------------------------------------------------
# Reload: processes alive, replicas that stay are not touched


async def reload_replicas(runtime: EngineRuntime, plan: SwitchPlan, nonce: str) -> None:
    """Go to the plan's target as an engine without migration would: stop the replicas that go, drop
    their ranks, load the new ones from disk, recompute their requests."""
    call, kept = runtime.call, set(runtime.deployment.replicas) & set(plan.target.replicas)
    leaving = [r for r in runtime.deployment.replicas if r not in kept]
    coming = [r for r in plan.target.replicas if r not in kept]
    runtime.hold(r.replica_id for r in leaving)
    await await_all(call(r.placement.devices[0], Quiesce, replica_id=r.replica_id) for r in leaving)
    await await_all(
        call(device, ReleaseRank, replica_id=r.replica_id)
        for r in leaving
        for device in r.placement.devices
    )
    endpoints = await build_ranks(call, runtime.spec, coming, nonce, from_disk=True)
    await bind_ranks(call, coming)
    await activate_ranks(call, coming, endpoints)
    runtime.commit(plan.target, {})
    for request in runtime.requests._requests.values():
        request.num_losses = 0  # no replica has broken under it
    for replica in leaving:
        runtime.requests.requeue(replica.replica_id)


# ------------------------------------------------------------------------------------
# Restart: a new engine process


def restart(
    script: Path, folder: Path, target: Deployment, contexts: list[int], quick: bool
) -> dict[str, float]:
    """Seconds from the command to start a process until its first token, and until every request
    of those context lengths (tokens) has one; `script --restarted` is what runs there."""
    arguments = {"deployment": target.key, "contexts": contexts, "quick": quick}
    command = [sys.executable, str(script), "--restarted", json.dumps(arguments)]
    started_s = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    first_s, last_s = json.loads(done.stdout.strip().splitlines()[-1])
    return {"first_token_s": first_s - started_s, "last_token_s": last_s - started_s}
