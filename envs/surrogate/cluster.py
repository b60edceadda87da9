"""SurrogateCluster: the engine's behaviour, computed. A `Drivable` with its own clock. Pure.

Only the time of a step is a model (`StepTimeModel`, measured on the engine); which sequences run
in it, which blocks they hold and where requests go follow the engine's own rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from math import inf

import numpy as np

from engine.cluster import (
    ClusterSnapshot,
    ClusterSpec,
    Deployment,
    EventBatch,
    EventKind,
    ParallelConfig,
    Replica,
    Request,
    Routing,
    SwitchMode,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import InfeasibleError, NotFoundError, StaleEpochError, SwitchInProgressError
from engine.events import EventLog
from engine.migration.plan import check_memory
from engine.profile import ProfiledCluster
from engine.shards import num_kv_blocks
from envs.scenarios import DeviceFailure
from envs.surrogate import kernel, layout
from envs.surrogate.failure import Failures
from envs.surrogate.in_place import InPlaceSwitch
from envs.surrogate.latency import check_knots, step_records
from envs.surrogate.layout import WAITING
from envs.surrogate.phases import PhasedSwitch, SwitchSetup
from envs.surrogate.record import Records, Slots, log_events, traffic_columns
from envs.surrogate.rows import Rows
from envs.surrogate.state import SurrogateState, new_records, request_records
from envs.surrogate.switch import LiveSwitch
from policies.base import Counts, Future, LengthSampler, Rollout, Seconds, TrafficColumns


@lru_cache(maxsize=16)
def kv_blocks(cluster: ProfiledCluster) -> dict[ParallelConfig, int]:
    """KV blocks of a replica of each profiled configuration that the model can be split into."""
    spec, blocks = cluster.spec, {}
    for parallel in cluster.profile.configs:
        try:
            spec.model.check(parallel)
        except InfeasibleError:
            continue
        blocks[parallel] = num_kv_blocks(spec, parallel)
    return blocks


class SurrogateCluster:
    """Serves submitted requests on a simulated clock that starts at 0.

    `spread` perturbs the profile: step times and switch times are multiplied by one factor each,
    exp(spread * normal), drawn from `seed` (domain randomisation). Zero follows the profile.
    A switch fails with `rollback_probability`, drawn from `seed` and its number.
    Of each prompt's full blocks `prefix_hit_rate` count as computed when it is admitted, anew after
    a preemption; blocks are not shared, so memory is as without.
    With `columns`, requests come and go as arrays (`submit_columns`, `take_columns`), and the
    event log holds switches alone.
    With `trace_items`, the first so many items of steps are kept for `trace`.
    """

    def __init__(
        self,
        cluster: ProfiledCluster,
        initial: Deployment,
        max_queue: int = 100_000,
        seed: int = 0,
        spread: float = 0.0,
        columns: bool = False,
        prefix_hit_rate: float = 0.0,
        rollback_probability: float = 0.0,
        trace_items: int = 0,
    ) -> None:
        if not 0 <= prefix_hit_rate <= 1:
            raise ValueError(f"prefix_hit_rate is {prefix_hit_rate}; expected 0 to 1.")
        self._seed, self._rollback_probability = seed, rollback_probability
        self._profiled = cluster
        self._num_blocks = kv_blocks(cluster)
        self.check_deployment(initial)
        step_factor, self._switch_factor = np.exp(
            spread * np.random.default_rng(seed).standard_normal(2)
        ).tolist()
        self.rows = Rows(self._num_blocks, step_records(cluster.profile, step_factor))
        crowding = cluster.profile.crowding
        check_knots("the profile's crowding has", len(crowding.processors))
        check_knots("the profile's crowding of memory has", len(crowding.memory))
        self.state = SurrogateState(cluster.spec, max_queue, crowding, prefix_hit_rate, trace_items)
        self._now_s = 0.0
        self._pending: list[Request] = []  # not arrived yet
        self._waiting = np.zeros(0, layout.SEQUENCE)  # the same, with columns
        self._columns: list[TrafficColumns] | None = [] if columns else None
        self._log = EventLog()
        self._tickets: dict[str, SwitchTicket] = {}
        self._switch: PhasedSwitch | None = None
        self._failures = Failures(initial, cluster.profile, self._switch_factor)
        self._epoch = 0
        self.rows.add(self.state, initial.replicas)
        self._serve(initial)

    # ---------------------------------------------------------------- Cluster

    @property
    def spec(self) -> ClusterSpec:
        return self._profiled.spec

    def snapshot(self) -> ClusterSnapshot:
        counts = self.state.counts[0]
        return ClusterSnapshot(
            now_s=self._now_s,
            epoch=self._epoch,
            deployment=self._deployment,
            routing=self._routing,
            replicas=tuple(
                self.state.stats(self.rows.order, self._deployment.replicas, self._now_s)
            ),
            switch=next(reversed(self._tickets.values()), None),
            dead_devices=tuple(sorted(self._failures.dead_devices)),
            num_arrived=int(counts["arrived"]),
            num_finished=int(counts["finished"]),
            num_rejected=int(counts["rejected"]),
            num_queued_unrouted=int(self.state.lists[-1, WAITING]["count"]),
        )

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        """Start a switch; see `Cluster.apply`. InvalidRequestError for an unprofiled
        configuration."""
        if self._failures.loading_key:
            raise SwitchInProgressError(
                f"{self._failures.loading_key} is being loaded again; plan again when it is."
            )
        if self._switch is not None:
            raise SwitchInProgressError(
                f"switch {self._switch.ticket.ticket_id} is in phase "
                f"{self._switch.ticket.phase}; wait for it or cancel it."
            )
        if plan.expected_epoch != self._epoch:
            raise StaleEpochError(
                f"the plan was made for epoch {plan.expected_epoch}, the current one is "
                f"{self._epoch}; plan again from a new snapshot."
            )
        self.check_deployment(plan.target)
        dead = sorted(plan.target.devices & self._failures.dead_devices)
        if dead:
            raise InfeasibleError(
                f"the plan uses devices {dead}, which are dead; plan without them."
            )
        ticket_id = f"switch-{len(self._tickets):04d}"
        kind = InPlaceSwitch if plan.mode is SwitchMode.IN_PLACE else LiveSwitch
        setup = SwitchSetup(
            plan,
            ticket_id,
            self._deployment,
            self._profiled.profile,
            self._switch_factor,
            self._draw_failure(),
        )
        self._switch = kind(setup)
        self._switch.start(self, self._now_s)
        return self._tickets[ticket_id]

    def _draw_failure(self) -> float | None:
        """The share of its way to the weights' arrival at which the next switch fails, if it does.
        A fork draws the same."""
        draws = np.random.default_rng((self._seed, len(self._tickets))).random(2).tolist()
        return draws[1] if draws[0] < self._rollback_probability else None

    def check_deployment(self, deployment: Deployment) -> None:
        """Raises InfeasibleError (does not fit) or InvalidRequestError (not profiled)."""
        self.spec.check(deployment.configs)
        for parallel in set(deployment.configs):
            self._profiled.profile.step_model(parallel)
            if self._num_blocks[parallel] * self.spec.block_size < self.spec.model.max_model_len:
                check_memory(self.spec, parallel)  # raises, and says what to change

    def ticket(self, ticket_id: str) -> SwitchTicket:
        if ticket_id not in self._tickets:
            raise NotFoundError(f"there is no switch {ticket_id!r}.")
        return self._tickets[ticket_id]

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """At once, and the old deployment serves on."""
        self.ticket(ticket_id)
        if self._switch is not None and self._switch.ticket.ticket_id == ticket_id:
            self._switch.cancel(self, self._now_s)
        return self._tickets[ticket_id]

    def set_routing(self, routing: Routing) -> None:
        current = {r.replica_id for r in self._deployment.replicas}
        if set(routing.replica_ids) != current:
            raise StaleEpochError(
                f"routing names replicas {sorted(routing.replica_ids)}, the deployment has "
                f"{sorted(current)}; take a new snapshot."
            )
        self._routing = routing
        self.rows.set_routing(self._deployment, routing)

    def events(self, cursor: int) -> EventBatch:
        return self._log.since(cursor)

    # ---------------------------------------------------------------- Drivable

    def submit(self, request: Request) -> None:
        assert self._columns is None, "submit_columns, since the cluster records columns"
        assert request.arrival_s >= self._now_s, (request.arrival_s, self._now_s)
        self._pending.append(request)

    def submit_columns(
        self, arrival_s: Seconds, prompt_tokens: Counts, output_tokens: Counts
    ) -> None:
        """Many requests by arrival time, none before the present time or an earlier submission."""
        assert self._columns is not None, "made without columns"
        records = new_records(arrival_s, prompt_tokens, output_tokens)
        if len(self._waiting):
            records = np.concatenate([self._waiting, records])
        self._waiting = records
        assert (np.diff(self._waiting["arrival_s"]) >= 0).all(), "not in order of arrival"

    def take_columns(self) -> TrafficColumns:
        """What happened since the last call."""
        assert self._columns is not None, "made without columns"
        none = np.zeros(0, np.int64)
        parts, self._columns = self._columns or [traffic_columns(self._waiting, none, none)], []
        return parts[0] if len(parts) == 1 else TrafficColumns.join(parts)

    def advance(self, until_s: float) -> None:
        """Compute up to `until_s`. A switch passes a phase border, and a device is lost or joins,
        just after that instant."""
        assert until_s >= self._now_s, (until_s, self._now_s)
        while True:
            switch_s = inf if self._switch is None else self._switch.due_s
            border_s = min(switch_s, self._failures.border_s)
            if border_s >= until_s:
                break
            self._simulate(border_s)
            if self._switch is not None and switch_s < self._failures.border_s:
                self._switch.cross_border(self, border_s)
            else:
                self._failures.cross_border(self, border_s)
        self._simulate(until_s)

    def schedule_failures(self, failures: Sequence[DeviceFailure]) -> None:
        """See `envs.scenarios.FailureDrivable`."""
        for failure in failures:
            assert self._now_s <= failure.at_s < failure.back_at_s, (self._now_s, failure)
            assert 0 <= failure.device < self.spec.num_devices, failure
        self._failures.schedule(failures)

    def close(self) -> None:
        """Nothing is held."""

    # ---------------------------------------------------------------- Simulator

    def fork(self, lengths: LengthSampler | None = None) -> SurrogateCluster:
        """An independent copy that goes on from the same state, log and clock included; see
        `policies.base.Simulator`. With `lengths` it knows of no failure to come either."""
        other = copy(self)
        other.state = self.state.copy()
        other._pending, other.rows = self._pending.copy(), self.rows.copy()
        other._columns = None if self._columns is None else self._columns.copy()
        other._log, other._tickets = self._log.copy(), self._tickets.copy()
        other._switch = None if self._switch is None else self._switch.copy()
        other._failures = self._failures.copy()
        if lengths is not None:
            other.state.redraw(lengths)
            other._failures.forget()
            other._rollback_probability = 0.0
            if other._switch is not None:
                other._switch.forget_failure()
        return other

    def rollout(
        self,
        until_s: float,
        future: Future | None = None,
        plan: SwitchPlan | None = None,
        routing: Routing | None = None,
    ) -> Rollout:
        """See `policies.base.Simulator`. From here on traffic is recorded as columns."""
        if plan is not None:
            self.apply(plan)
        if routing is not None:
            self.set_routing(routing)
        self._record_columns()
        if future is not None:
            self._waiting = self._waiting[:0]
            self.submit_columns(future.arrival_s, future.prompt_tokens, future.output_tokens)
        self.advance(until_s)
        return Rollout(self.take_columns(), self.snapshot())

    def _record_columns(self) -> None:
        """Nothing recorded before, and requests not yet arrived as records."""
        self._columns = []
        if self._pending:
            self._pending.sort(key=_arrival_s)
            self._waiting = request_records(self._pending)
            self._pending = []

    # ---------------------------------------------------------------- time

    def _simulate(self, until_s: float) -> None:
        arriving = self._take_arriving(until_s)
        state = self.state
        advance = kernel.advance_sharing if state.clock[0]["num_knots"] else kernel.advance
        advance(
            state.seqs,
            state.replicas,
            state.lists,
            state.batches,
            self.rows.order,
            self.rows.shares,
            self.rows.edges,
            state.limits[0],
            state.counts[0],
            arriving,
            state.ended,
            state.trace,
            state.clock[0],
            until_s,
        )
        ended = state.ended[: state.counts[0]["ended"]].copy()
        self._record(arriving, ended)
        state.release(ended)
        self._now_s = until_s

    def _take_arriving(self, until_s: float) -> Slots:
        if self._columns is not None:
            count = int(np.searchsorted(self._waiting["arrival_s"], until_s, side="right"))
            records, self._waiting = self._waiting[:count], self._waiting[count:]
            return self.state.add_records(records)
        self._pending.sort(key=_arrival_s)
        count = bisect_right(self._pending, until_s, key=_arrival_s)
        taken, self._pending = self._pending[:count], self._pending[count:]
        return self.state.add_requests(taken)

    def _record(self, arriving: Slots, ended: Slots) -> None:
        if not len(arriving) and not len(ended):
            return
        seqs = self.state.seqs
        if self._columns is not None:
            self._columns.append(traffic_columns(seqs, arriving, ended))
            return
        requests = self.state.requests_of([*ended.tolist(), *arriving.tolist()])
        log_events(self._log, seqs, arriving, ended, requests, self.rows.replica_ids())

    # ---------------------------------------------------------------- deployments

    def commit(self, target: Deployment) -> None:
        """Make `target`, which was chosen, current."""
        self._failures.wanted = target
        self._renew(target)

    def _renew(self, deployment: Deployment) -> None:
        """A new epoch, with routing by load."""
        self._epoch += 1
        self._serve(deployment)

    def _serve(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._routing = self.rows.serve(self.state, deployment)

    def route_held(self, now_s: float) -> None:
        """Send what was held back to the replicas that are open now."""
        self.rows.route(self.state, self.state.take_held(), now_s)

    # ---------------------------------------------------------------- loss and recovery

    @property
    def deployment(self) -> Deployment:
        return self._deployment

    @property
    def dead_devices(self) -> frozenset[int]:
        return self._failures.dead_devices

    @property
    def is_switching(self) -> bool:
        return self._switch is not None

    def tell_device(self, kind: EventKind, device: int, now_s: float) -> None:
        self._log.append(now_s, kind, device=device)

    def lose_switch(self, device: int, now_s: float) -> None:
        """No switch goes through while a worker is lost, unless it cannot be undone."""
        if self._switch is not None:
            self._switch.lose(self, device, now_s)

    def lose_replicas(self, broken: list[Replica], now_s: float) -> None:
        """Take them out; their requests start over elsewhere, or wait while none is left."""
        slots = [slot for r in broken for slot in self.state.sequences_of(self.rows.of(r))]
        self.rows.drop(self.state, broken)
        self._renew(Deployment(tuple(r for r in self._deployment.replicas if r not in broken)))
        self.move_with(float(self.state.clock[0]["mover_cores"]), now_s)  # their steps are gone
        self.state.start_over(slots)
        self.rows.route(self.state, slots, now_s)
        if not self._deployment.replicas:
            self._failures.begin_healing(now_s)

    def stop(self, replicas: Sequence[Replica]) -> None:
        """They take nothing and start no step any more."""
        for replica in replicas:
            record = self.state.replicas[self.rows.of(replica)]
            record["is_open"], record["is_paused"] = 0, 1

    def load(self, deployment: Deployment, now_s: float) -> None:
        """Make replicas current where there are none."""
        self.rows.add(self.state, deployment.replicas)
        self._renew(deployment)
        self.route_held(now_s)

    def fail_held(self, now_s: float) -> None:
        """No replica will take what waits."""
        slots = np.array(self.state.take_held(), np.int64)
        self.state.fail(slots, now_s)
        self._record(slots[:0], slots)
        self.state.release(slots)

    def move_with(self, mover_cores: float, now_s: float) -> None:
        """From `now_s` on a switch keeps so many of the host's cores busy."""
        state = self.state
        kernel.move_with(state.replicas, self.rows.order, state.clock[0], mover_cores, now_s)

    # ---------------------------------------------------------------- what a switch reports

    def publish(self, ticket: SwitchTicket) -> None:
        self._tickets[ticket.ticket_id] = ticket
        self._log.append(ticket.updated_s, EventKind.SWITCH, ticket=ticket)
        if ticket.phase.is_terminal:
            self._switch = None
            self._failures.heal(self, ticket.updated_s)

    def trace(self) -> Records:
        """Items of the steps started so far, of `layout.ITEM`, in the order in which they were
        scheduled; an assertion fails when `trace_items` were too few."""
        count = int(self.state.counts[0]["traced"])
        assert count <= len(self.state.trace), f"{count} items, trace_items={len(self.state.trace)}"
        return self.state.trace[:count].copy()

    def check_integrity(self) -> None:
        """Raise AssertionError unless requests, lists and blocks are consistent."""
        reserved = {} if self._switch is None else self._switch.reserved_blocks()
        rows = list(self.rows.replica_ids())
        for row in rows:
            self.state.check_row(row, reserved.get(row, 0))
        self.state.check_counts(rows)


def _arrival_s(request: Request) -> float:
    return request.arrival_s
