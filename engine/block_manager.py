"""Paged-KV accounting: which blocks of a replica are free. Pure; the tensors are elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockManager:
    """Owns the free list of `num_blocks` KV blocks of `block_size` tokens each.

    A block is either free here or in exactly one live block table, whose holder must hand it back
    through `free`. Ask first (`can_allocate`), then act: `allocate` never fails halfway.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers leave first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks off the free list; they belong to the caller until `free`."""
        assert 0 <= num_blocks <= len(self._free), (num_blocks, len(self._free))
        return [self._free.pop() for _ in range(num_blocks)]

    def free(self, blocks: Sequence[int]) -> None:
        """Hand blocks back, last of the table first, so that a table is reused in its order."""
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks, "a block was freed twice"

    def check_integrity(self, live_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless each block is free once or in exactly one live table once."""
        held = Counter(self._free)
        for table in live_tables:
            held.update(table)
        shared = {block: count for block, count in held.items() if count > 1}
        lost = set(range(self.num_blocks)) - held.keys()
        unknown = held.keys() - set(range(self.num_blocks))
        if shared or lost or unknown:
            raise AssertionError(
                f"KV blocks out of order: held more than once {shared}, held by nobody "
                f"{sorted(lost)}, unknown {sorted(unknown)}."
            )
