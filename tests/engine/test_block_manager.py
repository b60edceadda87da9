import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_manager import BlockManager


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


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_no_block_is_lost_or_shared(actions: list[tuple[bool, int]]) -> None:
    manager = BlockManager(num_blocks=12, block_size=4)
    live: list[list[int]] = []
    for take, amount in actions:
        if take and manager.can_allocate(amount):
            live.append(manager.allocate(amount))
        elif not take and live:
            manager.free(live.pop(amount % len(live)))
        manager.check_integrity(live)
        assert manager.num_used == sum(map(len, live))
