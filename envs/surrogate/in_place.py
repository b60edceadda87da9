"""The model of a switch in place, for when memory is too short for two generations. Pure.

As in `engine.migration.in_place`: the replicas that go stand still from the moment the new ranks
are prepared to the commit, their KV is dropped, and the steps move their tensors one after the
other, each as long as its busiest port. All their sequences are recomputed. Once an old shard is
gone the switch only goes forward: new ranks that a failure has left incomplete are read from disk,
at the speed of a link, and replicas that lack a device are left out.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from engine.cluster import Deployment, SwitchPhase
from engine.migration.order import InPlaceStep, default_staging_bytes, in_place_order
from engine.migration.plan import link_seconds
from engine.shards import rank_weight_bytes
from envs.surrogate import kernel
from envs.surrogate.phases import PhasedSwitch, SwitchSetup, choose_rows

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster


class InPlaceSwitch(PhasedSwitch):
    """See the module."""

    def __init__(self, setup: SwitchSetup) -> None:
        super().__init__(setup)
        self._steps: tuple[InPlaceStep, ...] = ()
        self._borders_s: tuple[float, ...] = ()  # step i lasts from the i-th to the next
        self._slots: tuple[int, ...] = ()  # of the sequences on the replicas that go
        self._target = self.plan.target

    def _prepare(self, host: SurrogateCluster) -> None:
        staging_bytes = default_staging_bytes(host.spec)
        self._steps = in_place_order(
            host.spec, self._old, self.plan.target, self.plan.transfers, staging_bytes
        )

    @cached_property
    def _steps_s(self) -> list[float]:
        link_bytes_per_s = self._profile.link_bytes_per_s
        return [link_seconds(step.transfers, link_bytes_per_s) for step in self._steps]

    @cached_property
    def _links_s(self) -> float:
        return sum(self._steps_s)

    # ---------------------------------------------------------------- stages

    def _begin_transfer(self, host: SurrogateCluster, now_s: float) -> None:
        self._enter(host, SwitchPhase.TRANSFER, now_s)
        if self.leaving:
            self._then(InPlaceSwitch._stand_still, self._pause(host, now_s))
        else:
            self._move(host, now_s)

    def _stand_still(self, host: SurrogateCluster, now_s: float) -> None:
        self.border_s = self._quiet_s(host, now_s)
        if self.border_s <= now_s:
            self._move(host, now_s)

    def _move(self, host: SurrogateCluster, now_s: float) -> None:
        """The KV is gone, and tensors move."""
        rows = [host.rows.of(r) for r in self.leaving]
        self._slots = tuple(slot for row in rows for slot in host.state.sequences_of(row))
        host.move_with(self._weight_movers, now_s)
        whole_s = self._moving_s * self._factor
        steps_s = self._steps_s
        scale = whole_s / sum(steps_s) if any(steps_s) else 0.0
        self._borders_s = tuple(accumulate((s * scale for s in steps_s), initial=now_s))
        self._then(InPlaceSwitch._have_weights, now_s + whole_s)

    def _have_weights(self, host: SurrogateCluster, now_s: float) -> None:
        sent_bytes = self.plan.weight_bytes
        self._update(host, now_s, weight_bytes=sent_bytes, moved_bytes=sent_bytes)
        pause_s = self._profile.pause_overhead_s * self._factor
        self._then(InPlaceSwitch._commit, now_s + pause_s)

    def _commit(self, host: SurrogateCluster, now_s: float) -> None:
        target, state = self._target, host.state
        host.move_with(0.0, now_s)
        self._enter(host, SwitchPhase.COMMIT, now_s)
        host.rows.add(host.state, [r for r in self.coming if r in target.replicas])
        slots = list(self._slots)
        rows = choose_rows(host, target.replicas, (), np.array(slots, np.int64))
        host.rows.drop(host.state, self.leaving)
        host.commit(target)
        state.start_over(slots)
        work_s = state.work_time(now_s)
        kernel.enqueue_all(
            state.seqs,
            state.replicas,
            state.lists,
            state.counts[0],
            np.array(slots, np.int64),
            np.array(rows, np.int64),
            work_s,
        )
        host.route_held(now_s)
        self._end(host, now_s, phase=SwitchPhase.DONE, num_recomputed=len(slots))

    # ---------------------------------------------------------------- failures

    def cancel(self, host: SurrogateCluster, now_s: float) -> None:
        if self._is_old_whole(now_s):
            super().cancel(host, now_s)
        else:
            reason = "cannot be cancelled: old weights are gone, it rolls forward"
            self._update(host, now_s, reason=reason)

    def _undo(self, host: SurrogateCluster, now_s: float, phase: SwitchPhase, reason: str) -> None:
        if self._borders_s:
            for replica in self.leaving:
                host.state.preempt_all(host.rows.of(replica))
        self._resume(host, now_s)
        self._end(host, now_s, phase=phase, reason=reason)

    def _fail(self, host: SurrogateCluster, now_s: float, reason: str) -> None:
        if self._is_old_whole(now_s):
            super()._fail(host, now_s, reason)
        else:
            self._roll_forward(host, now_s, f"rolled forward after: {reason}")

    def _is_old_whole(self, now_s: float) -> bool:
        """Neither parked, before a step, nor freed, after it."""
        borders = zip(self._steps, self._borders_s, self._borders_s[1:], strict=False)
        return not any(
            (step.parked and begin_s <= now_s) or (step.freed and end_s <= now_s)
            for step, begin_s, end_s in borders
        )

    def _roll_forward(self, host: SurrogateCluster, now_s: float, reason: str) -> None:
        """Commit to all that can be completed, or lose all that was to be replaced."""
        left_out = [r for r in self.coming if host.dead_devices & set(r.placement.devices)]
        reason += "".join(f"; left out {r.parallel.key}: it lacks a device" for r in left_out)
        self._target = Deployment(tuple(r for r in self._target.replicas if r not in left_out))
        host.move_with(0.0, now_s)
        if not self._target.replicas:
            host.lose_replicas(self.leaving, now_s)
            self._end(host, now_s, phase=SwitchPhase.ROLLED_BACK, reason=reason)
            return
        self._borders_s = tuple(s if s <= now_s else inf for s in self._borders_s)  # for good
        read_s = self._read_bytes(host) / self._profile.link_bytes_per_s
        self._update(host, now_s, reason=reason, to_key=self._target.key)
        whole_s = read_s + self._profile.pause_overhead_s
        self._then(InPlaceSwitch._commit, now_s + whole_s * self._factor)

    def _read_bytes(self, host: SurrogateCluster) -> int:
        """The most that a new rank reads whose replica a step that was not made would have made."""
        todo = [
            s for s, end_s in zip(self._steps, self._borders_s[1:], strict=True) if end_s == inf
        ]
        incomplete = {device for step in todo for device, _ in step.made}
        return max(
            (
                rank_weight_bytes(host.spec.model, r.parallel, rank)
                for r in self.coming
                if r in self._target.replicas and incomplete & set(r.placement.devices)
                for rank in range(r.parallel.num_devices)
            ),
            default=0,
        )
