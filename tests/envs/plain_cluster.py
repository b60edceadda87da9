"""The engine's own batch scheduler and router on a simulated clock, stepped in Python: what the
surrogate's kernel is compared with."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from engine.batch import ScheduledBatch
from engine.block_manager import BlockManager
from engine.cluster import Deployment, ParallelConfig, Request, Routing
from engine.profile import ProfiledCluster, StepTimeModel, attention_pairs
from engine.request import SamplingParams
from engine.request import Sequence as LiveSequence
from engine.router import load_of, pick
from engine.scheduler import BatchScheduler
from engine.shards import num_kv_blocks
from envs.surrogate.cluster import SurrogateCluster


class Step(NamedTuple):
    """One batch of a replica; blocks and preemptions are those once it is scheduled."""

    start_s: float
    end_s: float
    items: tuple[tuple[str, int, int], ...]  # request id, first position, tokens
    free_blocks: int
    preemptions: int


class PlainReplica:
    """One replica: the real `BatchScheduler` on a simulated clock."""

    def __init__(self, scheduler: BatchScheduler, steps: StepTimeModel) -> None:
        self.scheduler, self.steps = scheduler, steps
        self.in_flight: deque[tuple[ScheduledBatch, int]] = deque()  # and which of `steps_made`
        self.wake_s = self.ready_s = self.last_end_s = 0.0
        self.may_start = self.is_paused = False
        self.tables_on_the_way: Callable[[], Iterable[list[int]]] = list  # that hold blocks too
        self.outstanding = 0
        self.steps_made: list[Step] = []
        self.token_times: dict[str, list[float]] = {}
        self.preemptions: dict[str, int] = {}

    def wake(self, now_s: float) -> None:
        self.wake_s, self.may_start = max(self.wake_s, now_s), True

    def limit(self, max_used: int | None, now_s: float) -> None:
        """From `now_s` on, see `BlockManager.limit`."""
        self.run(now_s)
        self.scheduler.block_manager.limit(max_used)
        self.wake(now_s)

    def add(self, request: Request, now_s: float) -> None:
        params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
        prompt = [1] * request.prompt_tokens
        self.scheduler.add(LiveSequence(request.request_id, prompt, params, request.arrival_s))
        self.token_times[request.request_id] = []
        self.outstanding += 1
        self.wake(now_s)

    def run(self, until_s: float) -> None:
        while True:
            end_s = self.steps_made[self.in_flight[0][1]].end_s if self.in_flight else math.inf
            if self.in_flight and self.steps.leader_computes:
                end_s = max(end_s, self.ready_s)
            has_room = len(self.in_flight) < self.steps.parallel.pp
            may_start = self.may_start and has_room and not self.is_paused
            start_s = max(self.ready_s, self.wake_s) if may_start else math.inf
            if end_s <= start_s:
                if end_s > until_s or end_s == math.inf:
                    return
                self._end(end_s, *self.in_flight.popleft())
            else:
                if start_s >= until_s:
                    return
                self._start(start_s)

    def _start(self, now_s: float) -> None:
        preempted_before = self.scheduler.num_preemptions_total
        batch = self.scheduler.schedule()
        if batch is None:
            has_preempted = self.scheduler.num_preemptions_total > preempted_before
            self.may_start = has_preempted and not self.in_flight
            return
        context = sum(item.start + item.num_tokens for item in batch.items)
        pairs = sum(attention_pairs(item.start, item.num_tokens) for item in batch.items)
        step_s = self.steps.step_s(batch.num_tokens, len(batch.items), context, pairs)
        stage_s = self.steps.stage_share * step_s
        self.last_end_s = max(now_s + step_s, self.last_end_s + stage_s)
        self.ready_s = now_s + stage_s
        self.wake_s = now_s
        self.in_flight.append((batch, len(self.steps_made)))
        blocks = self.scheduler.block_manager.num_free
        items = tuple((i.seq.request_id, i.start, i.num_tokens) for i in batch.items)
        preemptions = self.scheduler.num_preemptions_total
        self.steps_made.append(Step(now_s, self.last_end_s, items, blocks, preemptions))

    def _end(self, now_s: float, batch: ScheduledBatch, index: int) -> None:
        self.steps_made[index] = self.steps_made[index]._replace(end_s=now_s)
        for update in self.scheduler.update(batch, [7 if i.samples else None for i in batch.items]):
            self.token_times[update.request_id].append(now_s)
            self.outstanding -= bool(update.finish_reason)
        for item in batch.items:
            self.preemptions[item.seq.request_id] = item.seq.num_preemptions
        self.wake_s, self.may_start = now_s, True
        self.scheduler.check_integrity(self.tables_on_the_way())


def plain_replica(cluster: ProfiledCluster, parallel: ParallelConfig) -> PlainReplica:
    """Idle, and without prefix caching."""
    spec = cluster.spec
    scheduler = BatchScheduler(
        BlockManager(num_kv_blocks(spec, parallel), spec.block_size, False),
        spec.max_num_seqs,
        spec.max_num_batched_tokens,
        spec.model.max_model_len,
        None,
        num_stages=parallel.pp,
    )
    return PlainReplica(scheduler, cluster.profile.step_model(parallel))


class PlainCluster:
    """Replicas behind `engine.router.pick`."""

    def __init__(self, cluster: ProfiledCluster, deployment: Deployment, routing: Routing) -> None:
        self.spec, self.deployment, self.routing = cluster.spec, deployment, routing
        self.replicas = {
            r.replica_id: plain_replica(cluster, r.parallel) for r in deployment.replicas
        }

    def arrive(self, request: Request) -> int:
        """Run up to its arrival; the replica that gets it."""
        for replica in self.replicas.values():
            replica.run(request.arrival_s)
        loads = [
            load_of(self.spec, r, self.replicas[r.replica_id].outstanding)
            for r in self.deployment.replicas
        ]
        picked = pick(self.routing, loads, request.prompt_tokens, request.prompt_tokens)
        assert picked is not None
        self.replicas[picked].add(request, request.arrival_s)
        return picked

    def run(
        self, requests: list[Request], limits: Sequence[tuple[float, int | None]] = ()
    ) -> dict[str, tuple[int, list[float], int]]:
        """request id -> (replica id, token times, preemptions). `limits` (since when, blocks) hold
        for the first replica."""
        chosen: dict[str, int] = {}
        first, todo = next(iter(self.replicas.values())), deque(limits)
        for request in requests:
            while todo and todo[0][0] < request.arrival_s:
                at_s, max_used = todo.popleft()
                first.limit(max_used, at_s)
            chosen[request.request_id] = self.arrive(request)
        for at_s, max_used in todo:
            first.limit(max_used, at_s)
        for replica in self.replicas.values():
            replica.run(math.inf)
        return {
            name: (r, self.replicas[r].token_times[name], self.replicas[r].preemptions[name])
            for name, r in chosen.items()
        }


# ---------------------------------------------------------------- the surrogate beside it


def with_budgets(
    cluster: ProfiledCluster, configs: Sequence[ParallelConfig], blocks: int, seqs: int, tokens: int
) -> ProfiledCluster:
    """The same cluster with `blocks` KV blocks in its smallest replica, and these budgets."""

    def smallest(memory: int) -> int:
        spec = replace(cluster.spec, device_memory_bytes=memory)
        return min(num_kv_blocks(spec, config) for config in configs)

    low, high = 0, cluster.spec.device_memory_bytes
    while smallest(high) < blocks:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if smallest(middle) < blocks else (low, middle)
    spec = replace(
        cluster.spec, device_memory_bytes=high, max_num_seqs=seqs, max_num_batched_tokens=tokens
    )
    return replace(cluster, spec=spec)


def steps_of(surrogate: SurrogateCluster, row: int, names: list[str]) -> list[Step]:
    """The trace of one row; `names` are the requests by arrival."""
    trace, steps = surrogate.trace(), []
    for start_s, items in groupby(trace[trace["row"] == row], lambda i: float(i["start_s"])):
        parts = list(items)
        ends, blocks, preemptions = (
            {part[name].item() for part in parts}
            for name in ("end_s", "free_blocks", "preemptions")
        )
        (end_s,), (free,), (preempted,) = ends, blocks, preemptions
        told = tuple((names[i["index"]], int(i["start"]), int(i["tokens"])) for i in parts)
        steps.append(Step(start_s, end_s, told, free, preempted))
    return steps
