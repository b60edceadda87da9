"""One rank of a replica while it serves: `Follower` runs its stage, `Replica` (the leader) leads.

The loop is synchronous: the leader dispatches at most pp batches and collects the oldest. Step
inputs go from leader to followers, sampled tokens from the last stage to the leader, by ZeroMQ;
hidden states by torch.distributed.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from engine.batch import ScheduledBatch
from engine.cluster import ParallelConfig
from engine.messages import (
    LeaderStats,
    RankSpec,
    SequenceState,
    StepReport,
    TokenUpdate,
    decode_output,
    decode_step,
    encode,
)
from engine.migration.arrivals import Arrivals, Departures, sequence_of
from engine.parallel import ParallelState
from engine.request import StepInput
from engine.runner import ModelRunner
from engine.scheduler import BatchScheduler
from engine.sockets import Sockets

DRAIN_TIMEOUT_MS = 10_000


@dataclass(slots=True)
class RankState:
    """What a worker holds for one rank of one replica, serving or about to."""

    spec: RankSpec
    runner: ModelRunner
    groups: ParallelState
    weights: dict[str, torch.Tensor]  # this rank's shards; storage may be shared with another rank
    inputs: Any  # PULL socket: steps for a follower, sampled tokens for the leader

    @property
    def is_leader(self) -> bool:
        return self.spec.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """The rank that samples: tp rank 0 of the last stage."""
        parallel = self.spec.parallel
        return (parallel.pp - 1) * parallel.tp

    def run_stage(self, step: StepInput) -> tuple[Any, Any]:
        """Run one step through this rank. Returns (result, pending send or None)."""
        parallel, hidden = self.spec.parallel, None
        if parallel.stage_of(self.spec.rank) > 0:
            size = self.runner.spec.hidden_size
            hidden = self.groups.recv_previous(len(step.token_ids), size, self.runner.dtype)
        result = self.runner.execute(step, hidden)
        if isinstance(result, torch.Tensor):
            hidden = result.contiguous()
            return hidden, (self.groups.send_next(hidden), hidden)
        return result, None


@dataclass(slots=True)
class StepInFlight:
    """A step that was dispatched; `result` is its output, or with pp > 1 what is being sent."""

    batch: ScheduledBatch
    result: Any
    started_s: float
    others: int  # in flight when it was dispatched

    def report(self, ended_s: float, others: int) -> StepReport:
        return StepReport(self.started_s, ended_s, *self.batch.size(), self.others, others)


class Follower:
    """A rank that runs what its leader sends. Owns perhaps an output socket. `peers` are the
    input endpoints of all ranks, in rank order."""

    active = True  # there is none before it serves

    def __init__(self, state: RankState, sockets: Sockets, peers: list[str]) -> None:
        self.state, self.inputs = state, state.inputs
        self._outputs = None
        if state.spec.rank == state.last_stage_rank:
            self._outputs = sockets.connect(zmq.PUSH, peers[0])
        self._sending: deque[Any] = deque()

    def step(self) -> bool:
        """Run one queued step, if any."""
        try:
            step = decode_step(self.inputs.recv(zmq.NOBLOCK))
        except zmq.Again:
            return False
        result, pending = self.state.run_stage(step)
        if pending is not None:
            self._sending.append(pending)
        if self._outputs is not None:
            self._outputs.send(encode(result))
        while len(self._sending) > self.state.spec.parallel.pp:
            self._sending.popleft()[0].wait()
        return True

    def close(self) -> None:
        if self._outputs is not None:
            self._outputs.close(0)


class Replica:
    """A model copy as its leader rank drives it: batch scheduler and a pipeline of ranks."""

    def __init__(self, state: RankState, scheduler: BatchScheduler) -> None:
        self.state, self.scheduler, self.inputs = state, scheduler, state.inputs
        self.active = self.paused = False
        parallel: ParallelConfig = state.spec.parallel
        self._depth = parallel.pp
        self._followers: list[Any] = []
        self._in_flight: deque[StepInFlight] = deque()
        self._ready_s: float | None = None  # the last step ended then, and there was more to do
        self.last_step: StepReport | None = None
        self._arrivals, self._departures = Arrivals(scheduler), Departures(scheduler)
        self._submitted_s: dict[str, float] = {}  # of those that have made no step yet

    def activate(self, sockets: Sockets, peers: list[str]) -> None:
        """Serve from now on. `peers` are the input endpoints of all ranks, in rank order."""
        self._followers = [sockets.connect(zmq.PUSH, endpoint) for endpoint in peers[1:]]
        self.active = True

    # ---------------------------------------------------------------- steps

    @property
    def wants_to_step(self) -> bool:
        return self.active and (
            bool(self._in_flight) or (not self.paused and self.scheduler.has_work)
        )

    @property
    def waits(self) -> bool:
        """Whether steps are in flight; one without any makes a step as soon as it has work."""
        return bool(self._in_flight)

    def step(self) -> list[TokenUpdate] | None:
        """Dispatch while the pipeline has room, then collect one batch; None if none has ended."""
        if not self.paused:
            while len(self._in_flight) < self._depth and self._dispatch():
                pass
        return self._collect(wait_ms=0) if self._in_flight else None

    def _dispatch(self) -> bool:
        started_s, self._ready_s = self._ready_s or time.monotonic(), None
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self._measure_queueing(batch)
        step = batch.to_step_input()
        if self._followers:
            data = encode(step)
            for socket in self._followers:
                socket.send(data)
        result, pending = self.state.run_stage(step)
        self._in_flight.append(
            StepInFlight(batch, pending or result, started_s, len(self._in_flight))
        )
        return True

    def _measure_queueing(self, batch: ScheduledBatch) -> None:
        if not self._submitted_s:
            return
        now_s = time.monotonic()
        for item in batch.items:
            submitted_s = self._submitted_s.pop(item.seq.request_id, None)
            if submitted_s is not None:
                item.seq.queue_s = now_s - submitted_s

    def _collect(self, wait_ms: int) -> list[TokenUpdate] | None:
        step = self._in_flight[0]
        if self._depth > 1:
            if not self.inputs.poll(wait_ms):
                return None
            output = decode_output(self.inputs.recv())
            assert output.step_id == step.batch.step_id, (output.step_id, step.batch.step_id)
            step.result[0].wait()  # the hidden states have left
        else:
            output = step.result
        self._in_flight.popleft()
        updates = self.scheduler.update(step.batch, output.tokens, output.logprobs)
        now_s = time.monotonic()
        self.last_step = step.report(now_s, len(self._in_flight))
        self._ready_s = now_s if self.scheduler.has_work else None
        return updates

    # ---------------------------------------------------------------- requests and switches

    def submit(self, state: SequenceState) -> None:
        self.scheduler.add(sequence_of(state))
        self._submitted_s[state.request_id] = time.monotonic()

    def abort(self, request_id: str) -> None:
        self._submitted_s.pop(request_id, None)
        self.scheduler.abort(request_id)

    def take_sequences(self) -> list[SequenceState]:
        """See `Departures.take`."""
        return self._departures.take()

    def quiesce(self) -> tuple[list[SequenceState], list[TokenUpdate]]:
        """Finish what is in flight and stand still. Sequences and blocks stay, for a rollback."""
        self.paused = True
        updates: list[TokenUpdate] = []
        while self._in_flight:
            collected = self._collect(wait_ms=DRAIN_TIMEOUT_MS)
            if collected is None:
                raise RuntimeError(f"a step did not end within {DRAIN_TIMEOUT_MS} ms")
            updates += collected
        self._submitted_s.clear()  # they wait elsewhere from now on
        self._ready_s = None
        return self._departures.take(), updates

    def resume(self) -> None:
        """After a rollback: serve on, with all blocks; those held for either end of a move are
        given back."""
        self.scheduler.block_manager.limit(None)
        self._departures.let_go()
        self._arrivals.give_back()
        self.paused = False

    def start_over(self) -> None:
        """The KV cache is another, and empty: see `BatchScheduler.start_over`."""
        self._departures.let_go()
        self.scheduler.start_over()

    def import_sequences(self, states: list[SequenceState]) -> tuple[list[list[int]], list[int]]:
        """Reserve blocks: see `Arrivals.reserve`."""
        return self._arrivals.reserve(states)

    def adopt(self, recompute: list[SequenceState]) -> None:
        """Commit: imported sequences run from where they were, the others start over."""
        self._arrivals.adopt()
        for state in recompute:
            self.scheduler.add(sequence_of(state))

    def stats(self) -> LeaderStats:
        scheduler = self.scheduler
        return LeaderStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_prompt_tokens=scheduler.waiting_prompt_tokens,
            running_context_tokens=scheduler.running_context_tokens,
            kv_blocks_used=scheduler.block_manager.num_used,
            num_preemptions_total=scheduler.num_preemptions_total,
            prefix_cache_queries=scheduler.block_manager.prefix_cache_queries,
            prefix_cache_hits=scheduler.block_manager.prefix_cache_hits,
        )

    def close(self) -> None:
        for socket in self._followers:
            socket.close(0)
