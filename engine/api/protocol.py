"""What requests of the OpenAI API may say, and what that asks of the engine."""

from __future__ import annotations

import uuid
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InvalidRequestError
from engine.request import MAX_LOGPROBS, SamplingParams
from engine.text_choice import TextOptions

MAX_CHOICES = 128  # OpenAI's own limit of `n`
DEFAULT_COMPLETION_TOKENS = 16
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: an odd step, so no two choices share a seed

# Fields that would change the answer, with the values that ask for nothing. Whatever else the
# engine does not know has no influence on the tokens, such as `user`, and is ignored.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
}
_EXPECTED = {
    "prompt": "expected a text, a list of texts, token ids or a list of those",
    "stop": "expected a text or a list of texts",
}

Body = TypeVar("Body", bound="GenerationBody")


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: usage so far with every chunk


class GenerationBody(BaseModel):
    """Fields that both endpoints share. Ranges of sampling values are checked by the engine."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, ge=-1)  # 0 and -1 filter nothing
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, given: Any) -> Any:
        """OpenAI's clients may send null for whatever they leave out."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens wanted beside each sampled one; None: no log probabilities at all."""
        return None

    @property
    def echo_prompt(self) -> bool:
        return False

    def check(self) -> Self:
        """Raise InvalidRequestError for what no field says alone; returns itself."""
        extras = self.model_extra or {}
        for name, neutral in UNSUPPORTED.items():
            if name in extras and extras[name] not in neutral:
                raise InvalidRequestError(
                    f"{name} is not supported; leave it out.", param=name, code="unsupported"
                )
        if self.best_of not in (None, self.n):
            raise InvalidRequestError(
                f"best_of is {self.best_of}; only {self.n}, the value of n, is supported.",
                param="best_of",
            )
        if "" in self.stops:
            raise InvalidRequestError(
                "a stop string is empty; leave it out or give a text.", param="stop"
            )
        top = self.num_top_logprobs
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            name = "logprobs" if isinstance(self, CompletionBody) else "top_logprobs"
            raise InvalidRequestError(f"{name} is {top}; expected 0 to {MAX_LOGPROBS}.", param=name)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def text_options(self, score_only: bool = False) -> TextOptions:
        return TextOptions(
            stops=self.stops,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            score_only=score_only,
        )

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """One for each of the n choices; only their seeds differ."""
        seed = uuid.uuid4().int & 0x7FFFFFFF if self.seed is None else self.seed
        prompt_logprobs = self.num_top_logprobs if self.echo_prompt else None
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(self.top_k, 0),
                seed=choice_seed(seed, choice),
                ignore_eos=self.ignore_eos,
                stop_token_ids=tuple(self.stop_token_ids),
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logprobs=self.num_top_logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for choice in range(self.n)
        ]


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echo_prompt(self) -> bool:
        return self.echo

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if one else list(prompt)


class TextPart(BaseModel):
    """A piece of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Further fields, such as `name`, go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates expect one string."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return (self.model_extra or {}) | {"role": self.role, "content": content or ""}


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs logprobs; set logprobs to true.", param="top_logprobs"
            )
        return super().check()

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def wanted_tokens(self, room: int) -> int:
        """`room` tokens are left in the context."""
        given = [m for m in (self.max_completion_tokens, self.max_tokens) if m is not None]
        return given[0] if given else max(room, 1)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of the choice-th answer, as a signed 64-bit integer; that of the first is `seed`."""
    if choice == 0:
        return seed
    derived = (seed + choice * _GOLDEN) % 2**64
    return derived - 2**64 if derived >= 2**63 else derived


def parse_body(kind: type[Body], data: bytes) -> Body:
    """A checked body. Raises InvalidRequestError that names the field at fault."""
    try:
        return kind.model_validate_json(data).check()
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> InvalidRequestError:
    """The first fault, in one sentence."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {first['ctx']['error']}.")
    where = ".".join(str(part) for part in first["loc"])
    name = str(first["loc"][0]) if first["loc"] else None
    if name in _EXPECTED and first["type"] != "missing":
        return InvalidRequestError(f"{name}: {_EXPECTED[name]}.", param=name)
    parts = [e for e in errors if e["loc"][-1:] == ("type",)]
    if name == "messages" and parts:
        return InvalidRequestError(
            f"a message has a part of type {parts[0]['input']!r}; only text is supported, images "
            "and sound are not.",
            param=name,
        )
    return InvalidRequestError(f"{where or 'the body'}: {first['msg']}.", param=name)
