"""The batch scheduler: continuous batching, chunked prefill, preemption by recompute. Pure.

The order of service is vLLM v1's: running sequences first, then waiting ones in arrival order,
while the token, sequence and block budgets last.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from engine.block_manager import BlockManager
from engine.errors import InfeasibleError
from engine.request import SampleSpec, Sequence, SequenceStatus, StepInput

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ScheduledItem:
    """Tokens [start, start + num_tokens) of a sequence; `samples` where they end at its last."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    def sample_spec(self) -> SampleSpec | None:
        if not self.samples:
            return None
        params = self.seq.params
        return SampleSpec(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=params.seed,
            position=len(self.seq.output_token_ids),
        )


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Its sequences are in flight until `BatchScheduler.update` is given its tokens."""

    step_id: int
    items: tuple[ScheduledItem, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    def to_step_input(self) -> StepInput:
        """What the ranks need of this step. Valid while the batch is in flight."""
        tokens: list[int] = []
        for item in self.items:
            tokens += item.seq.token_slice(item.start, item.start + item.num_tokens)
        return StepInput(
            step_id=self.step_id,
            token_ids=tokens,
            starts=[item.start for item in self.items],
            lengths=[item.num_tokens for item in self.items],
            block_tables=[list(item.seq.block_table) for item in self.items],
            samples=[item.sample_spec() for item in self.items],
        )


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """One sampled token: the `index`-th output token (from 0) of a request."""

    request_id: str
    token_id: int
    index: int
    finish_reason: FinishReason | None


class BatchScheduler:
    """Owns the sequences of one replica and, through their tables, the blocks they hold."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_id: int | Collection[int] | None,
    ) -> None:
        assert max_num_seqs > 0, max_num_seqs
        assert max_num_batched_tokens > 0, max_num_batched_tokens
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._eos = frozenset(
            ()
            if eos_token_id is None
            else (eos_token_id,)
            if isinstance(eos_token_id, int)
            else eos_token_id
        )
        self._waiting: list[Sequence] = []  # both in arrival order
        self._running: list[Sequence] = []
        self._arrival: dict[str, tuple[float, int]] = {}
        self._num_added = 0
        self._num_steps = 0
        self.num_preemptions_total = 0
        self._in_flight: set[str] = set()
        self._aborted: set[str] = set()  # in flight; they go at their next update

    # ---------------------------------------------------------------- what is there

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Sequences in a batch that has not been updated yet."""
        return len(self._in_flight)

    @property
    def waiting_prompt_tokens(self) -> int:
        return sum(len(seq.prompt_token_ids) for seq in self._waiting)

    @property
    def running_context_tokens(self) -> int:
        return sum(seq.num_computed_tokens for seq in self._running)

    def sequences(self) -> list[Sequence]:
        """Every sequence here, in arrival order."""
        return sorted([*self._running, *self._waiting], key=self._key)

    def _key(self, seq: Sequence) -> tuple[float, int]:
        return self._arrival[seq.request_id]

    # ---------------------------------------------------------------- coming and going

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that holds no blocks; output tokens it has already are re-prefilled.

        Raises InfeasibleError when this replica could never hold it to its end.
        """
        assert not seq.block_table, seq.request_id
        self._check_fits(seq)
        seq.status, seq.num_computed_tokens = SequenceStatus.WAITING, 0
        self._register(seq)
        insort(self._waiting, seq, key=self._key)

    def adopt(self, seq: Sequence) -> None:
        """Insert a migrated sequence whose block table came from this block manager."""
        assert seq.status is SequenceStatus.RUNNING, seq.status
        assert self._covers(seq), seq.request_id
        self._register(seq)
        insort(self._running, seq, key=self._key)

    def abort(self, request_id: str) -> bool:
        """Drop a sequence and free its blocks, at its next update if it is in flight.

        False when it is not here (any more).
        """
        if request_id not in self._arrival or request_id in self._aborted:
            return False
        if request_id in self._in_flight:
            self._aborted.add(request_id)
        else:
            self._remove(next(s for s in self.sequences() if s.request_id == request_id))
        return True

    def drain_all(self) -> list[Sequence]:
        """Remove every sequence, in arrival order. Their block tables stay as they are and go to
        the caller, who owns those blocks from now on. No batch may be in flight."""
        assert not self._in_flight, self._in_flight
        drained = self.sequences()
        self._running, self._waiting, self._arrival = [], [], {}
        return drained

    def _check_fits(self, seq: Sequence) -> None:
        assert seq.prompt_token_ids, seq.request_id
        assert seq.params.max_tokens > 0, seq.request_id
        if seq.num_tokens >= self.max_model_len:
            raise InfeasibleError(
                f"request {seq.request_id} has {seq.num_tokens} tokens, the model's context ends "
                f"at {self.max_model_len} with at least one to generate; shorten the prompt."
            )
        wanted = min(len(seq.prompt_token_ids) + seq.params.max_tokens, self.max_model_len)
        capacity = self.block_manager.num_blocks * self.block_manager.block_size
        if wanted > capacity:
            raise InfeasibleError(
                f"request {seq.request_id} may grow to {wanted} tokens, this replica's KV cache "
                f"holds {capacity}; shorten the prompt or lower max_tokens."
            )

    def _register(self, seq: Sequence) -> None:
        assert seq.request_id not in self._arrival, seq.request_id
        self._arrival[seq.request_id] = (seq.arrival_s, self._num_added)
        self._num_added += 1

    def _remove(self, seq: Sequence) -> None:
        holder = self._running if seq.status is SequenceStatus.RUNNING else self._waiting
        holder.remove(seq)
        del self._arrival[seq.request_id]
        self._release_blocks(seq)
        seq.status = SequenceStatus.FINISHED

    def _release_blocks(self, seq: Sequence) -> None:
        self.block_manager.free(seq.block_table)
        seq.block_table = []

    # ---------------------------------------------------------------- a step

    def schedule(self) -> ScheduledBatch | None:
        """The next batch, now in flight, or None when no sequence can make a step."""
        items, preempted = self._schedule_running()
        if not preempted:
            items += self._schedule_waiting(self.max_num_batched_tokens - _num_tokens(items))
        if not items:
            return None
        self._in_flight.update(item.seq.request_id for item in items)
        batch = ScheduledBatch(self._num_steps, tuple(items))
        self._num_steps += 1
        return batch

    def _schedule_running(self) -> tuple[list[ScheduledItem], bool]:
        items: list[ScheduledItem] = []
        budget, preempted = self.max_num_batched_tokens, False
        for seq in list(self._running):
            if budget == 0:
                break
            if seq.request_id in self._in_flight or seq.status is not SequenceStatus.RUNNING:
                continue
            item = _next_item(seq, budget)
            while not self._extend(seq, item.start + item.num_tokens):
                victim = self._victim(seq)
                if victim is None:
                    break  # sequences in flight may give their blocks back: wait for them
                self._preempt(victim)
                preempted = True
                if victim is seq:
                    break
            else:
                items.append(item)
                budget -= item.num_tokens
        return items, preempted

    def _schedule_waiting(self, budget: int) -> list[ScheduledItem]:
        items: list[ScheduledItem] = []
        while self._waiting and budget > 0 and len(self._running) < self.max_num_seqs:
            seq = self._waiting[0]
            item = _next_item(seq, budget)
            if not self._extend(seq, item.num_tokens):
                break
            self._waiting.pop(0)
            seq.status = SequenceStatus.RUNNING
            insort(self._running, seq, key=self._key)
            items.append(item)
            budget -= item.num_tokens
        return items

    def _extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow a table to hold `num_tokens`; nothing happens unless all of it fits."""
        missing = self.block_manager.blocks_needed(num_tokens) - len(seq.block_table)
        if not self.block_manager.can_allocate(missing):
            return False
        seq.block_table += self.block_manager.allocate(max(missing, 0))
        return True

    def _victim(self, seq: Sequence) -> Sequence | None:
        """The latest-arrived sequence not in flight, if not older than `seq`; `seq` itself only
        when nothing is in flight that could give blocks back."""
        latest = next(s for s in reversed(self._running) if s.request_id not in self._in_flight)
        if latest is seq and self._in_flight:
            return None
        return latest

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._release_blocks(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.num_preemptions_total += 1
        seq.status = SequenceStatus.WAITING
        insort(self._waiting, seq, key=self._key)

    def update(self, batch: ScheduledBatch, sampled: Iterable[int | None]) -> list[SequenceUpdate]:
        """Take a batch's tokens, one per item (None where it draws none), back from the ranks."""
        updates = []
        for item, token_id in zip(batch.items, sampled, strict=True):
            seq = item.seq
            self._in_flight.remove(seq.request_id)
            if seq.request_id in self._aborted:
                self._aborted.remove(seq.request_id)
                self._remove(seq)
                continue
            seq.num_computed_tokens = item.start + item.num_tokens
            if item.samples:
                assert token_id is not None, seq.request_id
                updates.append(self._append(seq, token_id))
        return updates

    def _append(self, seq: Sequence, token_id: int) -> SequenceUpdate:
        seq.output_token_ids.append(token_id)
        reason = self._finish_reason(seq, token_id)
        if reason is not None:
            self._remove(seq)
        return SequenceUpdate(seq.request_id, token_id, len(seq.output_token_ids) - 1, reason)

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.params
        if token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self._eos):
            return "stop"
        full = seq.num_tokens >= self.max_model_len
        return "length" if full or len(seq.output_token_ids) >= params.max_tokens else None

    # ---------------------------------------------------------------- checks

    def _covers(self, seq: Sequence) -> bool:
        return self.block_manager.blocks_needed(seq.num_computed_tokens) <= len(seq.block_table)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, statuses and order are consistent."""
        self.block_manager.check_integrity(seq.block_table for seq in self.sequences())
        for seq in self._waiting:
            assert (seq.status, seq.block_table) == (SequenceStatus.WAITING, []), seq
        for seq in self._running:
            assert seq.status is SequenceStatus.RUNNING, seq
            assert self._covers(seq), seq
            assert seq.num_uncomputed_tokens > 0, seq
        running = [s.request_id for s in self._running]
        assert self._aborted <= self._in_flight <= set(running), (self._in_flight, running)
        for group in (self._running, self._waiting):
            assert group == sorted(group, key=self._key), "not in arrival order"


def _next_item(seq: Sequence, budget_tokens: int) -> ScheduledItem:
    start, num_tokens = seq.num_computed_tokens, min(seq.num_uncomputed_tokens, budget_tokens)
    return ScheduledItem(seq, start, num_tokens, samples=start + num_tokens == seq.num_tokens)


def _num_tokens(items: Iterable[ScheduledItem]) -> int:
    return sum(item.num_tokens for item in items)
