"""One scheduled step of a replica: which tokens of which sequences, and what the ranks must know of
it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.profile import attention_pairs
from engine.request import (
    Penalties,
    PromptTargets,
    SampleSpec,
    SamplingParams,
    Sequence,
    StepInput,
)

_GREEDY = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0)


class ScheduledItem(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence; `samples` where they end at its last."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Its sequences are in flight until `BatchScheduler.update` is given its tokens."""

    step_id: int
    items: tuple[ScheduledItem, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    def size(self) -> tuple[int, int, int, int, float]:
        """(tokens, sequences that decode, sequences, context tokens, attention pairs), as in
        `engine.messages.StepReport`."""
        tokens = decoding = context = 0
        pairs = 0.0
        for seq, start, num_tokens, _ in self.items:
            tokens, context = tokens + num_tokens, context + start + num_tokens
            pairs += attention_pairs(start, num_tokens)
            decoding += num_tokens == 1 and start >= len(seq.prompt_token_ids)
        return tokens, decoding, len(self.items), context, pairs

    def to_step_input(self) -> StepInput:
        """What the ranks need of this step. Its block tables are the sequences' own: read or
        encode it before the batch scheduler is called again."""
        tokens: list[int] = []
        targets: dict[int, PromptTargets] = {}
        for index, (seq, start, num_tokens, _) in enumerate(self.items):
            tokens += seq.token_slice(start, start + num_tokens)
            if seq.awaits_prompt_logprobs:
                wanted = seq.prompt_token_ids[start + 1 : start + num_tokens + 1]
                if wanted:
                    targets[index] = PromptTargets(seq.params.prompt_logprobs or 0, wanted)
        return StepInput(
            step_id=self.step_id,
            token_ids=tokens,
            starts=[item.start for item in self.items],
            lengths=[item.num_tokens for item in self.items],
            block_tables=[item.seq.block_table for item in self.items],
            samples=[sample_spec(item.seq) if item.samples else None for item in self.items],
            prompt_targets=targets,
        )


def sample_spec(seq: Sequence) -> SampleSpec:
    """How to draw a sequence's next token."""
    params = seq.params
    if params.temperature == 0 and params.logprobs is None and not params.has_penalties:
        return _GREEDY
    return SampleSpec(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        position=len(seq.output_token_ids),
        min_p=params.min_p,
        logprobs=params.logprobs,
        penalties=_penalties(params, seq) if params.has_penalties else None,
    )


def _penalties(params: SamplingParams, seq: Sequence) -> Penalties:
    return Penalties(
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        seq.prompt_token_ids,
        seq.output_token_ids,
    )
