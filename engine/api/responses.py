"""Chunks of text -> the objects of OpenAI's API, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.api.errors import json_of
from engine.api.protocol import StreamOptions
from engine.errors import TidewrightError
from engine.request import TokenLogprobs
from engine.text_choice import TextChunk
from engine.tokenizer import IncrementalDecoder, Tokenizer

LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for what JSON cannot say
encode_json = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Usage:
    """Tokens of all choices together; a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class CompletionLogprobs:
    """OpenAI's legacy object for one choice, growing: tokens, token_logprobs, top_logprobs and
    text_offset (characters of the choice's text before each token)."""

    def __init__(self, tokenizer: Tokenizer, echoed: Sequence[int], skip_special: bool) -> None:
        self._tokenizer, self._echoed = tokenizer, list(echoed)
        self._decoder, self._offset = IncrementalDecoder(tokenizer, skip_special), 0

    def json(self, chunk: TextChunk) -> dict[str, Any]:
        rows: list[tuple[int, float | None, dict[str, float] | None]] = []
        if self._echoed:
            rows.append((self._echoed[0], None, None))
            rows += [self._row(given) for given in chunk.prompt_logprobs]
            self._echoed = []
        rows += [self._row(given) for given in chunk.logprobs]
        return {
            "tokens": [token_name(self._tokenizer, token_id) for token_id, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [top for _, _, top in rows],
            "text_offset": [self._advance(token_id) for token_id, _, _ in rows],
        }

    def _row(self, given: TokenLogprobs) -> tuple[int, float, dict[str, float]]:
        top = {token_name(self._tokenizer, i): _finite(p) for i, p in given.top}
        own = token_name(self._tokenizer, given.token_id)
        return given.token_id, _finite(given.logprob), top | {own: _finite(given.logprob)}

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.push([token_id]))
        return offset


class ChatLogprobs:
    """OpenAI's object of chat completions: a `content` list with one entry per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def json(self, chunk: TextChunk) -> dict[str, Any]:
        return {"content": [self._entry(given) for given in chunk.logprobs], "refusal": None}

    def _entry(self, given: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in given.top]
        return self._token(given.token_id, given.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": data.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; its bytes, written out as OpenAI does, where it is no whole text."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass(slots=True)
class Answer:
    """The answer to one HTTP request, as it grows. `logprobs` is empty unless asked for."""

    request_id: str
    model: str
    is_chat: bool
    usage: Usage
    num_choices: int
    choices_per_prompt: int
    logprobs: list[CompletionLogprobs] | list[ChatLogprobs]
    created_s: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    def _count(self, chunk: TextChunk) -> None:
        self.usage.completion_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None and chunk.index % self.choices_per_prompt == 0:
            self.usage.cached_tokens += chunk.num_cached_tokens

    def _choice(self, chunk: TextChunk) -> dict[str, Any]:
        logprobs = self.logprobs[chunk.index].json(chunk) if self.logprobs else None
        return {"index": chunk.index, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    # ---------------------------------------------------------------- streamed

    async def events(
        self, chunks: AsyncIterator[TextChunk], options: StreamOptions
    ) -> AsyncIterator[bytes]:
        """Server-sent events, ending in [DONE]. An error after the first byte is an event too."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        started: set[int] = set()
        try:
            async for chunk in chunks:
                self._count(chunk)
                choice = self._choice(chunk)
                if self.is_chat:
                    role = {} if chunk.index in started else {"role": "assistant"}
                    choice["delta"] = role | {"content": chunk.text}
                    started.add(chunk.index)
                else:
                    choice["text"] = chunk.text
                event = self._envelope(kind, [choice])
                if options.include_usage:
                    event["usage"] = self.usage.json() if options.continuous_usage_stats else None
                yield _event(event)
            if options.include_usage:
                yield _event(self._envelope(kind, []) | {"usage": self.usage.json()})
        except TidewrightError as error:  # the status line is gone; say it in the stream
            yield _event(json_of(error))
        yield b"data: [DONE]\n\n"

    # ---------------------------------------------------------------- whole

    async def whole(self, chunks: AsyncIterator[TextChunk]) -> dict[str, Any]:
        """One object, once every choice has ended."""
        pieces = [TextChunk(index) for index in range(self.num_choices)]
        texts: list[list[str]] = [[] for _ in pieces]
        async for chunk in chunks:
            self._count(chunk)
            whole = pieces[chunk.index]
            texts[chunk.index].append(chunk.text)
            whole.logprobs += chunk.logprobs
            whole.prompt_logprobs = whole.prompt_logprobs or chunk.prompt_logprobs
            whole.finish_reason = chunk.finish_reason
        for whole, parts in zip(pieces, texts, strict=True):
            whole.text = "".join(parts)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind, list(self._whole_choices(pieces))) | {
            "usage": self.usage.json()
        }

    def _whole_choices(self, pieces: list[TextChunk]) -> Iterable[dict[str, Any]]:
        for whole in pieces:
            choice = self._choice(whole)
            if self.is_chat:
                message = {"role": "assistant", "content": whole.text, "refusal": None}
                choice["message"] = message
            else:
                choice["text"] = whole.text
            yield choice


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(data) + b"\n\n"
