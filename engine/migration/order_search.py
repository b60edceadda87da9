"""Pure: an order of groups of tensors in which no device ever holds more than it has room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_STATES = 2000  # of one search, before it gives up
Parked = frozenset[tuple[int, str]]  # (device, tensor) of old shards in a staging buffer


@dataclass(frozen=True, slots=True)
class Change:
    """What a switch in place does on the devices of the replicas that go or come: by tensor, the
    bytes made and freed on each of them."""

    devices: tuple[int, ...]
    made: Mapping[str, Mapping[int, int]]
    freed: Mapping[str, Mapping[int, int]]


class Group:
    """Tensors that move in one step: bytes made and freed [devices]."""

    def __init__(self, tensors: tuple[str, ...], change: Change) -> None:
        self.tensors = tensors
        self.old = {
            (device, name): nbytes
            for name in tensors
            for device, nbytes in change.freed.get(name, {}).items()
        }
        self.pairs = frozenset(self.old)
        self.made, self.freed = (
            as_bytes([sum(of.get(n, {}).get(d, 0) for n in tensors) for d in change.devices])
            for of in (change.made, change.freed)
        )
        self.kind = (self.made.tobytes(), self.freed.tobytes())  # alike: as good as one another


@dataclass(frozen=True, slots=True)
class _State:
    """Groups still to move, bytes in use beyond those at the start [devices], the shards in
    staging buffers (which do not count as in use), and how it came to that."""

    left: frozenset[int]
    used: np.ndarray
    parked: Parked = frozenset()
    path: tuple[tuple[int, Parked], ...] = ()


class Search:
    """Depth first over the orders of `groups`; `room` [devices] is what may be in use at once.

    A group that fits and leaves no device with more in use than before goes first without a
    choice: an order that has it later stays feasible with it now. Of the others that fit, the one
    that leaves most room is tried first. Where none fits, shards are parked, if that is allowed.
    """

    def __init__(
        self, groups: Sequence[Group], change: Change, room: np.ndarray, staging_bytes: int
    ) -> None:
        self._groups, self._devices = groups, change.devices
        self._room, self._staging_bytes = room, staging_bytes
        self._old = {pair: nbytes for group in groups for pair, nbytes in group.old.items()}
        self._owner = {pair: i for i, group in enumerate(groups) for pair in group.old}
        self._dead_end: _State | None = None  # the one with the fewest groups left

    def run(self) -> list[tuple[Group, Parked]] | None:
        """Groups in order, each with the shards to park before it; None when none was found."""
        seen: set[tuple[frozenset[int], Parked]] = set()
        states = [_State(frozenset(range(len(self._groups))), np.zeros_like(self._room))]
        while states and len(seen) < MAX_STATES:
            state = states.pop()
            if not state.left:
                return [(self._groups[i], parked) for i, parked in state.path]
            if (state.left, state.parked) not in seen:
                seen.add((state.left, state.parked))
                states += self._next(state)
        return None

    def shortage(self) -> str:
        """What stood in the way at the dead end that came closest."""
        state = self._dead_end
        if state is None:
            return f"no order was found among the first {MAX_STATES} states; give more memory."
        over, index = min((int(self._over(state, i).max()), i) for i in self._choices(state))
        at, group = int(self._over(state, index).argmax()), self._groups[index]
        free = int(self._room[at] - state.used[at])
        return (
            f"in place, device {self._devices[at]} must hold {int(group.made[at])} bytes more to "
            f"take {group.tensors[0]}, has {free} free then, and parking old shards in "
            f"{self._staging_bytes} bytes of staging does not make up for {over}; give more memory "
            "or staging, or start the deployment anew."
        )

    def _next(self, state: _State) -> list[_State]:
        """What may follow, the most promising last."""
        choices = self._choices(state)
        fitting = [self._after(state, i) for i in choices if self._over(state, i).max() <= 0]
        for after in fitting:
            if (after.used <= state.used).all():
                return [after]
        if fitting:
            return sorted(fitting, key=lambda after: int((self._room - after.used).min()))
        if self._dead_end is None or len(state.left) < len(self._dead_end.left):
            self._dead_end = state
        return [self._after(state, i, p) for i in choices if (p := self._parking(state, i))]

    def _choices(self, state: _State) -> list[int]:
        """One of each kind that is left: the others of it would do the same."""
        touched = {self._owner[pair] for pair in state.parked}
        kinds = {(self._groups[i].kind, i if i in touched else -1): i for i in sorted(state.left)}
        return list(kinds.values())

    def _over(self, state: _State, index: int) -> np.ndarray:
        """Bytes by which a group does not fit [devices]; 0 or less where it does."""
        over: np.ndarray = state.used + self._groups[index].made - self._room
        return over

    def _after(self, state: _State, index: int, parked: Parked = frozenset()) -> _State:
        group, waiting = self._groups[index], state.parked | parked
        used = state.used + group.made - group.freed - self._bytes_of(parked)
        used += self._bytes_of(waiting & group.pairs)  # not in use any more since they are parked
        path = (*state.path, (index, parked))
        return _State(state.left - {index}, used, waiting - group.pairs, path)

    def _bytes_of(self, pairs: Iterable[tuple[int, str]]) -> np.ndarray:
        total = np.zeros_like(self._room)
        for device, tensor in pairs:
            total[self._devices.index(device)] += self._old[device, tensor]
        return total

    def _parking(self, state: _State, index: int) -> Parked:
        """Old shards whose parking lets a group fit; none when that cannot be."""
        over, parked = self._over(state, index), set[tuple[int, str]]()
        staged = self._bytes_of(state.parked)
        for at in np.flatnonzero(over > 0):
            room = self._staging_bytes - int(staged[at])
            chosen = self._park_on(self._devices[at], int(over[at]), room, state, index)
            if not chosen:
                return frozenset()
            parked.update(chosen)
        return frozenset(parked)

    def _park_on(
        self, device: int, over: int, room: int, state: _State, index: int
    ) -> list[tuple[int, str]]:
        """Shards of at least `over` and at most `room` bytes together: one of the group itself,
        which goes at the end of its step; else one of another; else several, largest first."""
        here = [
            (self._owner[pair] != index, nbytes, pair)
            for pair, nbytes in self._old.items()
            if pair[0] == device and pair not in state.parked and self._owner[pair] in state.left
        ]
        for _, nbytes, pair in sorted(here):
            if over <= nbytes <= room:
                return [pair]
        chosen = []
        for _, nbytes, pair in sorted(here, key=lambda shard: (shard[0], -shard[1])):
            if over > 0 and nbytes <= room:
                chosen.append(pair)
                over, room = over - nbytes, room - nbytes
        return chosen if over <= 0 else []


def as_bytes(values: list[int]) -> np.ndarray:
    """[devices] of whole bytes."""
    return np.array(values, dtype=np.int64)
