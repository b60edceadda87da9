"""Paged-KV accounting: which blocks of a replica are free, shared and found again. Pure; the
tensors are elsewhere.

Prefix caching: a block whose tokens are all computed can be registered under the hash of its
tokens and of all before it. It is never written again, so any number of tables may hold it, and
when none does it stays to be found until its space is needed.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from itertools import takewhile

from engine.request import Sequence

_ROOT = b""  # stands before the first block of every sequence


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """256-bit BLAKE2b of a full block's tokens and of its parent's hash (b"" for a first block):
    as wide as needed for nobody to find two prompts that share one."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=32).digest()


def block_hashes(seq: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """Hashes of the first `num_blocks` blocks of a sequence that has the tokens to fill them;
    each is computed once and kept with the sequence."""
    known = seq.block_hashes
    for index in range(len(known), num_blocks):
        tokens = seq.token_slice(index * block_size, (index + 1) * block_size)
        known.append(block_hash(known[-1] if known else _ROOT, tokens))
    return known[:num_blocks]


class BlockManager:
    """Owns `num_blocks` KV blocks of `block_size` tokens each.

    A block is free; or referenced, by as many live block tables as its count, whose holders each
    hand it back through `free`; or reusable: cached, referenced by nobody, and taken for new
    tokens when no free one is left, least recently used first. Ask first (`can_allocate`), then
    act: `allocate` never fails halfway.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers leave first
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_references = [0] * num_blocks
        self._max_used = num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}  # its inverse
        self.prefix_cache_queries = 0  # tokens looked up, and found, as vLLM counts them: once a
        self.prefix_cache_hits = 0  # request, not again after a preemption

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and reusable ones, within the limit."""
        return max(0, self._max_used - self.num_used)

    @property
    def num_used(self) -> int:
        """Blocks in live tables, each counted once."""
        return self.num_blocks - len(self._free) - len(self._reusable)

    def limit(self, max_used: int | None) -> None:
        """Keep at most so many blocks in live tables, while others need the memory; None: all may
        be used. More that are in use stay until they are freed."""
        self._max_used = self.num_blocks if max_used is None else min(max_used, self.num_blocks)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int, beside: Iterable[int] = ()) -> bool:
        """Whether `num_blocks` could be taken after the cached blocks `beside` are shared."""
        unreferenced = sum(not self._num_references[block] for block in beside)
        return num_blocks <= self.num_free - unreferenced

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for new tokens; they belong to the caller until `free`."""
        assert 0 <= num_blocks <= self.num_free, (num_blocks, self.num_free)
        return [self._take() for _ in range(num_blocks)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._num_references[block] = 1
        return block

    def free(self, blocks: list[int]) -> None:
        """Hand a table back, its last block first: free ones are reused in the table's order, and
        of cached ones the end of a prefix goes before its beginning, which more prompts share."""
        for block in reversed(blocks):
            self._num_references[block] -= 1
            assert self._num_references[block] >= 0, "a block was freed twice"
            if self._num_references[block] == 0:
                if block in self._hash_of:
                    self._reusable[block] = None
                else:
                    self._free.append(block)

    # ---------------------------------------------------------------- tables of sequences

    def admit(self, seq: Sequence, budget_tokens: int) -> bool:
        """Give a sequence without blocks its cached prefix, which counts as computed, and room for
        its next tokens, at most `budget_tokens`; nothing happens unless all of it fits."""
        cached = self._cached_prefix(seq)
        start = len(cached) * self.block_size
        missing = self.blocks_needed(min(seq.num_tokens, start + budget_tokens)) - len(cached)
        if not self.can_allocate(missing, beside=cached):
            return False
        self.share(cached)
        seq.block_table = cached + self.allocate(missing)
        seq.num_computed_tokens = start
        if self._looks_up(seq) and not seq.num_preemptions and not seq.output_token_ids:
            seq.num_cached_tokens = start
            self.prefix_cache_queries += seq.num_tokens
            self.prefix_cache_hits += start
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend a table to hold `num_tokens`; nothing happens unless all of it fits."""
        missing = self.blocks_needed(num_tokens) - len(seq.block_table)
        if missing > 0:
            if not self.can_allocate(missing):
                return False
            seq.block_table += self.allocate(missing)
        return True

    def release(self, seq: Sequence) -> None:
        """Free a sequence's whole table."""
        self.free(seq.block_table)
        seq.block_table = []

    def cache_computed(self, seq: Sequence, start: int) -> None:
        """Make those blocks matchable that were filled by computing tokens from `start` on."""
        first, stop = start // self.block_size, seq.num_computed_tokens // self.block_size
        if first < stop and self.enable_prefix_caching:
            hashes = block_hashes(seq, stop, self.block_size)
            self.register(seq.block_table[first:stop], hashes[first:])

    def _looks_up(self, seq: Sequence) -> bool:
        """Prompt tokens whose log probabilities are asked for must all be computed."""
        return self.enable_prefix_caching and not seq.awaits_prompt_logprobs

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks to begin with; the last token is computed in any case, for its logits."""
        if not self._looks_up(seq):
            return []
        num_blocks = (seq.num_tokens - 1) // self.block_size
        return self.match(block_hashes(seq, num_blocks, self.block_size))

    # ---------------------------------------------------------------- cached blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Cached blocks of the longest prefix of `hashes` that is here; `share` them at once."""
        found = map(self._block_of.get, hashes)
        return [block for block in takewhile(lambda b: b is not None, found) if block is not None]

    def share(self, blocks: Iterable[int]) -> None:
        """Hold live or reusable blocks in one more table."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._reusable[block]
            self._num_references[block] += 1

    def register(self, blocks: Iterable[int], hashes: Iterable[bytes]) -> None:
        """Make live blocks, computed to their last token, matchable. Where another block has the
        same content, that one is kept."""
        for block, digest in zip(blocks, hashes, strict=True):
            assert self._num_references[block] > 0, block
            if digest not in self._block_of:
                assert block not in self._hash_of, block
                self._block_of[digest] = block
                self._hash_of[block] = digest

    def forget_cached(self) -> None:
        """What blocks hold is lost: none is found again. No table may hold any."""
        assert self.num_used == 0, self.num_used
        self._free += reversed(self._reusable)
        self._reusable.clear()
        self._hash_of.clear()
        self._block_of.clear()

    # ---------------------------------------------------------------- checks

    def check_integrity(self, live_tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless each block is free once, reusable once, or referenced by
        exactly as many live tables as its count; and unless hashes and blocks match one to one."""
        references = Counter[int]()
        for table in live_tables:
            assert len(set(table)) == len(table), f"a table holds a block more than once: {table}"
            references.update(table)
        held = Counter([*self._free, *self._reusable, *references])
        shared = {block: count for block, count in held.items() if count > 1}
        lost = set(range(self.num_blocks)) - held.keys()
        unknown = held.keys() - set(range(self.num_blocks))
        if shared or lost or unknown:
            raise AssertionError(
                f"KV blocks out of order: both free and in use, or free more than once {shared}, "
                f"held by nobody {sorted(lost)}, unknown {sorted(unknown)}."
            )
        for block, count in enumerate(self._num_references):
            assert count == references[block], (
                f"block {block} is in {references[block]} tables, its reference count is {count}"
            )
        assert self._hash_of == {block: digest for digest, block in self._block_of.items()}
        assert self._reusable.keys() <= self._hash_of.keys(), "a reusable block has no hash"
        assert not self._hash_of.keys() & set(self._free), "a free block has a hash"
