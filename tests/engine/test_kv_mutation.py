"""Migrated KV is byte-equal to its source, and the model reads all of it: corrupting any migrated
block on any rank changes the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from identity import EPSILON, prompt
from rank_threads import BLOCK, RankThreads

from engine.cluster import ParallelConfig, Placement, Replica
from engine.messages import KvMove
from engine.migration.kv import kv_moves
from engine.request import StepInput

LENGTH = 21  # tokens in the cache: five full blocks and one token of a sixth
OLD_TABLE, NEW_TABLE = [9, 0, 3, 7, 1, 4], [2, 5, 8, 6, 0, 9]
CHANGES = [((1, 1), (2, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 2)), ((4, 1), (1, 3)), ((2, 2), (4, 1))]


@contextmanager
def ranks(folder: Path, tp: int, pp: int) -> Iterator[RankThreads]:
    made = RankThreads(folder, ParallelConfig(tp, pp), num_blocks=10)
    try:
        yield made
    finally:
        made.close()


def replica(of: RankThreads, replica_id: int) -> Replica:
    return Replica(replica_id, of.parallel, Placement(tuple(range(of.parallel.num_devices))))


def step(tokens: list[int], start: int, table: list[int]) -> StepInput:
    return StepInput(0, tokens, [start], [len(tokens)], [table], [None])


def source_of(old: RankThreads, move: KvMove) -> torch.Tensor:
    return old.runners[move.src].kv.read_blocks(move.src_blocks, move.src_layers, move.src_heads)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_every_migrated_block_is_equal_and_counts(
    tiny_model_dir: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    with ranks(tiny_model_dir, *before) as old, ranks(tiny_model_dir, *after) as new:
        tokens = prompt(LENGTH + 1)
        old.logits(step(tokens[:-1], 0, OLD_TABLE))
        model = old.runners[0].spec
        moves = list(kv_moves(model, replica(old, 0), replica(new, 1), OLD_TABLE, NEW_TABLE))
        for move in moves:
            kv = new.runners[move.dst].kv
            kv.write_blocks(move.dst_blocks, move.dst_layers, move.dst_heads, source_of(old, move))
        for move in moves:
            arrived = new.runners[move.dst].kv.read_blocks(
                move.dst_blocks, move.dst_layers, move.dst_heads
            )
            assert torch.equal(arrived, source_of(old, move))
        last = step(tokens[-1:], LENGTH, NEW_TABLE)
        expected = old.logits(step(tokens[-1:], LENGTH, OLD_TABLE))
        whole = new.logits(last)
        assert torch.allclose(whole, expected, atol=1e-4)
        for runner in new.runners:
            for index, block in enumerate(NEW_TABLE):
                used = slice(0, min(BLOCK, LENGTH - index * BLOCK))
                part = runner.kv.data[:, :, block, used]
                kept = part.clone()
                part.neg_()
                change = (new.logits(last) - whole).abs().max().item()
                assert change > EPSILON, (runner.rank, index, change)
                part.copy_(kept)
        assert torch.equal(new.logits(last), whole)
