"""`python -m engine` from outside: the real openai client, real gRPC, real signals, bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import APIStatusError, OpenAI

from controller.remote import RemoteCluster
from engine.cluster import KvCostParams, Routing, SwitchPhase, Transfer, parse_deployment_key
from engine.errors import InvalidRequestError, NotFoundError, StaleEpochError, UnavailableError
from engine.migration.plan import plan_switch
from engine.wire import error_of
from envs.processes import ServerProcess, start_server
from protos import engine_pb2, engine_pb2_grpc

READY = r"ready: (http://\S+) grpc (\S+)"


@dataclass(frozen=True)
class Served:
    process: ServerProcess
    url: str
    target: str


@pytest.fixture(scope="module")
def served(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    arguments = ["engine", "--model", str(tiny_model_dir), "--port", "0", "--grpc-port", "0"]
    arguments += ["--max-model-len", "256", "--served-model-name", "tiny", "--max-queue", "8"]
    process = start_server("engine", arguments, log)
    try:
        url, target = process.wait_ready(READY, 60).groups()
        yield Served(process, url, target)
    finally:
        process.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def remote(served: Served) -> Iterator[RemoteCluster]:
    with RemoteCluster(served.target) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def stub(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.target) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


# -------------------------------------------------------------------------------- HTTP


def test_models_and_health(served: Served, client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_completion_streams_the_text_of_the_whole_one(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"model": "tiny", "prompt": "To the lighthouse", "max_tokens": 20}
    whole = client.completions.create(**wanted, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.completions.create(
            **wanted, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    usage = chunks[-1].usage  # by then the prefix cache may know the prompt
    assert usage is not None
    assert usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_chat_applies_the_template_and_a_seed_repeats(client: OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=12, **options
        )

    first, second = ask(seed=7), ask(seed=7)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens > len("Hello")
    streamed = list(ask(seed=7, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == first.choices[0].message.content


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**wanted).choices[0].text
    stop = text[len(text) // 2 :][:2]
    cut = client.completions.create(**wanted, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_several_prompts_keep_their_order(client: OpenAI) -> None:
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    together = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    alone = [
        client.completions.create(
            model="tiny", prompt=p, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
        )
        for p in prompts
    ]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": list(range(300))}, 400, "outside the vocabulary|300 tokens"),
        ({"prompt": [9999]}, 400, "outside the vocabulary"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": "x", "n": 2, "best_of": 3}, 400, "best_of is 3; only 2"),
        ({"prompt": "x", "logprobs": 30}, 400, "logprobs is 30; expected 0 to 20"),
        ({"prompt": "x", "model": "gpt"}, 404, "serves 'tiny'"),
        ({}, 400, "prompt"),
        ({"prompt": "x", "seed": 2**70}, 400, "seed is .* signed 64-bit"),
        ({"prompt": "x", "stop_token_ids": [2**70]}, 400, "stop_token_ids"),
        ({"prompt": "x", "max_tokens": 2**70}, 400, "max_tokens"),
        ({"prompt": "x", "stop": ["a", ""]}, 400, "stop string is empty"),
        ({"prompt": "x", "presence_penalty": 2.5}, 400, "presence_penalty is 2.5; expected -2"),
        ({"prompt": "x", "logit_bias": {"5": 100}}, 400, "logit_bias is not supported"),
    ],
)
def test_bad_requests_get_openai_errors(
    served: Served, body: dict[str, Any], status: int, message: str
) -> None:
    response = httpx.post(f"{served.url}/v1/completions", json=body)
    assert response.status_code == status
    assert re.search(message, response.json()["error"]["message"])


def test_a_refused_request_takes_no_place(served: Served, remote: RemoteCluster) -> None:
    """max_queue is 8: ten refusals in a row would fill it, were they kept."""
    before = remote.snapshot()
    for _ in range(10):
        body = {"prompt": "x", "max_tokens": 2, "seed": 2**70}
        assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 400
    body = {"prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200
    after = remote.snapshot()
    assert after.num_arrived - before.num_arrived == 11
    assert after.num_rejected - before.num_rejected == 10
    assert after.num_finished - before.num_finished == 1


def test_null_and_neutral_values_ask_for_nothing(served: Served) -> None:
    names = ("temperature", "top_p", "n", "stream", "seed", "stop", "stop_token_ids", "logprobs")
    body = {"prompt": "x", "max_tokens": 2, "best_of": 1, "presence_penalty": 0.0}
    response = httpx.post(
        f"{served.url}/v1/completions", json=body | dict.fromkeys(names), timeout=20
    )
    assert response.status_code == 200, response.text


def test_chat_content_may_come_in_parts(client: OpenAI, served: Served) -> None:
    def answer(content: Any) -> str | None:
        message: Any = {"role": "user", "content": content}
        made = client.chat.completions.create(
            model="tiny", messages=[message], max_tokens=6, temperature=0
        )
        return made.choices[0].message.content

    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert answer(parts) == answer("hello")
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    response = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": [image]})
    assert response.status_code == 400
    assert "only text is supported" in response.json()["error"]["message"]


def test_overload_is_told_with_retry_after(served: Served, client: OpenAI) -> None:
    wanted = {"prompt": [[1, 2, 3]] * 9, "max_tokens": 4, "ignore_eos": True}
    response = httpx.post(f"{served.url}/v1/completions", json=wanted)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    with pytest.raises(APIStatusError) as error:
        client.completions.create(model="tiny", prompt=[[1, 2, 3]] * 9, max_tokens=4)
    assert error.value.status_code == 429


def test_a_client_that_leaves_frees_its_request(
    served: Served, client: OpenAI, remote: RemoteCluster
) -> None:
    stream = client.completions.create(
        model="tiny", prompt=[5] * 20, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = 200
    while deadline and any(r.num_running for r in remote.snapshot().replicas):
        deadline -= 1
        httpx.get(f"{served.url}/health")
    assert deadline, "the request still runs"
    last = [e.outcome for e in remote.events(0).events if e.outcome is not None][-1]
    assert last.output_tokens < 200


def test_metrics_use_vllm_names(served: Served) -> None:
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:generation_tokens_total",
    ):
        assert name in text


# -------------------------------------------------------------------------------- gRPC


def test_generate_streams_tokens_and_text(stub: Any, client: OpenAI) -> None:
    sampling = engine_pb2.SamplingParams(max_tokens=8, temperature=0.0)
    request = engine_pb2.GenerateRequest(text="abc", sampling=sampling)
    parts = list(stub.Generate(request, timeout=30))
    http = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0)
    assert "".join(p.text for p in parts) == http.choices[0].text
    assert sum(len(p.token_ids) for p in parts) == 8  # waiting tokens come together
    assert parts[-1].finish_reason == "length"


def test_generate_without_prompt_is_refused_by_name(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(engine_pb2.GenerateRequest(), timeout=10))
    assert isinstance(error_of(error.value), InvalidRequestError)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 5.0},
        {"top_k": -3},
        {"stop_token_ids": [-1]},
    ],
)
def test_generate_refuses_what_http_refuses(stub: Any, sampling: dict[str, Any]) -> None:
    params = engine_pb2.SamplingParams(max_tokens=2, **sampling)
    request = engine_pb2.GenerateRequest(text="x", sampling=params)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(request, timeout=10))
    error = error_of(raised.value)
    assert isinstance(error, InvalidRequestError)
    assert next(iter(sampling)) in str(error)


def test_a_bad_routing_or_plan_changes_nothing(client: OpenAI, remote: RemoteCluster) -> None:
    before = remote.snapshot()
    ids = tuple(r.replica_id for r in before.deployment.replicas)
    share = (1 / len(ids),) * len(ids)
    with pytest.raises(InvalidRequestError, match="posterior row needs 1 entries"):
        remote.set_routing(Routing(ids, (share,), (), ((),)))
    target = parse_deployment_key("2xtp2pp1")
    plan = plan_switch(
        remote.spec, before.deployment, before.epoch, target, KvCostParams(1e9, 1e4, 0.01)
    )
    lost = Transfer("no such tensor", None, 0, 1, 0, 1, 4)
    with pytest.raises(InvalidRequestError, match="does not need it"):
        remote.apply(replace(plan, transfers=(*plan.transfers, lost)))
    assert remote.snapshot().routing == before.routing
    assert not remote.snapshot().switch_in_flight
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).usage is not None


def test_a_closed_client_says_so(served: Served) -> None:
    cluster = RemoteCluster(served.target)
    cluster.close()
    with pytest.raises(UnavailableError, match="closed"):
        cluster.snapshot()


def test_health_and_reflection(served: Served) -> None:
    with grpc.insecure_channel(served.target) as channel:
        request = health_pb2.HealthCheckRequest(service="tidewright.engine.v1.EngineService")
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed = next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=10)))
        names = {s.name for s in listed.list_services_response.service}
        assert "tidewright.engine.v1.EngineService" in names


def test_a_switch_over_grpc_streams_its_phases(stub: Any, remote: RemoteCluster) -> None:
    snapshot = remote.snapshot()
    kv = KvCostParams(1e9, 1000.0, 0.01)
    target = parse_deployment_key("2xtp2pp1")
    plan = plan_switch(remote.spec, snapshot.deployment, snapshot.epoch, target, kv)
    ticket = remote.apply(plan)
    assert ticket.to_key == "2xtp2pp1"
    seen = set()
    for response in stub.WatchEvents(engine_pb2.WatchEventsRequest(cursor=0), timeout=60):
        phases = {e.ticket.phase for e in response.batch.events if e.HasField("ticket")}
        seen |= phases
        if remote.ticket(ticket.ticket_id).phase.is_terminal:
            break
    assert remote.ticket(ticket.ticket_id).phase is SwitchPhase.DONE
    assert len(seen) >= 5
    assert remote.snapshot().epoch == snapshot.epoch + 1
    with pytest.raises(StaleEpochError):
        remote.apply(plan)
    with pytest.raises(StaleEpochError):
        remote.set_routing(Routing((77,)))
    with pytest.raises(NotFoundError):
        remote.ticket("no-such")


def test_an_engine_that_is_gone_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        with RemoteCluster(target, timeout_s=1.0) as cluster, pytest.raises(UnavailableError):
            cluster.snapshot()


# -------------------------------------------------------------------------------- the process


def run_engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", "--port", "0", "--grpc-port", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_engine_process_never_imports_torch() -> None:
    code = (
        "import sys, engine.app, engine.build\n"
        "bad = [m for m in ('torch', 'transformers', 'numba') if m in sys.modules]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sigterm_ends_it_in_order(tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ["engine", "--model", str(tiny_model_dir), "--port", "0", "--grpc-port", "0"]
    process = start_server("engine", [*arguments, "--num-workers", "1", "--deployment", "1xtp1pp1"],
                           tmp_path / "log")  # fmt: skip
    try:
        process.wait_ready(READY, 60)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(20) == 0
        assert process._wait_empty(10), "a worker was left behind"
    finally:
        process.stop()


@contextmanager
def small_engine(model_dir: Path, log: Path, *more: str) -> Iterator[Served]:
    arguments = ["engine", "--model", str(model_dir), "--port", "0", "--grpc-port", "0"]
    arguments += ["--num-workers", "1", "--deployment", "1xtp1pp1", "--log-format", "json"]
    process = start_server("engine", [*arguments, *more], log)
    try:
        url, target = process.wait_ready(READY, 60).groups()
        yield Served(process, url, target)
    finally:
        process.stop()


BODY = {"prompt": [5] * 9, "max_tokens": 490, "stream": True, "ignore_eos": True}


def test_ctrl_c_lets_a_stream_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        small_engine(tiny_model_dir, log, "--drain-timeout-s", "60") as served,
        httpx.stream("POST", f"{served.url}/v1/completions", json=BODY, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        served.process.process.send_signal(signal.SIGINT)
        events = [line for line in lines if line]
        assert served.process.process.wait(30) == 0
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    (request,) = [line for line in logged if line["logger"] == "engine.requests"]
    assert (request["finish_reason"], request["output_tokens"]) == ("length", 490)
    assert not any(key == "prompt" or key == "text" for line in logged for key in line)


def test_a_second_ctrl_c_cuts_streams_off_with_an_error(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with (
        small_engine(tiny_model_dir, tmp_path / "log", "--drain-timeout-s", "60") as served,
        httpx.stream("POST", f"{served.url}/v1/completions", json=BODY, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        served.process.process.send_signal(signal.SIGINT)
        while httpx.get(f"{served.url}/ready").status_code == 200:
            continue
        served.process.process.send_signal(signal.SIGINT)
        events = [line for line in lines if line]
        assert served.process.process.wait(30) == 0
    assert events[-1] == "data: [DONE]"
    assert "ended the request early" in json.loads(events[-2][6:])["error"]["message"]


def test_a_taken_port_is_one_sentence_and_exit_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_engine("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert re.search(r"HTTP port \d+ .* cannot be bound .*choose another", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deployment", "5xtp1pp1"], "needs 5 devices, the cluster has 4"),
        (["--deployment", "1xtp3pp1"], "heads, which tp=3 does not divide"),
        (["--device-memory-mb", "20"], "more memory"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--max-num-seqs", "none"], "max_num_seqs"),
    ],
)
def test_impossible_settings_are_one_sentence_and_exit_2(
    arguments: list[str], message: str
) -> None:
    done = run_engine(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_key_names_its_neighbour(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("deploymnt: 4xtp1pp1\n")
    done = run_engine("--config", str(config))
    assert done.returncode == 2
    assert "unknown key 'deploymnt'" in done.stderr
    assert "did you mean 'deployment'?" in done.stderr


def test_a_missing_shard_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    header = json.loads((broken / "model-00001-of-00002.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")  # fmt: skip # noqa: E501
    names = [name for name in header if name != "__metadata__"]
    shards = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    shards[names[-1]] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": shards}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run_engine("--model", str(broken))
    assert done.returncode == 2
    assert "model-00002-of-00002.safetensors" in done.stderr
