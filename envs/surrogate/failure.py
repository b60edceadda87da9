"""The model of lost devices: what goes with them, how an engine without replicas heals. Pure.

The rules are those of `engine.runtime` and `engine.healing`. Requests of a lost replica start over
elsewhere; without any replica they wait, and new ones are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import inf
from typing import TYPE_CHECKING

from engine.cluster import HEAL_TIMEOUT_S, Deployment, EventKind, Replica
from engine.profile import ServingProfile
from engine.shards import rank_weight_bytes
from envs.scenarios import DeviceFailure

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster


class Failures:
    """Dead devices and those to come. `border_s` is when the next thing happens; the cluster calls
    `cross_border`. `wanted` is the deployment that was last chosen."""

    def __init__(self, wanted: Deployment, profile: ServingProfile, factor: float) -> None:
        self.wanted, self._profile, self._factor = wanted, profile, factor
        self._losses: tuple[DeviceFailure, ...] = ()  # to come, by time
        self._back_s: dict[int, float] = {}  # of dead devices
        self._stopped: tuple[Replica, ...] = ()  # broken, to be taken out after the switch
        self._deadline_s = inf
        self._is_late = False  # past the deadline, part of `wanted` is good enough
        self._loading: tuple[Replica, ...] = ()
        self._loaded_s = inf

    def copy(self) -> Failures:
        other = copy(self)
        other._back_s = self._back_s.copy()
        return other

    def schedule(self, losses: Sequence[DeviceFailure]) -> None:
        self._losses = tuple(sorted([*self._losses, *losses], key=lambda loss: loss.at_s))

    def forget(self) -> None:
        """Nobody knows of losses to come, nor when what is dead will be back."""
        self._losses = ()
        self._back_s = dict.fromkeys(self._back_s, inf)

    @property
    def dead_devices(self) -> frozenset[int]:
        return frozenset(self._back_s)

    @property
    def loading_key(self) -> str:
        """Key of what is being loaded from disk, empty when nothing is."""
        return Deployment(self._loading).key if self._loading else ""

    @property
    def border_s(self) -> float:
        return min(self._lost_s, self._joined_s, self._loaded_s, self._deadline_s)

    @property
    def _lost_s(self) -> float:
        return self._losses[0].at_s if self._losses else inf

    @property
    def _joined_s(self) -> float:
        return min(self._back_s.values(), default=inf)

    def cross_border(self, host: SurrogateCluster, now_s: float) -> None:
        """Do one thing that is due at `border_s`, which is `now_s`."""
        if self._joined_s <= now_s:
            self._join(host, now_s)
        elif self._loaded_s <= now_s:
            replicas, self._loading, self._loaded_s = self._loading, (), inf
            host.load(Deployment(replicas), now_s)
        elif self._lost_s <= now_s:
            loss, *rest = self._losses
            self._losses = tuple(rest)
            self._lose(host, loss, now_s)
        else:
            self._deadline_s, self._is_late = inf, True
        self.heal(host, now_s)

    def heal(self, host: SurrogateCluster, now_s: float) -> None:
        """Once no switch runs: take out broken replicas; begin to load `wanted` where none is left
        and its devices are there. When it is late those that can be are loaded, and what waits
        fails when none can."""
        if host.is_switching:
            return
        broken = [r for r in host.deployment.replicas if r in self._stopped or self._is_broken(r)]
        self._stopped = ()
        if broken:
            host.lose_replicas(broken, now_s)
        if host.deployment.replicas or self._loading:
            return
        alive = tuple(r for r in self.wanted.replicas if not self._is_broken(r))
        if alive and (self._is_late or alive == self.wanted.replicas):
            self._loading = alive
            self._loaded_s = now_s + self._load_seconds(host, alive)
        elif self._is_late:
            host.fail_held(now_s)

    def begin_healing(self, now_s: float) -> None:
        """No replica is left."""
        self._deadline_s, self._is_late = now_s + HEAL_TIMEOUT_S, False

    def _is_broken(self, replica: Replica) -> bool:
        return not self.dead_devices.isdisjoint(replica.placement.devices)

    def _load_seconds(self, host: SurrogateCluster, replicas: tuple[Replica, ...]) -> float:
        """As a switch that reads all of it from disk."""
        most_bytes = max(
            rank_weight_bytes(host.spec.model, r.parallel, rank)
            for r in replicas
            for rank in range(r.parallel.num_devices)
        )
        read_s = most_bytes / self._profile.link_bytes_per_s
        return (self._profile.switch_overhead_s + read_s) * self._factor

    def _join(self, host: SurrogateCluster, now_s: float) -> None:
        device = min(self._back_s, key=lambda d: (self._back_s[d], d))
        del self._back_s[device]
        host.tell_device(EventKind.DEVICE_JOINED, device, now_s)

    def _lose(self, host: SurrogateCluster, loss: DeviceFailure, now_s: float) -> None:
        """The device and the running switch; `heal` takes out the replicas with a rank there."""
        if loss.device in self._back_s:  # dead already
            self._back_s[loss.device] = max(self._back_s[loss.device], loss.back_at_s)
            return
        self._back_s[loss.device] = loss.back_at_s
        host.tell_device(EventKind.DEVICE_LOST, loss.device, now_s)
        if any(self._is_broken(r) for r in self._loading):
            self._loading, self._loaded_s = (), inf
        host.lose_switch(loss.device, now_s)
        if host.is_switching:  # it must not see the deployment change
            self._stopped += tuple(r for r in host.deployment.replicas if self._is_broken(r))
            host.stop(self._stopped)
