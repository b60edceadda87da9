"""One description, two implementations: rounds of KV copies equal those of the engine's switch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import (
    Binding,
    ClusterSpec,
    KvCostParams,
    Replica,
    Request,
    Routing,
    dense_deployment,
    parse_deployment_key,
)
from engine.messages import ImportSequences, MoveKv, Reply, SequenceState
from engine.migration.arrivals import Arrivals, Departures, sequence_of
from engine.migration.plan import plan_switch
from engine.migration.sequences import SequenceMove
from engine.profile import ProfiledCluster
from engine.request import SamplingParams
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.kv_rounds import NOT_BOUND, KvRounds
from tests.envs.plain_cluster import (
    PlainCluster,
    PlainReplica,
    plain_replica,
    steps_of,
    with_budgets,
)

KEYS = ("4xtp1pp1", "2xtp2pp1", "1xtp1pp2+2xtp1pp1", "1xtp2pp1+2xtp1pp1", "1xtp1pp3+1xtp1pp1")
COSTS = {
    "move": KvCostParams(1e15, 1.0, 0.01),
    "compute": KvCostParams(1.0, 1e15, 0.01),
    "wait": KvCostParams(1.0, 1.0, 1e-6),
    "either": KvCostParams(2e7, 3e3, 5e-4),  # by length, and by the room that is left
}


class Leaders:
    """The engine's leaders behind the calls of a `SequenceMove`, by replica id. A client names no
    `max_tokens`."""

    def __init__(self, spec: ClusterSpec, plain: dict[int, PlainReplica]) -> None:
        self.spec, self.plain, self.now_s = spec, plain, 0.0
        self.departures = {id_: Departures(r.scheduler) for id_, r in plain.items()}
        self.arrivals = {id_: Arrivals(r.scheduler) for id_, r in plain.items()}
        self._params: dict[str, SamplingParams] = {}
        for replica_id, replica in plain.items():
            replica.tables_on_the_way = partial(self._tables, replica_id)

    def _tables(self, replica_id: int) -> list[list[int]]:
        return [*self.arrivals[replica_id].tables(), *self.departures[replica_id].tables()]

    def num_outstanding(self, replica_id: int) -> int:
        return self.plain[replica_id].outstanding

    def request_id_of(self, key: str) -> str:
        return key

    async def call(self, device: int, kind: type[Any], **fields: Any) -> Reply:
        if kind is MoveKv:
            return Reply(0)
        replica_id = fields["replica_id"]
        self.plain[replica_id].wake(self.now_s)
        if kind is ImportSequences:
            wanted = [self.as_asked(state) for state in fields["sequences"]]
            tables, to_fill = self.arrivals[replica_id].reserve(wanted)
            return Reply(0, block_tables=tables, blocks_to_fill=to_fill)
        states = self.departures[replica_id].take()
        self._params |= {state.request_id: state.params for state in states}
        blind = [
            msgspec.structs.replace(s, params=replace(s.params, max_tokens=1 << 20)) for s in states
        ]
        return Reply(0, sequences=blind)

    def as_asked(self, state: SequenceState) -> SequenceState:
        return msgspec.structs.replace(state, params=self._params[state.request_id])

    def adopt(self, replica_id: int, recompute: list[SequenceState]) -> None:
        replica = self.plain[replica_id]
        self.arrivals[replica_id].adopt()
        for state in recompute:
            replica.scheduler.add(sequence_of(self.as_asked(state)))
        for seq in replica.scheduler.sequences():
            replica.token_times.setdefault(seq.request_id, [])
        replica.outstanding = len(replica.scheduler.sequences())
        replica.scheduler.block_manager.limit(None)
        replica.wake(self.now_s)


class Pair:
    """The engine's parts and the surrogate, moved through the same switch."""

    def __init__(
        self, cluster: ProfiledCluster, old: str, new: str, costs: str, requests: list[Request]
    ) -> None:
        self.current = dense_deployment(parse_deployment_key(old))
        target = parse_deployment_key(new)
        self.plan = plan_switch(cluster.spec, self.current, 0, target, COSTS[costs])
        kept = set(self.current.replicas) & set(self.plan.target.replicas)
        self.leaving = [r for r in self.current.replicas if r not in kept]
        self.coming = [r for r in self.plan.target.replicas if r not in kept]
        routing = Routing(tuple(r.replica_id for r in self.current.replicas))
        self.plain = PlainCluster(cluster, self.current, routing)
        fresh = {r.replica_id: plain_replica(cluster, r.parallel) for r in self.coming}
        self.leaders = Leaders(cluster.spec, self.plain.replicas | fresh)
        self.move = SequenceMove(self.leaders, self.plan, self.leaving, self.coming)  # type: ignore[arg-type]
        self.surrogate = SurrogateCluster(cluster, self.current, trace_items=200_000)
        self.surrogate.rows.add(self.surrogate.state, self.coming)
        self.rounds = KvRounds(self.plan, self.leaving)
        self.rows = {
            r.replica_id: self.surrogate.rows.of(r) for r in (*self.current.replicas, *self.coming)
        }
        self.names = [r.request_id for r in requests]
        self._todo = list(requests)
        for request in requests:
            self.surrogate.submit(request)

    def limit(self, replicas: list[Replica], blocks: int) -> None:
        for replica in replicas:
            id_ = replica.replica_id
            self.leaders.plain[id_].scheduler.block_manager.limit(blocks)
            self.surrogate.state.limit_blocks(self.rows[id_], blocks)

    def advance(self, until_s: float) -> None:
        while self._todo and self._todo[0].arrival_s <= until_s:
            self.plain.arrive(self._todo.pop(0))
        for replica in self.plain.replicas.values():
            replica.run(until_s)
        self.surrogate.advance(until_s)
        self.leaders.now_s = until_s

    def copy(self, is_last: bool) -> None:
        """One round in both, and all that can be seen of it."""
        asyncio.run(self.move.copy(is_last))
        self.rounds.begin(self.surrogate, self.leaders.now_s, is_last)
        rounds, move, name = self.rounds, self.move, self.names
        ids = {row: id_ for id_, row in self.rows.items()}
        moves = rounds._moves
        here = moves[moves["round"] == rounds._round] if is_last else moves
        owners = zip(here["key"].tolist(), here["row"].tolist(), strict=True)
        assert {name[k]: ids[row] for k, row in owners} == move.owner
        bound = moves["key"][moves["binding"] != NOT_BOUND].tolist()
        assert {name[k] for k in bound} <= move.bindings.keys()
        for key, found in move.bindings.items():
            assert rounds.binding(name.index(key)) == found.binding
        assert rounds.kv_bytes == move.kv_bytes
        assert {name[k]: s for k, s in rounds.draining.items()} == move.draining
        kept: dict[int, list[tuple[str, int]]] = {}
        for m in sorted(moves[moves["kept"] > 0], key=lambda m: int(m["kept_number"])):
            kept.setdefault(ids[int(m["row"])], []).append((name[m["key"]], int(m["kept"])))
        anew = [(name[m["key"]], ids[int(m["row"])]) for m in moves[rounds._recompute]]
        for id_, replica in self.leaders.plain.items():
            arrivals = self.leaders.arrivals[id_]
            tables = [(key, len(seq.block_table)) for key, seq in arrivals._sequences.items()]
            assert kept.get(id_, []) == tables
            replica.scheduler.check_integrity(replica.tables_on_the_way())
            recomputed = [key for key, owner in anew if owner == id_]
            assert recomputed == [s.request_id for s in move.recompute.get(id_, [])]
        self.check_blocks()

    def check_blocks(self) -> None:
        reserved = self.rounds.reserved_blocks()
        for id_, replica in self.leaders.plain.items():
            row = self.rows[id_]
            assert self.surrogate.state.used_blocks(row) == replica.scheduler.block_manager.num_used
            self.surrogate.state.check_row(row, reserved.get(row, 0))

    def stop(self) -> None:
        """The replicas that go end what is in flight."""
        for replica in self.leaving:
            self.leaders.plain[replica.replica_id].is_paused = True
        self.surrogate.stop(self.leaving)
        now_s, state = self.leaders.now_s, self.surrogate.state
        self.advance(max([state.quiet_s(self.rows[r.replica_id], now_s) for r in self.leaving]))

    def commit(self) -> None:
        target, now_s = self.plan.target, self.leaders.now_s
        for replica in target.replicas:
            id_ = replica.replica_id
            if id_ in self.move.recompute:
                self.leaders.adopt(id_, self.move.recompute[id_])
        self.plain.replicas = {
            r.replica_id: self.leaders.plain[r.replica_id] for r in target.replicas
        }
        self.surrogate.rows.drop(self.surrogate.state, self.leaving)
        self.surrogate.commit(target)
        self.rounds.hand_over(self.surrogate, now_s)
        for replica in target.replicas:
            self.surrogate.state.limit_blocks(self.rows[replica.replica_id], None)
            self.surrogate.state.wake(self.rows[replica.replica_id], now_s)


