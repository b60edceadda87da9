"""Sequences on their way between replicas, and the blocks kept for them at either end. Pure."""

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


class Departures:
    """Sequences that run here while their blocks are copied elsewhere. A second holder keeps the
    blocks from being used for anything else, should their sequence end or be preempted."""

    def __init__(self, scheduler: BatchScheduler) -> None:
        self._scheduler = scheduler
        self._held: list[list[int]] = []

    def take(self) -> list[SequenceState]:
        """Every sequence as it stands. The blocks of its computed tokens keep their content until
        the next `take` or `let_go`."""
        blocks, sequences = self._scheduler.block_manager, self._scheduler.sequences()
        held = [s.block_table[: blocks.blocks_needed(s.num_computed_tokens)] for s in sequences]
        for table in held:
            blocks.share(table)
        self.let_go()
        self._held = held
        return [state_of(s) for s in sequences]

    def let_go(self) -> None:
        """Nothing is copied from here any more."""
        for table in self._held:
            self._scheduler.block_manager.free(table)
        self._held = []

    def tables(self) -> list[list[int]]:
        """Block tables held here."""
        return self._held


class Arrivals:
    """Sequences that hold blocks of a replica but do not run before the switch commits.

    A prefix arrives once: full blocks of the same tokens are one block here, however many replicas
    and sequences they come from, and one that the replica has cached already does not come at all.
    """

    def __init__(self, scheduler: BatchScheduler) -> None:
        self.scheduler = scheduler
        self.blocks = scheduler.block_manager
        self._sequences: dict[str, Sequence] = {}
        self._coming: dict[bytes, int] = {}  # full blocks under way, by hash

    def reserve(self, states: list[SequenceState]) -> tuple[list[list[int]], list[int]]:
        """Be ready for exactly these sequences as they are now; what was reserved for others is
        given back, for those that have grown it grows.

        Returns the block table of each, empty where no room is left or nothing is computed, and the
        blocks of the tables that were taken just now, whose content must be copied here.
        """
        for gone in self._sequences.keys() - {state.request_id for state in states}:
            self._forget(gone)
        tables: list[list[int]] = []
        to_fill: list[int] = []
        for state in states:
            seq = self._sequences.get(state.request_id)
            if seq is not None and seq.num_preemptions != state.num_preemptions:
                self._forget(state.request_id)  # its blocks were lost: all of it comes anew
                seq = None
            seq = seq or sequence_of(state)
            seq.output_token_ids = list(state.output_token_ids)
            seq.pending_logprobs = list(state.pending_logprobs)
            fresh = self._reserve(seq, state.num_computed_tokens)
            if fresh is None or not seq.block_table:
                self._forget(state.request_id)
                tables.append([])
                continue
            self._sequences[state.request_id] = seq
            tables.append(list(seq.block_table))
            to_fill += fresh
        return tables, to_fill

    def _forget(self, request_id: str) -> None:
        seq = self._sequences.pop(request_id, None)
        if seq is None:
            return
        self.blocks.free(seq.block_table)
        held = {block for other in self._sequences.values() for block in other.block_table}
        self._coming = {h: block for h, block in self._coming.items() if block in held}

    def _reserve(self, seq: Sequence, num_computed_tokens: int) -> list[int] | None:
        """Extend a table to so many tokens; the blocks taken for that, None without room."""
        blocks, table = self.blocks, seq.block_table
        hashes: list[bytes] = []
        if blocks.enable_prefix_caching:
            num_full = num_computed_tokens // blocks.block_size
            hashes = block_hashes(seq, num_full, blocks.block_size)
        shared = [] if table else self._present(hashes)
        missing = blocks.blocks_needed(num_computed_tokens) - len(shared) - len(table)
        if not blocks.can_allocate(missing, beside=shared):
            return None
        blocks.share(shared)
        fresh = blocks.allocate(missing)
        seq.block_table = table + shared + fresh
        for digest, block in zip(hashes, seq.block_table, strict=False):  # the last is not full
            self._coming.setdefault(digest, block)
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
        return [seq.block_table for seq in self._sequences.values()]

    def adopt(self) -> None:
        """The content has come: let the sequences run and their full blocks be found."""
        for seq in self._sequences.values():
            self.scheduler.adopt(seq)
        self._sequences, self._coming = {}, {}

    def give_back(self) -> None:
        """The switch was rolled back: no sequence comes, their blocks are free again."""
        for seq in self._sequences.values():
            self.blocks.free(seq.block_table)
        self._sequences, self._coming = {}, {}
