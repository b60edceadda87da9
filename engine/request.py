"""A request inside the engine: sampling parameters, the sequence and its states, a step's input."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from engine.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing;
    penalties 0, 0 and 1 change nothing.

    `logprobs` asks for the log probability of each sampled token and of that many likeliest ones,
    `prompt_logprobs` for the same of the prompt's tokens from the second on; None asks for none.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


INT64 = 2**63  # numbers go to the leaders as signed 64-bit integers
MAX_LOGPROBS = 20  # OpenAI's own limit


def check_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequestError when a value is out of range; whichever door it came through."""
    expected = (
        ("max_tokens", 1 <= params.max_tokens < INT64, "at least 1"),
        ("temperature", 0 <= params.temperature < inf, "a finite number, 0 (greedy) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", 0 <= params.top_k < INT64, "0 (all tokens) or more"),
        ("seed", -INT64 <= params.seed < INT64, "a signed 64-bit integer"),
        ("min_p", 0 <= params.min_p <= 1, "0 (all tokens) to 1"),
        ("presence_penalty", -2 <= params.presence_penalty <= 2, "-2 to 2"),
        ("frequency_penalty", -2 <= params.frequency_penalty <= 2, "-2 to 2"),
        ("repetition_penalty", 0 < params.repetition_penalty < inf, "a finite number above 0"),
        ("logprobs", 0 <= (params.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            0 <= (params.prompt_logprobs or 0) <= MAX_LOGPROBS,
            f"0 to {MAX_LOGPROBS}",
        ),
        ("stop_token_ids", all(0 <= i < INT64 for i in params.stop_token_ids), "token ids"),
    )
    for name, holds, wanted in expected:
        if not holds:
            raise InvalidRequestError(
                f"{name} is {getattr(params, name)}; expected {wanted}.", param=name
            )


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in a replica. Its leader rank owns it; the blocks of its table are held for it,
    those of a prefix perhaps for others too.

    `num_computed_tokens` counts tokens (prompt and output) whose keys and values are in the cache.
    The last token of a decoding sequence is never in the cache: it is the next step's input.
    `num_cached_tokens` are prompt tokens that the prefix cache had when it first ran; `arrival`
    orders sequences of equal `arrival_s`; `pending_logprobs` gathers those of the prompt, chunk by
    chunk, until the first token.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    queue_s: float | None = None  # from submission to its first step here
    arrival: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    pending_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """They are asked for and have not been given, which happens with the first token."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt followed by output."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - split]


@dataclass(frozen=True, slots=True)
class Penalties:
    """What has been said and how it counts against saying it again, as OpenAI and (`repetition`)
    CTRL define it. The lists may be the sequence's own; read them before its next step."""

    presence: float
    frequency: float
    repetition: float
    prompt_token_ids: list[int]
    output_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to draw one token. `position` (output tokens before it) and seed key the generator, so
    no generator state exists that a switch would have to move."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    min_p: float = 0.0
    logprobs: int | None = None
    penalties: Penalties | None = None


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """Prompt tokens whose log probability is wanted: `token_ids` follow the first
    len(token_ids) tokens that a sequence contributes to a step."""

    num_top: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a token under the model's own distribution (before penalties and
    temperature), and the likeliest tokens there with theirs, falling."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One forward step of a replica, sent by the leader to every rank. B sequences, T tokens.

    token_ids[T] are the tokens of all sequences, one after another; sequence b contributes
    lengths[b] of them, at context positions starts[b] .. starts[b] + lengths[b]. samples[b] is
    None where the step ends inside the prompt and no token is drawn. `prompt_targets` names, by
    b, the sequences that want log probabilities of their prompt.
    """

    step_id: int
    token_ids: list[int]
    starts: list[int]
    lengths: list[int]
    block_tables: list[list[int]]
    samples: list[SampleSpec | None]
    prompt_targets: dict[int, PromptTargets] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives back: a token per sequence (None where none was drawn) and, by sequence b,
    the log probabilities asked for: its prompt targets' first, then the drawn token's."""

    step_id: int
    tokens: list[int | None]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
