"""The batch scheduler: continuous batching, chunked prefill, prefix caching, preemption by
recompute, micro-batches for a pipeline. Pure.

The order of service is vLLM v1's: running sequences first, then waiting ones in arrival order,
while the token, sequence and block budgets last.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping

from engine.batch import ScheduledBatch, ScheduledItem
from engine.block_manager import BlockManager
from engine.errors import InfeasibleError
from engine.messages import TokenUpdate
from engine.request import Sequence, SequenceStatus, TokenLogprobs

_NONE_ASKED: Mapping[int, list[TokenLogprobs]] = {}


class BatchScheduler:
    """Owns the sequences of one replica and, through their tables, the blocks they hold.

    A replica of `num_stages` pipeline stages has up to that many batches in flight, a sequence in
    only one of them. So that no stage idles, a batch takes its share of the sequences, not all.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_id: int | Collection[int] | None,
        num_stages: int = 1,
    ) -> None:
        assert max_num_seqs > 0, max_num_seqs
        assert max_num_batched_tokens > 0, max_num_batched_tokens
        assert num_stages > 0, num_stages
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_stages = num_stages
        eos = () if eos_token_id is None else eos_token_id
        self._eos = frozenset((eos,) if isinstance(eos, int) else eos)
        self._waiting: list[Sequence] = []  # both in arrival order
        self._running: list[Sequence] = []
        self._live: dict[str, Sequence] = {}
        self._in_flight: set[str] = set()
        self._aborted: set[str] = set()  # in flight; they go at their next update
        self._num_added = 0
        self._num_steps = 0
        self.waiting_prompt_tokens = 0
        self.num_preemptions_total = 0

    # ---------------------------------------------------------------- what is there

    @property
    def has_work(self) -> bool:
        return bool(self._live)

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
    def running_context_tokens(self) -> int:
        return sum([seq.num_computed_tokens for seq in self._running])

    def sequences(self) -> list[Sequence]:
        """Every sequence here, in arrival order."""
        return sorted(self._live.values(), key=_order)

    # ---------------------------------------------------------------- coming and going

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that holds no blocks; output tokens it has already are re-prefilled.

        Raises InfeasibleError when this replica could never hold it to its end.
        """
        assert not seq.block_table, seq.request_id
        self._check_fits(seq)
        self._register(seq)
        self._wait(seq)

    def adopt(self, seq: Sequence) -> None:
        """Insert a migrated sequence whose block table came from this block manager; its full
        blocks can be matched from now on."""
        assert seq.status is SequenceStatus.RUNNING, seq.status
        assert self._covers(seq), seq.request_id
        self._register(seq)
        insort(self._running, seq, key=_order)
        self.block_manager.cache_computed(seq, 0)

    def abort(self, request_id: str) -> bool:
        """Drop a sequence and free its blocks, at its next update if it is in flight.

        False when it is not here (any more).
        """
        if request_id not in self._live or request_id in self._aborted:
            return False
        if request_id in self._in_flight:
            self._aborted.add(request_id)
        else:
            self._remove(self._live[request_id])
        return True

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
        assert seq.request_id not in self._live, seq.request_id
        self._live[seq.request_id] = seq
        seq.arrival = self._num_added
        self._num_added += 1

    def _remove(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._running.remove(seq)
        else:
            self._waiting.remove(seq)
            self.waiting_prompt_tokens -= len(seq.prompt_token_ids)
        del self._live[seq.request_id]
        self.block_manager.release(seq)
        seq.status = SequenceStatus.FINISHED

    def _wait(self, seq: Sequence) -> None:
        seq.status, seq.num_computed_tokens = SequenceStatus.WAITING, 0
        insort(self._waiting, seq, key=_order)
        self.waiting_prompt_tokens += len(seq.prompt_token_ids)

    # ---------------------------------------------------------------- a step

    def schedule(self) -> ScheduledBatch | None:
        """The next batch, now in flight, or None when no sequence can make a step."""
        preempted_before = self.num_preemptions_total
        share_of_running = self._share(len(self._running))
        share_of_all = self._share(min(len(self._live), self.max_num_seqs))
        items = self._schedule_running(share_of_running)
        if self.num_preemptions_total == preempted_before:
            budget = self.max_num_batched_tokens - sum([item.num_tokens for item in items])
            items += self._schedule_waiting(budget, share_of_all - len(items))
        if not items:
            return None
        self._in_flight.update([item.seq.request_id for item in items])
        batch = ScheduledBatch(self._num_steps, tuple(items))
        self._num_steps += 1
        return batch

    def _share(self, num_sequences: int) -> int:
        """Sequences of one micro-batch when every stage is to have one."""
        return -(-num_sequences // self.num_stages)

    def _schedule_running(self, max_items: int) -> list[ScheduledItem]:
        items: list[ScheduledItem] = []
        budget = self.max_num_batched_tokens
        for seq in list(self._running):
            if budget == 0 or len(items) == max_items:
                break
            if seq.request_id in self._in_flight or seq.status is not SequenceStatus.RUNNING:
                continue
            item = _next_item(seq, budget)
            if self._make_room(seq, item.start + item.num_tokens):
                items.append(item)
                budget -= item.num_tokens
        return items

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow a running sequence's table to hold `num_tokens`, preempting later ones."""
        while not self.block_manager.grow(seq, num_tokens):
            victim = self._victim(seq)
            if victim is None:
                return False  # sequences in flight may give their blocks back: wait for them
            self._preempt(victim)
            if victim is seq:
                return False
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
        self.block_manager.release(seq)
        seq.pending_logprobs.clear()
        seq.num_preemptions += 1
        self.num_preemptions_total += 1
        self._wait(seq)

    def start_over(self) -> None:
        """What blocks hold is lost: every sequence waits to be prefilled again. None may be in
        flight."""
        assert not self._in_flight, self._in_flight
        for seq in list(self._running):
            self._preempt(seq)
        self.block_manager.forget_cached()

    def _schedule_waiting(self, budget: int, max_items: int) -> list[ScheduledItem]:
        items: list[ScheduledItem] = []
        while (
            self._waiting
            and budget > 0
            and len(items) < max_items
            and len(self._running) < self.max_num_seqs
            and self.block_manager.admit(seq := self._waiting[0], budget)
        ):
            del self._waiting[0]
            self.waiting_prompt_tokens -= len(seq.prompt_token_ids)
            seq.status = SequenceStatus.RUNNING
            insort(self._running, seq, key=_order)
            items.append(item := _next_item(seq, budget))
            budget -= item.num_tokens
        return items

    # ---------------------------------------------------------------- after a step

    def update(
        self,
        batch: ScheduledBatch,
        sampled: Iterable[int | None],
        logprobs: Mapping[int, list[TokenLogprobs]] = _NONE_ASKED,
    ) -> list[TokenUpdate]:
        """Take a batch's tokens, one per item (None where it draws none), back from the ranks, and
        by item the log probabilities that were asked for (`StepOutput`)."""
        updates = []
        for index, (item, token_id) in enumerate(zip(batch.items, sampled, strict=True)):
            seq = item.seq
            self._in_flight.remove(seq.request_id)
            if seq.request_id in self._aborted:
                self._aborted.remove(seq.request_id)
                self._remove(seq)
                continue
            seq.num_computed_tokens = item.start + item.num_tokens
            self.block_manager.cache_computed(seq, item.start)
            if logprobs:
                seq.pending_logprobs += logprobs.get(index, ())
            if item.samples:
                assert token_id is not None, seq.request_id
                updates.append(self._append(seq, token_id))
        return updates

    def _append(self, seq: Sequence, token_id: int) -> TokenUpdate:
        seq.output_token_ids.append(token_id)
        index, reason = len(seq.output_token_ids) - 1, self._finish_reason(seq, token_id)
        logprobs, seq.pending_logprobs = seq.pending_logprobs, []
        if reason:
            self._remove(seq)
        elif index:
            return TokenUpdate(seq.request_id, index, token_id, "", logprobs)
        counts = seq.num_preemptions, seq.num_cached_tokens
        queue_s = None if index else seq.queue_s
        return TokenUpdate(seq.request_id, index, token_id, reason, logprobs, *counts, queue_s)

    def _finish_reason(self, seq: Sequence, token_id: int) -> str:
        params = seq.params
        if token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self._eos):
            return "stop"
        full = seq.num_tokens >= self.max_model_len
        return "length" if full or len(seq.output_token_ids) >= params.max_tokens else ""

    # ---------------------------------------------------------------- checks

    def _covers(self, seq: Sequence) -> bool:
        return self.block_manager.blocks_needed(seq.num_computed_tokens) <= len(seq.block_table)

    def check_integrity(self, held: Iterable[list[int]] = ()) -> None:
        """Raise AssertionError unless blocks, statuses and order are consistent. `held` are block
        tables of this block manager that sequences elsewhere hold."""
        tables = [seq.block_table for seq in self._live.values()]
        self.block_manager.check_integrity([*tables, *held])
        for seq in self._waiting:
            assert (seq.status, seq.block_table) == (SequenceStatus.WAITING, []), seq
        for seq in self._running:
            assert seq.status is SequenceStatus.RUNNING, seq
            assert self._covers(seq), seq
            assert seq.num_uncomputed_tokens > 0, seq
        for group in (self._running, self._waiting):
            assert group == sorted(group, key=_order), "not in arrival order"
        assert sorted([*self._running, *self._waiting], key=_order) == self.sequences()
        running = [s.request_id for s in self._running]
        assert self._aborted <= self._in_flight <= set(running), (self._in_flight, running)
        waiting_tokens = sum(len(seq.prompt_token_ids) for seq in self._waiting)
        assert self.waiting_prompt_tokens == waiting_tokens, self.waiting_prompt_tokens


def _order(seq: Sequence) -> tuple[float, int]:
    return seq.arrival_s, seq.arrival


def _next_item(seq: Sequence, budget_tokens: int) -> ScheduledItem:
    start, num_tokens = seq.num_computed_tokens, min(seq.num_uncomputed_tokens, budget_tokens)
    return ScheduledItem(seq, start, num_tokens, samples=start + num_tokens == seq.num_tokens)
