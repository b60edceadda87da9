"""The model of a live switch: when its phases end, and what becomes of the sequences. Pure.

The old deployment serves through prepare and transfer of the weights. Then the replicas that
leave finish their steps in flight and stand still while KV moves, and the new ones take over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.cluster import DISK, Binding, Deployment, SwitchPhase, SwitchPlan, SwitchTicket
from engine.migration.binding import bind_sequence
from engine.migration.plan import link_seconds
from engine.profile import ServingProfile
from envs.surrogate import kernel

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster

NEVER_DRAINS = 1 << 30  # tokens: here nothing waits for the end of a sequence
Move = tuple[int, int, int]  # slot, new row, KV blocks reserved there (0: recompute)


class SurrogateSwitch:
    """One switch. `due_s` is when the next thing happens; the cluster calls `cross_border`.

    With `fails_at` it fails after that share of the time until the weights are there.
    """

    def __init__(
        self,
        plan: SwitchPlan,
        ticket_id: str,
        current: Deployment,
        profile: ServingProfile,
        factor: float,
        fails_at: float | None = None,
    ) -> None:
        self.plan, self._profile, self._factor = plan, profile, factor
        kept = set(current.replicas) & set(plan.target.replicas)
        self.leaving = [r for r in current.replicas if r not in kept]
        self.coming = [r for r in plan.target.replicas if r not in kept]
        self.ticket = SwitchTicket(
            ticket_id=ticket_id,
            phase=SwitchPhase.PREPARE,
            from_key=current.key,
            to_key=plan.target.key,
            from_epoch=plan.expected_epoch,
            started_s=0.0,
            updated_s=0.0,
            decision_id=plan.decision_id,
        )
        self.border_s = 0.0
        self._moves: list[Move] = []
        self._paused_at_s: float | None = None
        self._is_bound = False
        self._phase_began_s = 0.0
        self._fails_at, self._fails_at_s = fails_at, float("inf")

    @property
    def due_s(self) -> float:
        return min(self.border_s, self._fails_at_s)

    def start(self, host: SurrogateCluster, now_s: float) -> None:
        self.ticket = replace(self.ticket, started_s=now_s, updated_s=now_s)
        self._phase_began_s = now_s
        self.border_s = now_s + self._profile.switch_overhead_s * self._factor
        if self._fails_at is not None:
            self._fails_at_s = now_s + self._fails_at * (self._weights_arrive_s(now_s) - now_s)
        host.publish(self.ticket)

    def cross_border(self, host: SurrogateCluster, now_s: float) -> None:
        """Do what is due at `due_s`, which is `now_s`."""
        if now_s >= self._fails_at_s:
            reason = "failed as drawn, before all weights were there"
            self._undo(host, now_s, SwitchPhase.ROLLED_BACK, reason)
        elif self.ticket.phase is SwitchPhase.PREPARE:
            self._enter(host, SwitchPhase.TRANSFER, now_s)
            host.move_with(self._mover_cores, now_s)
            self.border_s = self._weights_arrive_s(now_s)
        elif not self.leaving:
            self._commit(host, now_s)
        elif self._paused_at_s is None:
            self._pause(host, now_s)
        elif (quiet_s := self._quiet_s(host, now_s)) > now_s:
            self.border_s = quiet_s
        elif not self._is_bound:
            self._bind(host, now_s)
        else:
            self._commit(host, now_s)

    def cancel(self, host: SurrogateCluster, now_s: float) -> None:
        self._undo(host, now_s, SwitchPhase.CANCELLED, "cancelled on request")

    def forget_failure(self) -> None:
        """Nobody knows whether it will fail."""
        self._fails_at_s = float("inf")

    def lose(self, host: SurrogateCluster, device: int, now_s: float) -> None:
        """A worker is gone. The switch fails where that has a part in it, else it is called off."""
        devices = {d for r in (*self.leaving, *self.coming) for d in r.placement.devices}
        devices |= {d for t in self.plan.transfers for d in (t.src, t.dst)}
        if device in devices:
            self._undo(host, now_s, SwitchPhase.ROLLED_BACK, f"worker {device} is lost")
        else:
            self.cancel(host, now_s)

    def _undo(self, host: SurrogateCluster, now_s: float, phase: SwitchPhase, reason: str) -> None:
        """The old deployment serves on; nothing of the new one is left."""
        state = host.state
        host.move_with(0.0, now_s)
        for _, row, blocks in self._moves:
            state.replicas[row]["free_blocks"] += blocks
            state.wake(row, now_s)  # one that stays may have lacked them
        if self._is_bound:
            host.drop_rows(self.coming)
        for replica in self.leaving:
            row = host.row_of(replica)
            state.replicas[row]["is_open"], state.replicas[row]["is_paused"] = 1, 0
            state.wake(row, now_s)
        host.route_held(now_s)
        self._update(host, now_s, phase=phase, reason=reason, pause_s=self._pause_s(now_s))

    def reserved_blocks(self) -> dict[int, int]:
        """Row -> blocks taken there for sequences still on their old replicas."""
        reserved: dict[int, int] = {}
        for _, row, blocks in self._moves:
            reserved[row] = reserved.get(row, 0) + blocks
        return reserved

    # ---------------------------------------------------------------- phases

    @property
    def _mover_cores(self) -> float:
        """One for each device that sends or receives weights."""
        transfers = self.plan.transfers
        return float(len({device for t in transfers for device in (t.src, t.dst)} - {DISK}))

    def _update(self, host: SurrogateCluster, now_s: float, **changes: Any) -> None:
        self.ticket = replace(self.ticket, updated_s=now_s, **changes)
        host.publish(self.ticket)

    def _enter(self, host: SurrogateCluster, phase: SwitchPhase, now_s: float) -> None:
        ended = (self.ticket.phase.value, now_s - self._phase_began_s)
        self._phase_began_s = now_s
        self._update(host, now_s, phase=phase, phase_s=(*self.ticket.phase_s, ended))

    def _weights_arrive_s(self, now_s: float) -> float:
        """Overhead and links as profiled, or the plan's prediction if that is longer."""
        started_s = self.ticket.started_s
        moving_s = link_seconds(self.plan.transfers, self._profile.link_bytes_per_s)
        whole_s = max(self.plan.predicted_s, self._profile.switch_overhead_s + moving_s)
        return max(now_s, started_s + whole_s * self._factor)

    def _pause(self, host: SurrogateCluster, now_s: float) -> None:
        """Leaving replicas take nothing new and start no step; those in flight end first."""
        self._paused_at_s = now_s
        for replica in self.leaving:
            record = host.state.replicas[host.row_of(replica)]
            record["is_open"], record["is_paused"] = 0, 1
        self.border_s = self._quiet_s(host, now_s)
        self._update(host, now_s, weight_bytes=self.plan.weight_bytes)

    def _quiet_s(self, host: SurrogateCluster, now_s: float) -> float:
        """When the last step in flight on the replicas that leave has ended."""
        return max(host.state.quiet_s(host.row_of(r), now_s) for r in self.leaving)

    def _bind(self, host: SurrogateCluster, now_s: float) -> None:
        """Choose a new replica for every sequence; migrate or recompute; reserve blocks."""
        self._is_bound = True
        host.add_rows(self.coming)
        slots = [s for r in self.leaving for s in host.state.sequences_of(host.row_of(r))]
        model = host.spec.model
        per_token = model.kv_bytes_per_token(model.num_layers, model.num_kv_heads)
        chosen = self._choose(host, slots)
        self._moves = [
            (slot, row, self._reserve(host, slot, row, per_token))
            for slot, row in zip(slots, chosen, strict=True)
        ]
        migrated = [slot for slot, _, blocks in self._moves if blocks]
        kv_bytes = int(host.state.seqs["computed_tokens"][migrated].sum()) * per_token
        moving_s = kv_bytes / self._profile.link_bytes_per_s
        self.border_s = now_s + (self._profile.pause_overhead_s + moving_s) * self._factor
        self._update(
            host,
            now_s,
            kv_bytes=kv_bytes,
            num_migrated=len(migrated),
            num_recomputed=len(slots) - len(migrated),
        )

    def _choose(self, host: SurrogateCluster, slots: list[int]) -> list[int]:
        """The router's rule without weights over the new deployment, in one go: rows."""
        replicas = host.state.replicas.copy()
        rows = np.array([host.row_of(r) for r in self.plan.target.replicas], np.int64)
        replicas["is_open"][rows] = 1
        chosen = np.zeros(len(slots), np.int64)
        kernel.spread(
            host.state.seqs,
            replicas,
            rows,
            host.spec.block_size,
            np.array(slots, np.int64),
            chosen,
        )
        return [int(row) for row in chosen]

    def _reserve(self, host: SurrogateCluster, slot: int, row: int, per_token: int) -> int:
        computed = int(host.state.seqs[slot]["computed_tokens"])
        needed = -(-computed // host.spec.block_size)
        replica = host.state.replicas[row]
        fits = needed <= replica["free_blocks"]
        bound = bind_sequence(
            self.plan.kv, "", computed, computed * per_token, bool(fits), NEVER_DRAINS
        )
        if bound.binding is Binding.RECOMPUTE:
            return 0
        replica["free_blocks"] -= needed
        return needed

    def _pause_s(self, now_s: float) -> float:
        return 0.0 if self._paused_at_s is None else now_s - self._paused_at_s

    def _commit(self, host: SurrogateCluster, now_s: float) -> None:
        if not self.leaving:
            host.add_rows(self.coming)
        host.move_with(0.0, now_s)
        self._enter(host, SwitchPhase.COMMIT, now_s)
        host.drop_rows(self.leaving)
        host.commit(self.plan.target)
        self._hand_over(host, now_s)
        host.route_held(now_s)
        for replica in self.plan.target.replicas:
            host.state.wake(host.row_of(replica), now_s)
        self._update(host, now_s, phase=SwitchPhase.DONE, pause_s=self._pause_s(now_s))

    def _hand_over(self, host: SurrogateCluster, now_s: float) -> None:
        state = host.state
        moves, self._moves = self._moves, []
        work_s = state.work_time(now_s)
        for slot, row, blocks in sorted(moves, key=lambda move: move[2] == 0):
            state.seqs[slot]["blocks"] = blocks
            state.seqs[slot]["num_moves"] += 1
            add = kernel.adopt if blocks else kernel.enqueue
            add(state.seqs, state.replicas, state.lists, state.counts[0], slot, row, work_s)
