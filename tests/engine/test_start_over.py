"""What a rank gives up for a switch in place: weights that it unbinds, blocks that it forgets."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from engine.block_manager import BlockManager
from engine.cluster import ParallelConfig
from engine.request import SamplingParams, Sequence, StepInput
from engine.runner import ModelRunner, load_weights
from engine.scheduler import BatchScheduler


def sequence(name: str, num_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    return Sequence(name, list(range(num_tokens)), params, arrival_s=0.0)


def test_sequences_start_over_and_no_block_is_found_again() -> None:
    scheduler = BatchScheduler(BlockManager(16, 4), 8, 64, 64, None)
    for name in ("a", "b"):
        scheduler.add(sequence(name, 10))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, [1] * len(batch.items))
    scheduler.add(sequence("c", 10))  # would find the prefix
    with pytest.raises(AssertionError):
        scheduler.block_manager.forget_cached()  # blocks are in use
    scheduler.start_over()
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 3)
    assert scheduler.block_manager.num_used == 0
    again = scheduler.schedule()
    assert again is not None
    assert [(i.start, i.num_tokens) for i in again.items] == [(0, 11), (0, 11), (0, 10)]
    scheduler.check_integrity()


@pytest.mark.parametrize("plain", [True, False])
def test_unbound_weights_are_freed_and_can_be_bound_again(
    tiny_model_dir: Path, plain: bool
) -> None:
    runner = ModelRunner(
        tiny_model_dir, ParallelConfig(1, 1), 0, 0, 16, "float32", "cpu", plain=plain
    )
    weights = load_weights(tiny_model_dir, runner)
    runner.bind(weights)
    alive = [weakref.ref(tensor) for tensor in weights.values()]
    runner.model.unbind()
    runner.bind(weights)
    runner.size_kv(4)
    step = StepInput(0, [1, 2, 3], [0], [3], [[0]], [None])
    with torch.inference_mode():
        runner.execute(step, None)
    runner.model.unbind()
    weights.clear()
    gc.collect()
    assert not any(ref() is not None for ref in alive)
