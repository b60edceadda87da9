"""Sequences on their way between replicas, and the blocks kept for those that arrive. Pure."""

from __future__ import annotations

from itertools import takewhile

from engine.block_manager import block_hashes
from engine.messages import SequenceState
from engine.request import Sequence, SequenceStatus
from engine.scheduler import BatchScheduler


def sequence_of(state: SequenceState) -> Sequence:
    """A waiting sequence with the tokens of `state` and no blocks, nothing computed."""
    return Sequence(
        request_id=state.request_id,
        prompt_token_ids=list(state.prompt_token_ids),
        params=state.params,
        arrival_s=state.arrival_s,
        output_token_ids=list(state.output_token_ids),
        num_preemptions=state.num_preemptions,
        num_cached_tokens=state.num_cached_tokens,
    )


def state_of(seq: Sequence) -> SequenceState:
    """All that another leader needs to go on with a sequence; its lists are not copied."""
    return SequenceState(
        request_id=seq.request_id,
        prompt_token_ids=seq.prompt_token_ids,
        output_token_ids=seq.output_token_ids,
        params=seq.params,
        arrival_s=seq.arrival_s,
        num_computed_tokens=seq.num_computed_tokens,
        num_preemptions=seq.num_preemptions,
        block_table=seq.block_table,
        num_cached_tokens=seq.num_cached_tokens,
        pending_logprobs=seq.pending_logprobs,
    )


class Arrivals:
    """Sequences that hold blocks of a replica but do not run before the switch commits.

    A prefix arrives once: full blocks of the same tokens are one block here, however many replicas
    and sequences they come from, and one that the replica has cached already does not come at all.
    """

    def __init__(self, scheduler: BatchScheduler) -> None:
        self.scheduler = scheduler
        self.blocks = scheduler.block_manager
        self._sequences: list[Sequence] = []
        self._coming: dict[bytes, int] = {}  # full blocks under way, by hash

    def reserve(self, states: list[SequenceState]) -> tuple[list[list[int]], list[int]]:
        """The block table of each state, empty where no room is left, and those blocks of the
        tables whose content must be copied here."""
        tables: list[list[int]] = []
        to_fill: list[int] = []
        for state in states:
            seq = sequence_of(state)
            fresh = self._reserve(seq, state.num_computed_tokens)
            if fresh is None:
                tables.append([])
                continue
            seq.pending_logprobs = list(state.pending_logprobs)
            self._sequences.append(seq)
            tables.append(list(seq.block_table))
            to_fill += fresh
        return tables, to_fill

    def _reserve(self, seq: Sequence, num_computed_tokens: int) -> list[int] | None:
        blocks = self.blocks
        hashes: list[bytes] = []
        if blocks.enable_prefix_caching:
            num_full = num_computed_tokens // blocks.block_size
            hashes = block_hashes(seq, num_full, blocks.block_size)
        shared = self._present(hashes)
        missing = blocks.blocks_needed(num_computed_tokens) - len(shared)
        if not blocks.can_allocate(missing, beside=shared):
            return None
        blocks.share(shared)
        fresh = blocks.allocate(missing)
        self._coming.update(zip(hashes[len(shared) :], fresh, strict=False))  # the last is not full
        seq.block_table = shared + fresh
        seq.num_computed_tokens = num_computed_tokens
        seq.status = SequenceStatus.RUNNING
        return fresh

    def _present(self, hashes: list[bytes]) -> list[int]:
        """Blocks of the longest prefix that is here or under way."""
        cached = self.blocks.match(hashes)
        rest = map(self._coming.get, hashes[len(cached) :])
        return cached + [b for b in takewhile(lambda b: b is not None, rest) if b is not None]

    def tables(self) -> list[list[int]]:
        """Block tables held here."""
        return [seq.block_table for seq in self._sequences]

    def adopt(self) -> None:
        """The content has come: let the sequences run and their full blocks be found."""
        for seq in self._sequences:
            self.scheduler.adopt(seq)
        self._sequences, self._coming = [], {}

    def give_back(self) -> None:
        """The switch was rolled back: no sequence comes, their blocks are free again."""
        for seq in self._sequences:
            self.blocks.free(seq.block_table)
        self._sequences, self._coming = [], {}
