"""The HTTP API over one runtime: completions, chat completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.api.errors import RETRY_AFTER_S, on_bug, on_http_error, on_tidewright_error
from engine.api.protocol import ChatBody, CompletionBody, GenerationBody, parse_body
from engine.api.responses import Answer, ChatLogprobs, CompletionLogprobs, Usage, encode_json
from engine.errors import InvalidRequestError, NotFoundError, TidewrightError
from engine.live_request import RequestStream
from engine.metrics import EngineMetrics
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.text_choice import TextChoice, text_chunks
from engine.tokenizer import Tokenizer
from engine.tokens import TokenFile

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
Body = TypeVar("Body", bound=GenerationBody)
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what echo puts in front; empty unless asked for."""

    token_ids: list[int]
    text: str = ""


class EventStream(StreamingResponse):
    """Server-sent events of some streams, which end with the response, however that ends."""

    def __init__(self, events: Any, streams: Sequence[RequestStream], request_id: str) -> None:
        headers = {"x-request-id": request_id, "cache-control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._streams)


class OpenAIServer:
    """Handlers over one runtime. `app` is the ASGI application. With `keys`, calls of /v1 need one
    of them; health and metrics do not."""

    def __init__(
        self,
        runtime: EngineRuntime,
        tokenizer: Tokenizer,
        metrics: EngineMetrics,
        model_name: str,
        keys: TokenFile | None = None,
    ) -> None:
        self._runtime, self._tokenizer, self._metrics = runtime, tokenizer, metrics
        self._model_name, self._created_s = model_name, int(time.time())
        self._keys = keys
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._keyed(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._keyed(self.chat), methods=["POST"]),
                Route("/v1/models", self._keyed(self.models)),
                Route("/v1/models/{name:path}", self._keyed(self.model)),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={
                TidewrightError: on_tidewright_error,
                HTTPException: on_http_error,
                Exception: on_bug,
            },
        )

    def _keyed(self, handler: Handler) -> Handler:
        """Before the body is read."""

        async def keyed(request: Request) -> Response:
            if self._keys is not None:
                self._keys.check(request.headers.get("authorization"))
            return await handler(request)

        return keyed

    # ---------------------------------------------------------------- small endpoints

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "tidewright",
            "max_model_len": self._runtime.spec.model.max_model_len,
        }

    def _check_model(self, name: str) -> None:
        if name not in ("", self._model_name):
            raise NotFoundError(f"this engine serves {self._model_name!r}, not {name!r}.")

    async def health(self, request: Request) -> Response:
        """200 while the process lives, also when it can serve nobody."""
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """200 when requests are taken, else 503 with the reason."""
        reason = self._runtime.not_ready
        if not reason:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{reason}\n", 503, {"Retry-After": str(RETRY_AFTER_S)})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    # ---------------------------------------------------------------- generation

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        prompts = [self._prompt(given, body) for given in body.prompts]
        if not prompts:
            raise InvalidRequestError("prompt is empty; give at least one.", param="prompt")
        wanted = body.wanted_tokens
        if wanted == 0 and not body.echo:
            raise InvalidRequestError(
                "max_tokens is 0; expected at least 1, or echo, to score the prompt.",
                param="max_tokens",
            )
        return await self._generate(request, body, prompts, wanted)

    def _prompt(self, given: str | list[int], body: CompletionBody) -> Prompt:
        token_ids = self._tokenizer.encode(given) if isinstance(given, str) else given
        if not body.echo:
            return Prompt(token_ids)
        if isinstance(given, str):
            return Prompt(token_ids, given)
        vocab = range(self._runtime.spec.model.vocab_size)
        known = [t for t in token_ids if t in vocab]  # the engine refuses the others by name
        return Prompt(token_ids, self._tokenizer.decode(known, body.skip_special_tokens))

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        messages = [m.for_template() for m in body.messages]
        prompt = self._tokenizer.apply_chat_template(messages, body.chat_template_kwargs)
        room = self._runtime.spec.model.max_model_len - len(prompt)
        return await self._generate(request, body, [Prompt(prompt)], body.wanted_tokens(room))

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        data = await request.body()
        self._runtime.requests.check_ready()
        body = parse_body(kind, data)
        self._check_model(body.model)
        return body

    async def _generate(
        self, request: Request, body: GenerationBody, prompts: list[Prompt], max_tokens: int
    ) -> Response:
        request_id = _request_id(request)
        wake = asyncio.Event()
        streams = self._start(request, request_id, body.sampling(max(max_tokens, 1)), prompts, wake)
        options = body.text_options(score_only=max_tokens == 0)
        choices = [
            TextChoice(stream, self._tokenizer, options, index, prompts[index // body.n].text)
            for index, stream in enumerate(streams)
        ]
        answer = self._answer(request_id, body, prompts)
        chunks = text_chunks(choices, wake)
        if body.stream:
            events = answer.events(chunks, body.stream_options)
            return EventStream(events, streams, request_id)
        try:
            whole = await _unless_disconnected(request, answer.whole(chunks))
        finally:
            _cancel(streams)
        headers = {"x-request-id": request_id}
        return Response(encode_json(whole), media_type="application/json", headers=headers)

    def _start(
        self,
        request: Request,
        request_id: str,
        params: list[SamplingParams],
        prompts: list[Prompt],
        wake: asyncio.Event,
    ) -> list[RequestStream]:
        """One request per prompt and choice; all of them or none."""
        streams: list[RequestStream] = []
        wanted = [(prompt, p) for prompt in prompts for p in params]
        names = self._names(request_id, len(wanted))
        try:
            for name, (prompt, p) in zip(names, wanted, strict=True):
                stream = self._runtime.generate(
                    name,
                    prompt.token_ids,
                    p,
                    request.headers.get("x-request-class", ""),
                    request.headers.get("x-client-id", ""),
                    trace_headers=_trace_headers(request),
                    wake=wake,
                )
                streams.append(stream)
        except TidewrightError as error:
            _cancel(streams)
            if isinstance(error, InvalidRequestError) and request.url.path.endswith(
                "chat/completions"
            ):
                error.param = "messages" if error.param == "prompt" else error.param
            raise
        return streams

    def _names(self, request_id: str, count: int) -> list[str]:
        """Ids for the engine; a client's id that is in use already (a retry) is made unlike it."""
        names = [request_id] if count == 1 else [f"{request_id}-{i}" for i in range(count)]
        if any(self._runtime.requests.is_in_use(name) for name in names):
            return self._names(f"{request_id}-{uuid.uuid4().hex[:8]}", count)
        return names

    def _answer(self, request_id: str, body: GenerationBody, prompts: list[Prompt]) -> Answer:
        num_choices = len(prompts) * body.n
        is_chat = isinstance(body, ChatBody)
        logprobs: list[Any] = []
        if body.num_top_logprobs is not None:
            for index in range(num_choices):
                echoed = prompts[index // body.n].token_ids if body.echo_prompt else []
                logprobs.append(
                    ChatLogprobs(self._tokenizer)
                    if is_chat
                    else CompletionLogprobs(self._tokenizer, echoed, body.skip_special_tokens)
                )
        usage = Usage(sum(len(p.token_ids) for p in prompts))
        return Answer(request_id, self._model_name, is_chat, usage, num_choices, body.n, logprobs)


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    if _REQUEST_ID.fullmatch(given) is None:
        raise InvalidRequestError(
            "x-request-id must be 1 to 128 visible ASCII characters; shorten it or leave it out.",
            param="x-request-id",
        )
    return given


def _trace_headers(request: Request) -> dict[str, str]:
    names = ("traceparent", "tracestate")
    return {name: request.headers[name] for name in names if name in request.headers}


def _cancel(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        stream.cancel()


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but give it up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)
