"""An imitation of the paged KV cache in plain Python, for tests of what decides which blocks hold
what: every token that a step would attend to must be found at the place its block table says."""

from __future__ import annotations

from collections import deque

from engine.batch import ScheduledBatch
from engine.block_manager import BlockManager
from engine.request import SamplingParams, Sequence, StepInput
from engine.scheduler import BatchScheduler

BLOCK = 4
EOS = 99


def make_sequence(
    name: str, num_prompt: int, max_tokens: int = 4, arrival_s: float = 0.0, **params: object
) -> Sequence:
    prompt = [(7 * i + sum(map(ord, name))) % 50 for i in range(num_prompt)]
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens, **params), arrival_s)  # type: ignore[arg-type]


def make_scheduler(num_blocks: int = 16, caching: bool = True, **changes: int) -> BatchScheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | changes
    return BatchScheduler(BlockManager(num_blocks, BLOCK, caching), eos_token_id=EOS, **limits)


def shape(batch: ScheduledBatch | None) -> list[tuple[str, int, int, bool]]:
    assert batch is not None
    return [(i.seq.request_id, i.start, i.num_tokens, i.samples) for i in batch.items]


def next_token(tokens: list[int]) -> int:
    """A model whose next token depends on every token and its place; never EOS."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 97


class ImitatedCache:
    """Runs steps on a dictionary slot -> token in place of tensors."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def execute(self, step: StepInput) -> list[int | None]:
        sampled: list[int | None] = []
        row = 0
        for table, start, length, spec in zip(
            step.block_tables, step.starts, step.lengths, step.samples, strict=True
        ):
            for position in range(start, start + length):
                self.slots[self._slot(table, position)] = step.token_ids[row]
                row += 1
            context = [self.slots[self._slot(table, p)] for p in range(start + length)]
            sampled.append(None if spec is None else next_token(context))
        assert row == len(step.token_ids)
        return sampled

    def copy_blocks(
        self, source: ImitatedCache, src_blocks: list[int], dst_blocks: list[int]
    ) -> None:
        for src, dst in zip(src_blocks, dst_blocks, strict=True):
            for offset in range(BLOCK):
                if src * BLOCK + offset in source.slots:
                    self.slots[dst * BLOCK + offset] = source.slots[src * BLOCK + offset]

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // BLOCK] * BLOCK + position % BLOCK


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def run_all(scheduler: BatchScheduler, cache: ImitatedCache, pp: int = 1) -> None:
    in_flight: deque[tuple[ScheduledBatch, list[int | None]]] = deque()
    while scheduler.has_work:
        while len(in_flight) < pp and (batch := scheduler.schedule()) is not None:
            in_flight.append((batch, cache.execute(batch.to_step_input())))
            scheduler.check_integrity()
        assert in_flight, "work is left and nothing can be scheduled"
        scheduler.update(*in_flight.popleft())
        scheduler.check_integrity()
