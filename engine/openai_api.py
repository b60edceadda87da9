"""The OpenAI-compatible HTTP API: completions, chat completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.errors import InvalidRequestError, OverloadedError, TidewrightError, UnavailableError
from engine.metrics import EngineMetrics
from engine.request import SamplingParams
from engine.runtime import EngineRuntime, RequestStream
from engine.tokenizer import IncrementalDecoder, Tokenizer

# Fields that would change the answer, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (),
    "top_logprobs": (),
    "best_of": (1,),
    "suffix": (),
    "tools": (),
    "response_format": ({"type": "text"},),
    "echo": (),
    "logit_bias": (),
    "presence_penalty": (),
    "frequency_penalty": (),
    "repetition_penalty": (1,),
}
RETRY_AFTER_S = 1


Body = TypeVar("Body", bound="GenerationBody")


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationBody(BaseModel):
    """Fields that both endpoints share; OpenAI fields unknown here are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, given: Any) -> Any:
        """OpenAI's clients may send null for whatever they leave out."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]


class TextPart(BaseModel):
    """A piece of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Further fields, such as `name`, go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] = ""

    def for_template(self) -> dict[str, Any]:
        """Templates expect one string."""
        parts = (
            self.content
            if isinstance(self.content, list)
            else [TextPart(type="text", text=self.content)]
        )
        return (self.model_extra or {}) | {
            "role": self.role,
            "content": "".join(part.text for part in parts),
        }


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def json(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of one choice's text; `finish_reason` is set on its last piece."""

    index: int
    text: str
    num_tokens: int
    finish_reason: str | None


async def text_chunks(
    stream: RequestStream, index: int, tokenizer: Tokenizer, stops: list[str]
) -> AsyncIterator[TextChunk]:
    """Decode a request's tokens; cut at the first stop string, holding back what may begin one."""
    decoder, held = IncrementalDecoder(tokenizer), ""
    try:
        async for chunk in stream:
            if chunk.finish_reason in ("abort", "error"):
                raise UnavailableError("the engine ended the request early; try again.")
            last = chunk.finish_reason is not None
            held += decoder.push(chunk.token_ids, last=last)
            cut = min((at for s in stops if (at := held.find(s)) >= 0), default=-1)
            if cut >= 0:
                yield TextChunk(index, held[:cut], len(chunk.token_ids), "stop")
                return
            keep = 0 if last else max((_overlap(held, s) for s in stops), default=0)
            out, held = held[: len(held) - keep], held[len(held) - keep :]
            yield TextChunk(index, out, len(chunk.token_ids), chunk.finish_reason)
    finally:
        stream.cancel()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


async def _merge(sources: list[AsyncIterator[TextChunk]]) -> AsyncIterator[TextChunk]:
    """Chunks of several choices as they come; ends all of them when one fails."""
    queue: asyncio.Queue[TextChunk | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncIterator[TextChunk]) -> None:
        try:
            async for chunk in source:
                queue.put_nowait(chunk)
        except TidewrightError as error:
            queue.put_nowait(error)
        queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(s)) for s in sources]
    try:
        open_sources = len(tasks)
        while open_sources:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_sources -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class OpenAIServer:
    """Handlers over one runtime. `app` is the ASGI application."""

    def __init__(
        self, runtime: EngineRuntime, tokenizer: Tokenizer, metrics: EngineMetrics, model_name: str
    ) -> None:
        self._runtime, self._tokenizer, self._metrics = runtime, tokenizer, metrics
        self._model_name, self._created_s = model_name, int(time.time())
        self.draining = False
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={
                TidewrightError: _tidewright_error,
                HTTPException: _http_error,
                Exception: _internal_error,
            },
        )

    # ---------------------------------------------------------------- small endpoints

    async def models(self, request: Request) -> Response:
        card = {
            "id": self._model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "tidewright",
            "max_model_len": self._runtime.spec.model.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:
        """200 while the process lives; whether it takes traffic is told by 503 at admission."""
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    # ---------------------------------------------------------------- generation

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        prompts = self._prompts(body.prompt)
        return await self._generate(request, body, prompts, body.max_tokens or 16, chat=False)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        prompt = self._tokenizer.apply_chat_template([m.for_template() for m in body.messages])
        room = self._runtime.spec.model.max_model_len - len(prompt)
        wanted = body.max_completion_tokens or body.max_tokens or max(room, 1)
        return await self._generate(request, body, [prompt], wanted, chat=True)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        if self.draining:
            raise UnavailableError("the engine is shutting down; send this to another one.")
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            raise InvalidRequestError(f"{where}: {first['msg']}.") from None
        if body.model not in ("", self._model_name):
            raise HTTPException(404, f"this engine serves {self._model_name!r}, not {body.model!r}")
        extras = body.model_extra or {}
        given = [n for n, no in UNSUPPORTED.items() if extras.get(n) and extras[n] not in no]
        if given or body.n != 1:
            raise InvalidRequestError(f"{(given or ['n > 1'])[0]} is not supported; leave it out.")
        if "" in body.stops:
            raise InvalidRequestError("a stop string is empty; leave it out or give a text.")
        return body

    def _prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._tokenizer.encode(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [[int(t) for t in prompt if isinstance(t, int)]]
        return [
            self._tokenizer.encode(p) if isinstance(p, str) else [int(t) for t in p]
            for p in prompt
            if not isinstance(p, int)
        ]

    async def _generate(
        self,
        request: Request,
        body: GenerationBody,
        prompts: list[list[int]],
        max_tokens: int,
        chat: bool,
    ) -> Response:
        if not prompts:
            raise InvalidRequestError("prompt is empty; give at least one.")
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            seed=uuid.uuid4().int & 0x7FFFFFFF if body.seed is None else body.seed,
            ignore_eos=body.ignore_eos,
            stop_token_ids=tuple(body.stop_token_ids),
        )
        streams: list[RequestStream] = []
        try:
            for i, prompt in enumerate(prompts):
                name = request_id if len(prompts) == 1 else f"{request_id}-{i}"
                headers = request.headers
                streams.append(
                    self._runtime.generate(
                        name,
                        prompt,
                        params,
                        headers.get("x-request-class", ""),
                        headers.get("x-client-id", ""),
                    )
                )
        except TidewrightError:
            for stream in streams:
                stream.cancel()
            raise
        chunks = _merge(
            [text_chunks(s, i, self._tokenizer, body.stops) for i, s in enumerate(streams)]
        )
        usage = Usage(prompt_tokens=sum(len(p) for p in prompts))
        form = _ResponseForm(request_id, self._model_name, chat, len(prompts))
        if body.stream:
            include = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(
                _server_sent_events(chunks, form, usage, include), media_type="text/event-stream"
            )
        return await _whole_response(request, chunks, form, usage)


@dataclass(frozen=True, slots=True)
class _ResponseForm:
    """How chunks become OpenAI's JSON."""

    request_id: str
    model: str
    chat: bool
    num_choices: int

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.request_id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, chunk: TextChunk | None, first: bool = False) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        if chunk is None:
            return self._envelope(kind, [])
        choice: dict[str, Any] = {
            "index": chunk.index,
            "logprobs": None,
            "finish_reason": chunk.finish_reason,
        }
        if self.chat:
            choice["delta"] = {"content": chunk.text} | ({"role": "assistant"} if first else {})
        else:
            choice["text"] = chunk.text
        return self._envelope(kind, [choice])

    def whole(self, texts: list[str], reasons: list[str | None]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choices.append(choice)
        return self._envelope("chat.completion" if self.chat else "text_completion", choices)


async def _server_sent_events(
    chunks: AsyncIterator[TextChunk], form: _ResponseForm, usage: Usage, include_usage: bool
) -> AsyncIterator[str]:
    started: set[int] = set()
    try:
        async for chunk in chunks:
            usage.completion_tokens += chunk.num_tokens
            data = form.chunk(chunk, first=chunk.index not in started)
            started.add(chunk.index)
            if include_usage:
                data["usage"] = None
            yield f"data: {json.dumps(data)}\n\n"
        if include_usage:
            yield f"data: {json.dumps(form.chunk(None) | {'usage': usage.json()})}\n\n"
    except TidewrightError as error:  # the status line is gone; say it in the stream
        yield f"data: {json.dumps(_error_json(error))}\n\n"
    yield "data: [DONE]\n\n"


async def _whole_response(
    request: Request, chunks: AsyncIterator[TextChunk], form: _ResponseForm, usage: Usage
) -> Response:
    texts = [""] * form.num_choices
    reasons: list[str | None] = [None] * form.num_choices

    async def collect() -> None:
        async for chunk in chunks:
            texts[chunk.index] += chunk.text
            reasons[chunk.index] = chunk.finish_reason or reasons[chunk.index]
            usage.completion_tokens += chunk.num_tokens

    await _unless_disconnected(request, collect())
    return JSONResponse(form.whole(texts, reasons) | {"usage": usage.json()})


async def _unless_disconnected(request: Request, work: Awaitable[None]) -> None:
    """Await `work`, but cancel it (and so the request) when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "the client went away")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -------------------------------------------------------------------------------- errors


def _error_json(error: Exception) -> dict[str, Any]:
    kind = "invalid_request_error" if isinstance(error, InvalidRequestError) else "api_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


_STATUS: tuple[tuple[type[TidewrightError], int], ...] = (
    (InvalidRequestError, 400),
    (OverloadedError, 429),
    (UnavailableError, 503),
)


async def _tidewright_error(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(_error_json(error), status, headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """A bug of ours: Starlette logs it; the client gets the shape that it can read."""
    return JSONResponse(_error_json(RuntimeError("internal error; see the engine's log")), 500)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code)
