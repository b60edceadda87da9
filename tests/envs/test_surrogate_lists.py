"""Lists of sequences in order of arrival: wherever the place is looked for, it is the same."""

import numpy as np
import pytest

from envs.surrogate import kernel, layout
from envs.surrogate.layout import NONE, WAITING
from envs.surrogate.state import new_records

NUM_ROWS = 3


def empty(num: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sequences with equal arrival times among them, and rows without any."""
    rng = np.random.default_rng(seed)
    seqs = new_records(rng.integers(0, 40, num).astype(float), rng.integers(1, 99, num), 1)
    lists = np.zeros((NUM_ROWS + 1, 2), layout.LIST)
    lists["head"] = lists["tail"] = NONE
    return seqs, np.zeros(NUM_ROWS, layout.REPLICA), lists, np.zeros(1, layout.COUNTS)


@pytest.mark.parametrize("seed", range(5))
def test_many_are_enqueued_as_one_after_the_other(seed: int) -> None:
    num, rng = 120, np.random.default_rng(seed)
    slots, rows = rng.permutation(num), rng.integers(0, NUM_ROWS, num)
    seqs, replicas, lists, counts = empty(num, seed)
    kernel.enqueue_all(seqs, replicas, lists, counts[0], slots, rows, 5.0)
    for row in range(NUM_ROWS):
        mine = slots[rows == row]
        found, is_whole = kernel.slots_of(seqs, lists[row, WAITING])
        assert is_whole
        arrival_s = seqs["arrival_s"][mine]
        assert found.tolist() == mine[np.argsort(arrival_s, kind="stable")].tolist()
        assert lists[row, WAITING]["prompt_tokens"] == seqs["prompt_tokens"][mine].sum()
        assert replicas[row]["num_outstanding"] == len(mine)
    other, others, apart, counted = empty(num, seed)
    for s, row in zip(slots.tolist(), rows.tolist(), strict=True):
        kernel.enqueue(other, others, apart, counted[0], s, row, 5.0, NONE)
    assert (other == seqs).all()
    assert (apart == lists).all()
    assert (others == replicas).all()
    assert counted == counts


def test_a_list_that_counts_wrong_is_told() -> None:
    seqs, replicas, lists, counts = empty(4, 0)
    kernel.enqueue_all(seqs, replicas, lists, counts[0], np.arange(4), np.zeros(4, np.int64), 0.0)
    for wrong in (3, 5):
        lists[0, WAITING]["count"] = wrong
        assert not kernel.slots_of(seqs, lists[0, WAITING])[1]
