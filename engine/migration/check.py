"""Pure: whether a SwitchPlan that came from outside gives every new rank exactly what it needs.

Checksums compare a copy with its source; a tensor that no transfer brings has none, so a plan with
a gap would commit and serve from whatever the storage held. Hence the check before the switch.
A device may forward what an earlier transfer of the plan has brought it; the disk holds everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.cluster import DISK, ClusterSpec, Deployment, SwitchPlan, Transfer
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.plan import Held, check_memory, held_shards
from engine.shards import Shard


def check_plan(
    spec: ClusterSpec,
    current: Deployment,
    plan: SwitchPlan,
    dead_devices: Collection[int] = (),
) -> None:
    """Raises InfeasibleError when the target does not fit the cluster or uses a dead device,
    InvalidRequestError when the transfers are not exactly the intervals that its ranks need and do
    not hold, each from a source that has it by then."""
    spec.check(plan.target.configs)
    unknown = sorted(plan.target.devices - set(range(spec.num_devices)))
    if unknown:
        raise InfeasibleError(
            f"the plan uses devices {unknown}, the cluster has 0..{spec.num_devices - 1}."
        )
    dead = sorted(plan.target.devices & set(dead_devices))
    if dead:
        raise InfeasibleError(f"the plan uses devices {dead}, which are dead; plan without them.")
    for parallel in set(plan.target.configs):
        check_memory(spec, parallel)
    held, needs = held_shards(spec.model, current), held_shards(spec.model, plan.target)
    held = {device: shards for device, shards in held.items() if device not in dead_devices}
    arriving: dict[tuple[int, str], list[Transfer]] = {}
    for transfer in plan.transfers:
        source = held.get(transfer.src, {}).get(transfer.tensor)
        arrived = arriving.get((transfer.src, transfer.tensor), ())
        _check_transfer(transfer, source, arrived, needs)
        arriving.setdefault((transfer.dst, transfer.tensor), []).append(transfer)
    for device, shards in needs.items():
        for tensor, need in shards.items():
            have = held.get(device, {}).get(tensor)
            _check_tiling(device, need, have, arriving.get((device, tensor), []))


def _check_transfer(
    transfer: Transfer,
    source: Shard | None,
    arrived: Sequence[Transfer],
    needs: dict[int, Held],
) -> None:
    need = needs.get(transfer.dst, {}).get(transfer.tensor)
    what = f"transfer of {transfer.tensor!r} [{transfer.start}, {transfer.stop})"
    if need is None:
        raise InvalidRequestError(f"{what}: device {transfer.dst} does not need it.")
    if not need.start <= transfer.start < transfer.stop <= need.stop:
        raise InvalidRequestError(
            f"{what}: device {transfer.dst} needs [{need.start}, {need.stop}) only."
        )
    if transfer.src != DISK and not _has(transfer, source, arrived):
        raise InvalidRequestError(
            f"{what}: device {transfer.src} does not hold that interval, nor do transfers listed "
            f"before bring it; they bring {[(t.start, t.stop) for t in arrived]}."
        )
    nbytes = need.nbytes * (transfer.stop - transfer.start) // (need.stop - need.start)
    if (transfer.dim, transfer.nbytes) != (need.dim, nbytes):
        raise InvalidRequestError(
            f"{what} has dim {transfer.dim} and {transfer.nbytes} bytes, expected dim {need.dim} "
            f"and {nbytes} bytes."
        )


def _has(transfer: Transfer, source: Shard | None, arrived: Sequence[Transfer]) -> bool:
    """Whether the source holds the interval at that point of the plan, in however many parts."""
    parts = [(t.start, t.stop) for t in arrived]
    if source is not None:
        parts.append((source.start, source.stop))
    at = transfer.start
    for start, stop in sorted(parts):
        if start <= at < stop:
            at = stop
    return at >= transfer.stop


def _check_tiling(device: int, need: Shard, have: Shard | None, moved: list[Transfer]) -> None:
    """What is held and what arrives must cover [need.start, need.stop) without gap or overlap."""
    pieces = [(t.start, t.stop) for t in moved]
    if have is not None and max(have.start, need.start) < min(have.stop, need.stop):
        pieces.append((max(have.start, need.start), min(have.stop, need.stop)))
    at = need.start
    for start, stop in sorted(pieces):
        if start != at:
            break
        at = stop
    if at != need.stop or sum(stop - start for start, stop in pieces) != need.stop - need.start:
        raise InvalidRequestError(
            f"device {device} needs {need.tensor!r} [{need.start}, {need.stop}), the plan brings "
            f"or keeps {sorted(pieces)}; plan again with plan_switch."
        )
