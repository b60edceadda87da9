"""One request's tokens as text: whole characters, stop strings, what the text is preceded by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from engine.errors import UnavailableError
from engine.live_request import RequestStream, TokenChunk
from engine.request import TokenLogprobs
from engine.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. `score_only`: the token that the engine makes at least is dropped."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    score_only: bool = False


@dataclass(slots=True)
class TextChunk:
    """A piece of one choice's text; `finish_reason` is set on its last piece. Text may lag behind
    the tokens: an unfinished character or what may begin a stop string is held back."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `token_ids`, where asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    num_cached_tokens: int = 0  # as far as known; with the last piece for good


class TextChoice:
    """Reads one stream. `prefix` goes in front of the text, untouched."""

    def __init__(
        self,
        stream: RequestStream,
        tokenizer: Tokenizer,
        options: TextOptions,
        index: int = 0,
        prefix: str = "",
    ) -> None:
        self.stream, self.index = stream, index
        self._options, self._prefix, self._held = options, prefix, ""
        self._decoder = IncrementalDecoder(tokenizer, options.skip_special_tokens)
        self._is_first, self._is_over, self._num_cached_tokens = True, False, 0

    def take(self) -> TextChunk | None:
        """All that has come since, or None. Raises UnavailableError when it was cut off."""
        if self._is_over or (tokens := self.stream.take()) is None:
            return None
        chunk = TextChunk(self.index, self._prefix)
        self._prefix = ""
        while tokens is not None:
            self._add(tokens, chunk)
            if chunk.finish_reason is not None:
                self._is_over = True
                break
            tokens = self.stream.take()
        return chunk

    def _add(self, tokens: TokenChunk, chunk: TextChunk) -> None:
        reason = tokens.finish_reason
        if reason in ("abort", "error"):
            raise UnavailableError("the engine ended the request early; try again.")
        self._add_logprobs(tokens, chunk)
        self._num_cached_tokens = tokens.num_cached_tokens or self._num_cached_tokens
        chunk.num_cached_tokens = self._num_cached_tokens
        if self._options.score_only:
            chunk.logprobs, chunk.finish_reason = [], "length"
            return
        chunk.token_ids += tokens.token_ids
        text = self._decoder.push(tokens.token_ids, last=reason is not None)
        if not self._options.stops:
            chunk.text, chunk.finish_reason = chunk.text + text, reason
            return
        self._held += text
        if (cut := self._find_stop()) is not None:
            chunk.text += self._held[:cut]
            chunk.finish_reason = "stop"
            self.stream.finish("stop")
            return
        keep = 0 if reason is not None else self._num_held_back()
        split = len(self._held) - keep
        chunk.text += self._held[:split]
        chunk.finish_reason, self._held = reason, self._held[split:]

    def _add_logprobs(self, tokens: TokenChunk, chunk: TextChunk) -> None:
        if not tokens.logprobs:
            return
        if self._is_first:
            chunk.prompt_logprobs = tokens.logprobs[:-1]
            self._is_first = False
        chunk.logprobs.append(tokens.logprobs[-1])

    def _find_stop(self) -> int | None:
        """Where the text ends: at the stop string that is first in it, or behind that one."""
        found = [(at, stop) for stop in self._options.stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        return at + len(stop) if self._options.include_stop else at

    def _num_held_back(self) -> int:
        """Characters at the end that may begin a stop string."""
        return max(_overlap(self._held, stop) for stop in self._options.stops)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


async def text_chunks(
    choices: Sequence[TextChoice], wake: asyncio.Event
) -> AsyncIterator[TextChunk]:
    """Pieces of several choices as they come, until all have ended. Their streams share `wake`.

    Whoever started the streams ends them: this may never be run.
    """
    running = list(choices)
    while running:
        wake.clear()
        for choice in list(running):
            if (chunk := choice.take()) is not None:
                if chunk.finish_reason is not None:
                    running.remove(choice)
                yield chunk
        if running:
            await wake.wait()
