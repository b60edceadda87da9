"""The block manager by hand, and step by step against a plain model of what it should do."""

import struct
from hashlib import blake2b

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_manager import BlockManager, block_hash, block_hashes
from engine.request import SamplingParams, Sequence


def test_blocks_needed_rounds_up() -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    assert [manager.blocks_needed(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]


def test_allocate_and_free_by_hand() -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    assert manager.allocate(3) == [0, 1, 2]
    assert (manager.num_free, manager.num_used) == (1, 3)
    assert manager.can_allocate(1)
    assert not manager.can_allocate(2)
    manager.free([0, 1])
    assert manager.allocate(2) == [0, 1]
    with pytest.raises(AssertionError):
        manager.allocate(2)
    assert manager.num_free == 1  # a refused allocation takes nothing


@pytest.mark.parametrize(
    ("tables", "word"),
    [
        ([[0]], "nobody"),
        ([[0, 1], [1]], "in 2 tables"),
        ([[0, 1, 1]], "more than once"),
        ([[0, 1, 2]], "both free"),
        ([[0, 1, 9]], "unknown"),
    ],
)
def test_integrity_names_what_is_wrong(tables: list[list[int]], word: str) -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    manager.allocate(2)
    manager.check_integrity([[0], [1]])
    with pytest.raises(AssertionError, match=word):
        manager.check_integrity(tables)


def test_hashes_chain_by_hand() -> None:
    first = blake2b(struct.pack("4q", 1, 2, 3, 4), digest_size=32).digest()
    assert block_hash(b"", [1, 2, 3, 4]) == first
    second = blake2b(first + struct.pack("4q", 1, 2, 3, 4), digest_size=32).digest()
    seq = Sequence("a", [1, 2, 3, 4, 1, 2], SamplingParams(), 0.0, output_token_ids=[3, 4, 5])
    assert block_hashes(seq, 1, 4) == [first]
    assert block_hashes(seq, 2, 4) == [first, second]  # the same tokens after others: another hash
    assert seq.block_hashes == [first, second]


def hashes_of(blocks: list[int]) -> list[bytes]:
    """Chain of blocks that are each filled with one token, of a block size of 1."""
    chain = [b""]
    for token in blocks:
        chain.append(block_hash(chain[-1], [token]))
    return chain[1:]


def test_the_end_of_the_longest_unused_prefix_is_evicted_first() -> None:
    manager = BlockManager(num_blocks=5, block_size=1)
    old, new = hashes_of([1, 2, 3]), hashes_of([8, 9])
    for chain in (old, new):
        table = manager.allocate(len(chain))
        manager.register(table, chain)
        manager.free(table)
    assert (manager.num_free, manager.match(old), manager.match(new)) == (5, [0, 1, 2], [3, 4])
    assert manager.allocate(1) == [2]
    assert (manager.match(old), manager.match(new)) == ([0, 1], [3, 4])
    manager.share([0, 1])  # used again: now the most recent
    manager.free([0, 1])
    assert manager.allocate(2) == [4, 3]
    assert (manager.match(old), manager.match(new)) == ([0, 1], [])
    manager.check_integrity([[2], [4, 3]])


def test_a_block_is_free_when_its_last_table_is() -> None:
    manager = BlockManager(num_blocks=3, block_size=1)
    table = manager.allocate(2)
    manager.register(table, hashes_of([1, 2]))
    manager.share(table)
    manager.check_integrity([table, table])
    assert (manager.num_used, manager.can_allocate(1), manager.can_allocate(2)) == (2, True, False)
    manager.free(table)
    assert manager.num_used == 2
    manager.free(table)
    assert manager.num_used == 0
    assert manager.can_allocate(1, beside=table)
    assert not manager.can_allocate(2, beside=table)  # sharing takes two of the three
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(table)


class AgainstPlainModel(RuleBasedStateMachine):
    """Tables of chains over two tokens, so that prefixes meet often. The model knows no block
    numbers: live chains, which of them are registered, and cached chains in order of last use."""

    NUM_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.NUM_BLOCKS, 1)
        self.live: list[tuple[list[int], list[int]]] = []  # (tokens, table)
        self.known: dict[tuple[int, ...], int] = {}  # registered prefix -> its block
        self.unused: list[tuple[int, ...]] = []  # known, in no table; next to be evicted first

    def used(self) -> set[int]:
        return {block for _, table in self.live for block in table}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, tokens: list[int]) -> None:
        prefixes = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
        depth = next((i for i, p in enumerate(prefixes) if p not in self.known), len(tokens))
        matched = self.manager.match(hashes_of(tokens))
        assert matched == [self.known[p] for p in prefixes[:depth]]
        missing = len(tokens) - depth
        room = self.NUM_BLOCKS - len(self.used() | set(matched))
        assert self.manager.can_allocate(missing, beside=matched) == (missing <= room)
        if missing > room:
            return
        self.manager.share(matched)
        self.unused = [p for p in self.unused if p not in prefixes[:depth]]
        never_cached = self.NUM_BLOCKS - len(self.used() | set(self.known.values()))
        fresh = self.manager.allocate(missing)
        evicted = [self.unused.pop(0) for _ in range(missing - never_cached)]
        assert {self.known.pop(p) for p in evicted} <= set(fresh)
        self.live.append((tokens, matched + fresh))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        tokens, table = data.draw(st.sampled_from(self.live))
        stop = data.draw(st.integers(0, len(tokens)))
        self.manager.register(table[:stop], hashes_of(tokens)[:stop])
        for i in range(stop):
            self.known.setdefault(tuple(tokens[: i + 1]), table[i])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        tokens, table = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.manager.free(table)
        for i in reversed(range(len(tokens))):
            prefix = tuple(tokens[: i + 1])
            if self.known.get(prefix) == table[i] and table[i] not in self.used():
                self.unused.append(prefix)

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity(table for _, table in self.live)
        assert self.manager.num_used == len(self.used())


TestAgainstPlainModel = AgainstPlainModel.TestCase
TestAgainstPlainModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
