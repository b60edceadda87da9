"""The HTTP and gRPC doors over a live runtime, seen by real clients and from within at once."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from engine.app import http_server
from engine.build import build_runtime
from engine.cluster import RequestOutcome, RequestStatus, SwitchPhase, SwitchPlan, SwitchTicket
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.http_server import bind_http
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.server import start_grpc
from engine.tokenizer import Tokenizer
from engine.wire import from_proto
from protos import engine_pb2, engine_pb2_grpc

WAIT_S = 30.0
LONG: dict[str, Any] = {"prompt": [5] * 20, "max_tokens": 230, "extra_body": {"ignore_eos": True}}


@dataclass(frozen=True)
class Doors:
    """A running engine, its addresses and its inside."""

    engine: EngineCluster
    url: str
    target: str
    tokenizer: Tokenizer

    @property
    def runtime(self) -> EngineRuntime:
        return self.engine.runtime

    def wait_for(self, holds: Callable[[EngineRuntime], bool]) -> int:
        """Wait on the leaders' reports until something holds; how many reports that took."""

        async def wait() -> int:
            count = 0
            while not holds(self.runtime):
                await self.runtime.wait_for_stats()
                count += 1
            return count

        return self.engine.run(wait(), WAIT_S)

    def last_outcome(self) -> RequestOutcome:
        events = self.engine.events(0).events
        return [e.outcome for e in events if e.outcome is not None][-1]


def is_idle(runtime: EngineRuntime) -> bool:
    replicas = runtime.snapshot().replicas
    return not any(r.num_running or r.num_waiting or r.kv_blocks_used for r in replicas)


def is_running(runtime: EngineRuntime) -> bool:
    return any(r.num_running and r.kv_blocks_used for r in runtime.snapshot().replicas)


@contextmanager
def opened(engine: EngineCluster, model_dir: Path) -> Iterator[Doors]:
    tokenizer, sock = Tokenizer(model_dir), bind_http("127.0.0.1", 0)
    http = http_server(engine.runtime, tokenizer, "tiny", sock)
    engine.run(http.__aenter__())
    server, port = engine.run(start_grpc(engine.runtime, tokenizer, "tiny", "127.0.0.1", 0))
    try:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        yield Doors(engine, url, f"127.0.0.1:{port}", tokenizer)
    finally:
        engine.run(server.stop(0))
        engine.run(http.__aexit__(None, None, None))
        sock.close()


@pytest.fixture(scope="module")
def doors(open_engine: Any, tiny_model_dir: Path) -> Iterator[Doors]:
    with open_engine("2xtp1pp1") as engine, opened(engine, tiny_model_dir) as found:
        yield found


