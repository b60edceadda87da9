"""Lower bounds of a switch, computed apart from the engine's planner, which they judge.

Shapes come from the checkpoint's own header, slices from Megatron's rule for Llama (Shoeybi et al.,
arXiv 1909.08053): column-parallel q, k, v, gate, up; row-parallel o, down; the rest whole. All
placements of ranks on devices are tried.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from pathlib import Path

from engine.cluster import Deployment, ParallelConfig

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
Role = tuple[int, int, int] | None  # tp, pp and rank of what a device does; None: idle
Held = dict[str, tuple[int, int]]  # tensor -> bytes [start, stop), counted along the sliced axis


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Bytes of every tensor, and the number of layers."""

    nbytes: dict[str, int]
    num_layers: int

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """From the header of the one safetensors file."""
        with (folder / "model.safetensors").open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        sizes = {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items()}
        return cls(sizes, json.loads((folder / "config.json").read_text())["num_hidden_layers"])

    def held(self, role: Role) -> Held:
        """What a device must hold for its role."""
        if role is None:
            return {}
        tp, pp, rank = role
        stage, part = divmod(rank, tp)
        first, stop = stage * self.num_layers // pp, (stage + 1) * self.num_layers // pp
        found: Held = {}
        for name, nbytes in self.nbytes.items():
            if name.startswith("model.layers."):
                if not first <= int(name.split(".")[2]) < stop:
                    continue
            elif not _outside_layers(name, stage, pp, part):
                continue
            if any(kind in name for kind in (*COLUMN, *ROW)):
                found[name] = nbytes * part // tp, nbytes * (part + 1) // tp
            else:
                found[name] = 0, nbytes
        return found


def _outside_layers(name: str, stage: int, pp: int, part: int) -> bool:
    if "embed_tokens" in name:
        return stage == 0
    last = stage == pp - 1
    return last and (part == 0 or "lm_head" not in name)  # one rank makes logits


def roles_of(deployment: Deployment, num_devices: int) -> list[Role]:
    """The role of every device."""
    roles: list[Role] = [None] * num_devices
    for replica in deployment.replicas:
        for rank, device in enumerate(replica.placement.devices):
            roles[device] = (replica.parallel.tp, replica.parallel.pp, rank)
    return roles


def _lacking(needed: Held, held: Held) -> int:
    total = 0
    for name, (start, stop) in needed.items():
        have_start, have_stop = held.get(name, (0, 0))
        total += stop - start - max(0, min(stop, have_stop) - max(start, have_start))
    return total


def least_bytes(
    checkpoint: Checkpoint, current: Sequence[Role], target: Iterable[ParallelConfig]
) -> int:
    """Fewest bytes that any placement of the target's ranks lets cross a link: brute force."""
    wanted: list[Role] = [(c.tp, c.pp, rank) for c in target for rank in range(c.num_devices)]
    wanted += [None] * (len(current) - len(wanted))
    cost = {
        (have, want): _lacking(checkpoint.held(want), checkpoint.held(have))
        for have in set(current)
        for want in set(wanted)
    }
    orders = set(permutations(wanted))
    return min(sum(cost[h, w] for h, w in zip(current, order, strict=True)) for order in orders)


@dataclass(frozen=True, slots=True)
class PortLoad:
    """The heaviest loaded port of a placement: no schedule, forwarding included, beats it."""

    nbytes: int
    num_receivers: int  # devices that lack something


def port_load(checkpoint: Checkpoint, current: Sequence[Role], target: Sequence[Role]) -> PortLoad:
    """What a device must receive, or what must leave a set of devices because nobody else holds
    it, spread evenly over the set; the largest of these."""
    held = [checkpoint.held(role) for role in current]
    needed = [checkpoint.held(role) for role in target]
    received = [_lacking(need, have) for need, have in zip(needed, held, strict=True)]
    loads = [max(received, default=0)]
    only: dict[frozenset[int], int] = {}
    for name in checkpoint.nbytes:
        for holders, nbytes in _missing_pieces(name, held, needed):
            only[holders] = only.get(holders, 0) + nbytes
    devices = range(len(held))
    for size in range(1, len(held) + 1):
        for sources in combinations(devices, size):
            inside = sum(n for holders, n in only.items() if holders <= set(sources))
            loads.append(math.ceil(inside / size))
    return PortLoad(max(loads), sum(n > 0 for n in received))


def _missing_pieces(
    name: str, held: Sequence[Held], needed: Sequence[Held]
) -> Iterable[tuple[frozenset[int], int]]:
    """(holders, bytes) of every interval of a tensor that some device needs and lacks."""
    have = {d: h[name] for d, h in enumerate(held) if name in h}
    need = {d: n[name] for d, n in enumerate(needed) if name in n}
    borders = sorted({b for interval in (*have.values(), *need.values()) for b in interval})
    for start, stop in pairwise(borders):
        holders = frozenset(d for d, (a, b) in have.items() if a <= start and stop <= b)
        needers = {d for d, (a, b) in need.items() if a <= start and stop <= b}
        if needers - holders:
            yield holders, stop - start
