"""The real small model that `make model` writes, through the real openai client: words, ends of
turns, and the very tokens that transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.build import DEFAULT_CACHE_DIR, DEMO_MODEL, build_cluster_spec, resolve_model
from engine.cluster import ParallelConfig
from engine.config import EngineConfig
from engine.errors import CheckpointError, InfeasibleError
from engine.tokenizer import Tokenizer
from envs.processes import start_server

FOLDER = DEFAULT_CACHE_DIR / DEMO_MODEL
needs_model = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is missing; 'make model' writes it"
)
QUESTIONS = ("What is the capital of France?", "List three fruits.", "What is 12 plus 30?")
READY = r"ready: (http://\S+) grpc"


def test_a_missing_demo_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="run 'make model' once"):
        resolve_model("smollm2")


@pytest.fixture(scope="module", params=["4xtp1pp1", "1xtp3pp1", "1xtp1pp3"])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    """In float32, so that tokens can be compared."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    arguments = ["engine", "--model", "smollm2", "--port", "0", "--grpc-port", "0"]
    arguments += ["--device-memory-mb", "800", "--deployment", request.param]
    process = start_server("engine", arguments, log)
    try:
        (url,) = process.wait_ready(READY, 60).groups()
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
            yield found
    finally:
        process.stop()


@pytest.mark.slow
@needs_model
def test_chat_answers_as_transformers_does(client: OpenAI) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=48, do_sample=False)
        tokens = out[0, ids["input_ids"].shape[1] :]
        answer = client.chat.completions.create(
            model=DEMO_MODEL, messages=messages, max_tokens=48, temperature=0
        )
        assert answer.choices[0].message.content == tokenizer.decode(
            tokens, skip_special_tokens=True
        )
        ended = tokens[-1] == tokenizer.eos_token_id
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == ids["input_ids"].shape[1]


@pytest.mark.slow
@needs_model
def test_chat_streams_words_and_stops_at_the_end_of_the_turn(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=DEMO_MODEL,
            messages=[{"role": "user", "content": QUESTIONS[0]}],
            max_tokens=48,
            temperature=0,
            stream=True,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert "<|im_end|>" not in text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


@pytest.mark.slow
@needs_model
def test_which_degrees_it_allows() -> None:
    config = EngineConfig(model="smollm2", dtype="bfloat16", device_memory_mb=420)
    spec = build_cluster_spec(config, FOLDER)
    for tp, pp in ((1, 1), (3, 1), (1, 2), (1, 3), (1, 5), (3, 2)):
        spec.model.check(ParallelConfig(tp, pp))
    with pytest.raises(InfeasibleError, match=r"9 attention heads, which tp=2 does not divide"):
        spec.model.check(ParallelConfig(2, 1))


@pytest.mark.slow
@needs_model
def test_the_chat_template_is_the_one_of_transformers() -> None:
    ours, theirs = Tokenizer(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tabs\tand  2024\n\n 漢字"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.apply_chat_template(messages) == expected