@pytest.fixture(scope="module")
def client(doors: Doors) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{doors.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def stub(doors: Doors) -> Iterator[Any]:
    with grpc.insecure_channel(doors.target) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


def complete(client: OpenAI, **options: Any) -> Any:
    wanted = {"model": "tiny", "prompt": "To the lighthouse", "max_tokens": 12} | options
    return client.completions.create(**wanted)


# -------------------------------------------------------------------------------- leaving early


def test_a_client_that_stops_reading_frees_its_blocks(doors: Doors, client: OpenAI) -> None:
    stream = complete(client, **LONG, stream=True)
    next(iter(stream))
    doors.wait_for(is_running)
    stream.close()
    doors.wait_for(is_idle)
    outcome = doors.last_outcome()
    assert outcome.status is RequestStatus.CANCELLED
    assert outcome.output_tokens < 230


def test_a_client_that_goes_while_waiting_frees_its_blocks(doors: Doors) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{doors.url}/v1", api_key="none") as client:
            call = asyncio.create_task(client.completions.create(model="tiny", **LONG))
            await asyncio.to_thread(doors.wait_for, is_running)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(leave())
    doors.wait_for(is_idle)
    assert doors.last_outcome().status is RequestStatus.CANCELLED


def long_call(stub: Any, timeout_s: float) -> Any:
    sampling = engine_pb2.SamplingParams(max_tokens=230, ignore_eos=True)
    ids = engine_pb2.TokenIds(ids=[5] * 20)
    return stub.Generate(
        engine_pb2.GenerateRequest(token_ids=ids, sampling=sampling), timeout=timeout_s
    )


def test_a_cancelled_grpc_call_frees_its_blocks(doors: Doors, stub: Any) -> None:
    call = long_call(stub, WAIT_S)
    next(call)
    doors.wait_for(is_running)
    call.cancel()
    doors.wait_for(is_idle)
    assert doors.last_outcome().status is RequestStatus.CANCELLED


def test_a_grpc_deadline_ends_the_request(doors: Doors, stub: Any) -> None:
    """The replicas take nothing meanwhile, so nothing but the deadline can end it."""
    ids = [r.replica_id for r in doors.runtime.deployment.replicas]
    doors.engine.on_loop(lambda: doors.runtime.hold(ids))
    try:
        with pytest.raises(grpc.RpcError) as error:
            list(long_call(stub, 0.2))
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        async def ended() -> None:
            while len(doors.runtime.requests):
                await doors.runtime.wait_for_change(1.0)

        doors.engine.run(ended(), WAIT_S)
    finally:
        doors.engine.on_loop(doors.runtime.unhold)
    assert doors.last_outcome().status is RequestStatus.CANCELLED
    assert doors.runtime.snapshot().num_queued_unrouted == 0


def test_a_grpc_deadline_in_mid_stream_frees_its_blocks(doors: Doors, stub: Any) -> None:
    calls = [long_call(stub, 0.3) for _ in range(24)]  # together they take longer than that
    codes = []
    for call in calls:
        try:
            for _ in call:
                continue
            codes.append(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            codes.append(error.code())
    assert grpc.StatusCode.DEADLINE_EXCEEDED in codes
    doors.wait_for(is_idle)


def test_blocks_are_free_within_one_step_of_a_cancel(doors: Doors, client: OpenAI) -> None:
    """Another request keeps the replica stepping; every report after a cancel is one step."""
    runtime = doors.runtime
    first = runtime.deployment.replicas[0].replica_id
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)

    async def reports_until_free() -> int:
        others = [r.replica_id for r in runtime.deployment.replicas[1:]]
        runtime.hold(others)
        streams = [runtime.generate(f"step-{i}", [3 + i] * 40, params) for i in range(2)]

        def of_first() -> Any:
            return next(r for r in runtime.snapshot().replicas if r.replica_id == first)

        while of_first().num_running < 2:
            await runtime.wait_for_stats()
        streams[0].cancel()
        count = 0
        while of_first().num_running == 2:
            await runtime.wait_for_stats()
            count += 1
        streams[1].cancel()
        runtime.unhold()
        return count

    assert doors.engine.run(reports_until_free(), WAIT_S) <= 3  # running, on its way, and the next
    doors.wait_for(is_idle)


# -------------------------------------------------------------------------------- stop strings


def test_a_stop_string_finishes_the_request(doors: Doors, client: OpenAI) -> None:
    whole = complete(client, max_tokens=200, temperature=0, extra_body={"ignore_eos": True})
    text = whole.choices[0].text
    stop = text[10:13]
    before = doors.engine.snapshot().num_finished
    for extra in ({}, {"include_stop_str_in_output": True}):
        made = complete(client, max_tokens=200, temperature=0, stop=[stop],
                        extra_body={"ignore_eos": True} | extra)  # fmt: skip
        end = text.index(stop) + (len(stop) if extra else 0)
        assert (made.choices[0].text, made.choices[0].finish_reason) == (text[:end], "stop")
        assert doors.last_outcome().status is RequestStatus.FINISHED
        assert made.usage.completion_tokens < 200
    doors.wait_for(is_idle)
    assert doors.engine.snapshot().num_finished == before + 2


def test_stop_token_ids_end_with_stop(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "prompt": [65, 66, 67]}
    text = complete(client, **wanted, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    stream = complete(client, **wanted, stream=True, extra_body={"ignore_eos": True})
    assert len(list(stream)) <= 20
    ids = list(range(256))
    made = complete(client, **wanted, extra_body={"stop_token_ids": ids}).choices[0]
    assert made.finish_reason == "stop"
    assert text.choices[0].finish_reason == "length"


# -------------------------------------------------------------------------------- n, echo, seed


def test_n_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    first, second = (complete(client, n=3, seed=11, best_of=3) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c.text for c in second.choices]
    assert texts[0] == complete(client, seed=11).choices[0].text
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens == complete(client).usage.prompt_tokens


def test_n_choices_stream_as_they_are_made_whole(client: OpenAI) -> None:
    def ask(**more: Any) -> Any:
        message: Any = {"role": "user", "content": "Hello"}
        return client.chat.completions.create(
            model="tiny", messages=[message], n=2, seed=5, max_completion_tokens=9, **more
        )

    whole = ask()
    texts, last = ["", ""], None
    for chunk in ask(stream=True, stream_options={"include_usage": True}):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in whole.choices]
    assert last is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 18
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0


def test_echo_puts_the_prompt_in_front(doors: Doors, client: OpenAI) -> None:
    plain = complete(client, temperature=0).choices[0].text
    echoed = complete(client, temperature=0, echo=True).choices[0].text
    assert echoed == "To the lighthouse" + plain
    ids = doors.tokenizer.encode("To the lighthouse")
    chunks = complete(client, prompt=[ids, ids], temperature=0, echo=True, stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [echoed, echoed]


def test_echo_without_tokens_scores_the_prompt(doors: Doors, client: OpenAI) -> None:
    made = complete(client, prompt="abc", max_tokens=0, echo=True)
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("abc", "length")
    assert made.usage.completion_tokens == 0
    with pytest.raises(APIStatusError) as error:
        complete(client, max_tokens=0)
    assert error.value.status_code == 400


# -------------------------------------------------------------------------------- log probabilities


def test_completion_logprobs_are_the_legacy_object(client: OpenAI) -> None:
    made = complete(client, temperature=0, logprobs=3, extra_body={"ignore_eos": True}).choices[0]
    logprobs = made.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    for name, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert 3 <= len(top) <= 4
        assert top[name] == logprob == max(top.values())  # greedy
        assert logprob <= 0
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_streamed_logprobs_are_those_of_the_whole(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"temperature": 0, "logprobs": 1, "echo": True}
    whole = complete(client, **wanted).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in complete(client, **wanted, stream=True)]
    assert [t for p in parts for t in p.tokens] == whole.tokens
    assert len(whole.tokens) > 12
    assert [o for p in parts for o in p.text_offset] == whole.text_offset
    assert [x for p in parts for x in p.token_logprobs] == pytest.approx(
        whole.token_logprobs, abs=1e-4
    )


def test_echoed_logprobs_begin_with_null_and_score_what_was_made(client: OpenAI, stub: Any) -> None:
    """Scoring prompt and answer as a prompt gives the answer's own log probabilities, also when
    the prefix cache knows that prompt."""
    wanted: dict[str, Any] = {"temperature": 0, "echo": True, "logprobs": 1}
    made = complete(client, prompt=[1, 2, 3], max_tokens=40, extra_body={"ignore_eos": True},
                    **wanted).choices[0].logprobs  # fmt: skip
    sampling = engine_pb2.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    request = engine_pb2.GenerateRequest(
        token_ids=engine_pb2.TokenIds(ids=[1, 2, 3]), sampling=sampling
    )
    ids = [t for part in stub.Generate(request, timeout=WAIT_S) for t in part.token_ids]
    assert made.token_logprobs[0] is None
    assert made.top_logprobs[0] is None
    for _ in range(2):
        scored = complete(client, prompt=[1, 2, 3, *ids], max_tokens=0, **wanted).choices[0]
        assert scored.logprobs.tokens == made.tokens
        assert scored.logprobs.token_logprobs[0] is None
        assert scored.logprobs.token_logprobs[1:] == pytest.approx(
            made.token_logprobs[1:], abs=1e-3
        )


def test_a_prompt_seen_before_counts_as_cached(client: OpenAI) -> None:
    prompt = [(7 * i) % 250 for i in range(70)]
    first, again = (complete(client, prompt=prompt, max_tokens=2).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 64  # whole blocks of 16


def test_chat_logprobs_name_bytes(client: OpenAI) -> None:
    message: Any = {"role": "user", "content": "Hello"}
    made = client.chat.completions.create(
        model="tiny", messages=[message], max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert made.logprobs is not None
    assert made.logprobs.content is not None
    assert len(made.logprobs.content) == 5
    for entry in made.logprobs.content:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert math.exp(entry.logprob) <= 1


def test_grpc_gives_logprobs_and_stops(stub: Any, client: OpenAI) -> None:
    sampling = engine_pb2.SamplingParams(
        max_tokens=8, temperature=0.0, logprobs=2, prompt_logprobs=0, ignore_eos=True
    )
    ids = engine_pb2.TokenIds(ids=[1, 2, 3])
    request = engine_pb2.GenerateRequest(token_ids=ids, sampling=sampling)
    parts = list(stub.Generate(request, timeout=WAIT_S))
    given = [entry for part in parts for entry in part.logprobs]
    assert [entry.token.token_id for entry in given] == [t for p in parts for t in p.token_ids]
    assert all(len(entry.top) == 2 and entry.token.logprob <= 0 for entry in given)
    assert [e.token.token_id for e in parts[0].prompt_logprobs] == [2, 3]
    assert parts[-1].HasField("cached_tokens")


def test_grpc_text_options(stub: Any) -> None:
    sampling = engine_pb2.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    plain = engine_pb2.GenerateRequest(text="abc", sampling=sampling)
    text = "".join(p.text for p in stub.Generate(plain, timeout=WAIT_S))
    stop = text[6:8]
    options = engine_pb2.TextOptions(stop=[stop], include_stop_str_in_output=True)
    request = engine_pb2.GenerateRequest(text="abc", sampling=sampling, text_options=options)
    parts = list(stub.Generate(request, timeout=WAIT_S))
    assert "".join(p.text for p in parts) == text[: text.index(stop) + len(stop)]
    assert parts[-1].finish_reason == "stop"


# -------------------------------------------------------------------------------- penalties


def test_penalties_change_what_is_said(client: OpenAI) -> None:
    """A repetition penalty this high leaves no token that has been said already."""
    made = complete(client, prompt=[1, 2, 3], max_tokens=40, temperature=0, logprobs=0,
                    extra_body={"ignore_eos": True, "repetition_penalty": 1e9})  # fmt: skip
    tokens = made.choices[0].logprobs.tokens
    assert len(set(tokens)) == len(tokens) == 40


def test_min_p_one_is_greedy(client: OpenAI) -> None:
    greedy = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=1.5, extra_body={"min_p": 1.0}).choices[0].text == greedy


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported"),
        ({"suffix": "x"}, "suffix", "unsupported"),
        ({"temperature": "warm"}, "temperature", None),
        ({"temperature": -1}, "temperature", None),
        ({"max_tokens": "5"}, "max_tokens", None),
        ({"n": 0}, "n", None),
        ({"n": 1000}, "n", None),
        ({"stop": 5}, "stop", None),
        ({"prompt": {"a": 1}}, "prompt", None),
        ({"prompt": list(range(256)) * 2}, "prompt", "context_length_exceeded"),
        ({"prompt": [[]]}, "prompt", None),
        ({"min_p": 2}, "min_p", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"stream": "yes"}, "stream", None),
    ],
)
def test_a_refusal_names_the_field(
    doors: Doors, body: dict[str, Any], param: str, code: str | None
) -> None:
    response = httpx.post(f"{doors.url}/v1/completions", json={"prompt": "x"} | body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"content": "hi"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "256"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "image",
        ),
    ],
)
def test_chat_refusals(doors: Doors, body: dict[str, Any], param: str, message: str) -> None:
    given = {"messages": [{"role": "user", "content": "hi"}]} | body
    response = httpx.post(f"{doors.url}/v1/chat/completions", json=given)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_what_is_not_there_says_so(doors: Doors) -> None:
    unknown = httpx.get(f"{doors.url}/v1/nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    wrong = httpx.get(f"{doors.url}/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "use POST" in wrong.json()["error"]["message"]
    model = httpx.post(f"{doors.url}/v1/completions", json={"model": "gpt", "prompt": "x"})
    error = model.json()["error"]
    assert (model.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    broken = httpx.post(f"{doors.url}/v1/completions", content=b'{"prompt": ')
    assert broken.status_code == 400
    assert "not JSON" in broken.json()["error"]["message"]
    assert httpx.post(f"{doors.url}/v1/completions", content=b"[1]").status_code == 400


# -------------------------------------------------------------------------------- request ids


def test_a_request_id_comes_back(doors: Doors) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    headers = {"x-request-id": "abc-1"}
    response = httpx.post(f"{doors.url}/v1/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"
    for wrong in ("", "x" * 129, "two words"):
        headers = {"x-request-id": wrong}
        refused = httpx.post(f"{doors.url}/v1/completions", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")


def test_one_id_used_by_many_at_once_breaks_nothing(doors: Doors) -> None:
    body = {"prompt": [7] * 9, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "n": 2}
    texts: list[list[str]] = []

    def ask() -> None:
        headers = {"x-request-id": "same"}
        made = httpx.post(
            f"{doors.url}/v1/completions", json=body, headers=headers, timeout=WAIT_S
        ).json()
        texts.append([c["text"] for c in made["choices"]])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(texts) == 6
    assert {text for pair in texts for text in pair} == {texts[0][0]}


# -------------------------------------------------------------------------------- readiness


def test_an_engine_that_starts_is_alive_and_not_ready(tiny_model_dir: Path) -> None:
    """Its workers have not been started at all."""
    runtime = build_runtime(EngineConfig(model=str(tiny_model_dir), max_model_len=256))

    async def ask() -> list[httpx.Response]:
        sock = bind_http("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with (
            http_server(runtime, Tokenizer(tiny_model_dir), "tiny", sock),
            httpx.AsyncClient(base_url=url) as client,
        ):
            found = [await client.get(path) for path in ("/health", "/ready", "/metrics")]
            body = {"prompt": "x"}
            return [*found, await client.post("/v1/completions", json=body)]

    try:
        health, ready, metrics, refused = asyncio.run(ask())
    finally:
        asyncio.run(runtime.close())
    assert (health.status_code, metrics.status_code) == (200, 200)
    assert (ready.status_code, ready.text) == (503, "the engine is starting\n")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_ready_and_draining(open_engine: Any, tiny_model_dir: Path) -> None:
    with open_engine("4xtp1pp1") as engine, opened(engine, tiny_model_dir) as doors:
        assert httpx.get(f"{doors.url}/ready").text == "ready\n"
        client = httpx.Client(base_url=doors.url, timeout=WAIT_S)
        body = {"prompt": [5] * 20, "max_tokens": 100, "stream": True, "ignore_eos": True}
        with client, client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            drained = asyncio.run_coroutine_threadsafe(doors.runtime.drain(WAIT_S), engine._loop)
            while not doors.runtime.not_ready:
                engine.on_loop(lambda: None)
            ready = httpx.get(f"{doors.url}/ready")
            assert (ready.status_code, ready.text) == (503, "the engine is draining\n")
            assert httpx.get(f"{doors.url}/health").status_code == 200
            refused = httpx.post(f"{doors.url}/v1/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            events = [line for line in lines if line.startswith("data: ")]
        assert drained.result(WAIT_S)
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_a_switch_by_target_key(doors: Doors, stub: Any) -> None:
    """A dry run tells what it would cost and changes nothing; then every state of the ticket."""
    runtime = doors.runtime
    before = doors.engine.snapshot()
    request = engine_pb2.ApplySwitchRequest(target_key="1xtp2pp1", dry_run=True)
    (answer,) = list(stub.ApplySwitch(request, timeout=WAIT_S))
    assert not answer.HasField("ticket")
    plan = from_proto(SwitchPlan, answer.plan)
    assert (plan.target.key, plan.expected_epoch) == ("1xtp2pp1", before.epoch)
    assert plan.weight_bytes == plan.lower_bound_bytes == 0  # each half is there
    assert doors.engine.snapshot().deployment == before.deployment

    back = before.deployment.key
    for key in ("1xtp2pp1", back):
        request = engine_pb2.ApplySwitchRequest(target_key=key)
        states = [
            from_proto(SwitchTicket, a.ticket) for a in stub.ApplySwitch(request, timeout=WAIT_S)
        ]
        assert states[0].phase is SwitchPhase.PREPARE
        assert states[-1].phase is SwitchPhase.DONE
        assert [s.moved_bytes for s in states] == sorted(s.moved_bytes for s in states)
    assert states[-1].planned_bytes == states[-1].weight_bytes > 0
    assert states[-1].moved_bytes >= states[-1].weight_bytes
    text = httpx.get(f"{doors.url}/metrics").text
    labels = 'mode="live",model_name="tiny",outcome="done"'
    assert f"tidewright:switches_total{{{labels}}} 2.0" in text
    assert "tidewright:switch_pause_seconds_count" in text

    for wrong, code in (
        (engine_pb2.ApplySwitchRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (engine_pb2.ApplySwitchRequest(target_key="9xtp1pp1", dry_run=True), None),
        (engine_pb2.ApplySwitchRequest(target_key="nonsense"), None),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.ApplySwitch(wrong, timeout=WAIT_S))
        assert refused.value.code() is (code or refused.value.code())
        assert refused.value.details()
    assert runtime.deployment.key == back