@settings(max_examples=100, deadline=None)
@given(
    old=st.sampled_from(KEYS),
    new=st.sampled_from(KEYS),
    costs=st.sampled_from(sorted(COSTS)),
    spare_blocks=st.integers(0, 30),
    limit=st.integers(4, 60),
    number=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    first_s=st.floats(0.0, 1.0),
    rounds_s=st.lists(st.floats(0.0, 0.3), max_size=4),
)
def test_rounds_equal_those_of_the_engine(
    small_cluster: ProfiledCluster,
    old: str,
    new: str,
    costs: str,
    spare_blocks: int,
    limit: int,
    number: int,
    seed: int,
    first_s: float,
    rounds_s: list[float],
) -> None:
    """New replicas, bindings, bytes and blocks at either end after every round, what is computed
    again; and every step on the new replicas after the commit."""
    configs = [*parse_deployment_key(old), *parse_deployment_key(new)]
    cluster = with_budgets(small_cluster, configs, 16 + spare_blocks, 8, 64)
    rng = np.random.default_rng(seed)
    requests = [
        Request(f"r{i}", at_s, int(rng.integers(1, 200)), int(rng.integers(1, 60)))
        for i, at_s in enumerate(np.cumsum(rng.exponential(0.01, number)).tolist())
        if at_s <= first_s + sum(rounds_s)
    ]
    pair = Pair(cluster, old, new, costs, requests)
    if not pair.leaving:
        return
    pair.limit(pair.coming, limit)
    pair.advance(first_s)
    pair.copy(is_last=False)
    for round_s in rounds_s:
        pair.advance(pair.leaders.now_s + round_s)
        pair.check_blocks()
        pair.copy(is_last=False)
    pair.stop()
    pair.copy(is_last=True)
    assert Binding.DRAIN not in [pair.move.bindings[key].binding for key in pair.move.owner]
    pair.commit()
    pair.advance(1e5)
    pair.surrogate.check_integrity()
    assert pair.surrogate.snapshot().num_finished == len(requests)
    for id_, row in pair.rows.items():
        made = pair.leaders.plain[id_].steps_made
        assert steps_of(pair.surrogate, row, pair.names) == made


def test_rounds_of_a_pipeline_wait_for_ends_that_are_seen(
    small_cluster: ProfiledCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the leader computes, a step's end is seen late; a switch looks then, not all the time
    from the end on."""
    spans = 0
    simulate = SurrogateCluster._simulate

    def counted(surrogate: SurrogateCluster, until_s: float) -> None:
        nonlocal spans
        spans += 1
        assert spans < 300, "it looks again and again"
        simulate(surrogate, until_s)

    monkeypatch.setattr(SurrogateCluster, "_simulate", counted)
    deployment = dense_deployment(parse_deployment_key("1xtp2pp2"))
    surrogate = SurrogateCluster(small_cluster, deployment)
    assert small_cluster.profile.step_model(deployment.configs[0]).leader_computes
    for i in range(300):
        surrogate.submit(Request(f"r{i}", 0.015 * i, (3, 150)[i % 2], 30))
    surrogate.advance(1.0)
    kv = KvCostParams(1.0, 1.0, 0.02)
    target = parse_deployment_key("2xtp2pp1")
    surrogate.apply(plan_switch(surrogate.spec, deployment, 0, target, kv, 0.2))
    surrogate.advance(10.0)
    assert surrogate.snapshot().epoch == 1
