"""The model of a live switch: when its phases end, and what becomes of the sequences. Pure.

As in `engine.migration.switch`: the old deployment serves on beside the weights that arrive, with
fewer KV blocks where memory is short; then KV is copied in rounds while sequences run, those that
are to end where they are do so, and the replicas that go stand still for the last copy. Copies take
what the busiest port needs for their bytes, and the last one `pause_overhead_s` more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from engine.cluster import SwitchPhase
from engine.migration.binding import drain_timeout_s, is_round_due
from engine.migration.order import default_staging_bytes
from engine.migration.plan import link_seconds
from engine.migration.room import kv_limits
from engine.migration.schedule import devices_of
from envs.surrogate.kv_rounds import KvRounds
from envs.surrogate.phases import PhasedSwitch, SwitchSetup

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster


class LiveSwitch(PhasedSwitch):
    """Both generations side by side until the commit."""

    def __init__(self, setup: SwitchSetup) -> None:
        super().__init__(setup)
        self._limits: dict[int, int] = {}  # KV blocks, by replica id
        self._rounds = KvRounds(self.plan, self.leaving)
        self._rounds_s: tuple[float, ...] = ()
        self._round_began_s = self._drain_until_s = 0.0
        self._has_rows = False

    def _prepare(self, host: SurrogateCluster) -> None:
        self._limits = kv_limits(
            host.spec,
            self._old,
            self.plan.target,
            {r.replica_id: host.state.used_blocks(host.rows.of(r)) for r in self.leaving},
            default_staging_bytes(host.spec),
        )
        for replica in self.leaving:
            host.state.limit_blocks(host.rows.of(replica), self._limits[replica.replica_id])

    def copy(self) -> Self:
        other = super().copy()
        other._rounds = self._rounds.copy()
        return other

    def reserved_blocks(self) -> dict[int, int]:
        return self._rounds.reserved_blocks()

    def _undo(self, host: SurrogateCluster, now_s: float, phase: SwitchPhase, reason: str) -> None:
        self._rounds.undo(host, now_s)
        if self._has_rows:
            host.rows.drop(host.state, self.coming)
        self._resume(host, now_s)
        self._end(host, now_s, phase=phase, reason=reason)

    # ---------------------------------------------------------------- weights

    def _begin_transfer(self, host: SurrogateCluster, now_s: float) -> None:
        self._enter(host, SwitchPhase.TRANSFER, now_s)
        host.move_with(self._weight_movers, now_s)
        self._then(LiveSwitch._have_weights, now_s + self._moving_s * self._factor)

    def _have_weights(self, host: SurrogateCluster, now_s: float) -> None:
        sent_bytes = self.plan.weight_bytes
        self._update(host, now_s, weight_bytes=sent_bytes, moved_bytes=sent_bytes)
        self._has_rows = True
        host.rows.add(host.state, self.coming)
        for replica in self.coming:
            host.state.limit_blocks(host.rows.of(replica), self._limits[replica.replica_id])
        if self.leaving:
            self._begin_round(host, now_s)
            self._next = LiveSwitch._end_round
        else:
            self._commit(host, now_s)

    # ---------------------------------------------------------------- KV

    def _begin_round(self, host: SurrogateCluster, now_s: float, is_last: bool = False) -> None:
        copies = self._rounds.begin(host, now_s, is_last)
        host.move_with(float(len(devices_of(copies))), now_s)
        overhead_s = self._profile.pause_overhead_s if is_last else 0.0
        copying_s = link_seconds(copies, self._profile.link_bytes_per_s)
        self._round_began_s = now_s
        self.border_s = now_s + (overhead_s + copying_s) * self._factor

    def _count_round(self, host: SurrogateCluster, now_s: float) -> None:
        self._update(
            host,
            now_s,
            kv_bytes=self._rounds.kv_bytes,
            moved_bytes=self.plan.weight_bytes + self._rounds.kv_bytes,
            num_kv_rounds=self.ticket.num_kv_rounds + 1,
        )

    def _end_round(self, host: SurrogateCluster, now_s: float) -> None:
        self._count_round(host, now_s)
        self._rounds_s = (*self._rounds_s, now_s - self._round_began_s)
        if is_round_due(self._rounds_s, self.plan.kv.decode_step_s):
            self._begin_round(host, now_s)
        elif draining := self._rounds.draining:
            host.move_with(0.0, now_s)
            self._drain_until_s = now_s + drain_timeout_s(draining.values())
            self._wait(host, now_s)
        else:
            self._stop(host, now_s)

    def _wait(self, host: SurrogateCluster, now_s: float) -> None:
        """Until no sequence is left that was to end where it is, at the latest to the deadline."""
        next_s = self._rounds.next_end_s(host, now_s)
        if next_s is None or now_s >= self._drain_until_s:
            self._begin_round(host, now_s)
            self._next = LiveSwitch._end_round_after_drain
        else:
            self._then(LiveSwitch._wait, min(next_s, self._drain_until_s))

    def _end_round_after_drain(self, host: SurrogateCluster, now_s: float) -> None:
        self._count_round(host, now_s)
        self._stop(host, now_s)

    # ---------------------------------------------------------------- the stop

    def _stop(self, host: SurrogateCluster, now_s: float) -> None:
        host.move_with(0.0, now_s)
        self._then(LiveSwitch._stand_still, self._pause(host, now_s))

    def _stand_still(self, host: SurrogateCluster, now_s: float) -> None:
        self.border_s = self._quiet_s(host, now_s)
        if self.border_s <= now_s:
            self._begin_round(host, now_s, is_last=True)
            self._next = LiveSwitch._commit

    def _commit(self, host: SurrogateCluster, now_s: float) -> None:
        moving = self._rounds
        if self.leaving:
            self._count_round(host, now_s)
        host.move_with(0.0, now_s)
        self._enter(host, SwitchPhase.COMMIT, now_s)
        host.rows.drop(host.state, self.leaving)
        host.commit(self.plan.target)
        moving.hand_over(host, now_s)
        host.route_held(now_s)
        for replica in self.plan.target.replicas:
            row = host.rows.of(replica)
            host.state.limit_blocks(row, None)
            host.state.wake(row, now_s)
        self._end(
            host,
            now_s,
            phase=SwitchPhase.DONE,
            num_migrated=moving.num_migrated,
            num_recomputed=moving.num_recomputed,
            num_drained=moving.num_drained,
        )
