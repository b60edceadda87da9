"""Tokens to text: bytes against the tokenizer's own decoder, stop strings by hand, templates."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from engine.cluster import RequestStatus
from engine.errors import CheckpointError, InvalidRequestError, UnavailableError
from engine.live_request import RequestStream
from engine.messages import TokenUpdate
from engine.request import TokenLogprobs
from engine.text_choice import TextChoice, TextChunk, TextOptions, text_chunks
from engine.tokenizer import IncrementalDecoder, Tokenizer

EURO = list("€".encode())  # the tiny tokenizer's ids are bytes


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


class Sent:
    """A stream and what was asked of its request."""

    def __init__(self) -> None:
        self.ends: list[tuple[RequestStatus, str]] = []
        self.stream = RequestStream(
            "r", "r.0", lambda key, status, reason: self.ends.append((status, reason)),
            asyncio.Event(),
        )  # fmt: skip

    def put(self, text: str | list[int], reason: str = "", **more: Any) -> None:
        ids = list(text.encode()) if isinstance(text, str) else text
        for i, token_id in enumerate(ids):
            last = reason if i == len(ids) - 1 else ""
            self.stream.put(TokenUpdate("r.0", i, token_id, last, **more))


def take(choice: TextChoice) -> TextChunk:
    chunk = choice.take()
    assert chunk is not None
    return chunk


# -------------------------------------------------------------------------------- bytes


def spell(decoder: IncrementalDecoder, ids: list[int]) -> str:
    return "".join(decoder.push([i]) for i in ids) + decoder.push([], last=True)


def test_bytes_give_what_the_tokenizer_decodes(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [
            rng.choice([rng.randrange(320), rng.randrange(128, 256), *EURO])
            for _ in range(rng.randrange(1, 20))
        ]
        for skip in (True, False):
            expected = tokenizer.decode(ids, skip_special_tokens=skip)
            assert spell(IncrementalDecoder(tokenizer, skip), ids) == expected


def write_tokenizer(folder: Path, fast: Any, config: dict[str, Any] | None = None) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def test_sentencepiece_keeps_the_space_that_tells_words_apart(tmp_path: Path) -> None:
    """Llama 2's kind: a whole decode strips the first space, a continuation must not."""
    pieces = ["<unk>", "▁Hello", "▁world", "!", *(f"<0x{b:02X}>" for b in EURO)]
    fast = FastTokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = write_tokenizer(tmp_path, fast)
    ids = [1, 2, 4, 5, 6, 3]
    assert spell(IncrementalDecoder(tokenizer), ids) == " Hello world€!"
    assert tokenizer.decode(ids) == "Hello world€!"


def test_any_other_decoder_is_asked_behind_another_token(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "un": 1, "##like": 2, "me": 3}
    fast = FastTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    tokenizer = write_tokenizer(tmp_path, fast)
    assert spell(IncrementalDecoder(tokenizer), [1, 2, 3]).strip() == "unlike me"


# -------------------------------------------------------------------------------- stop strings


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    sent = Sent()
    choice = TextChoice(sent.stream, tokenizer, TextOptions(stops=("END", "no")))
    sent.put("an E")
    assert take(choice).text == "an "
    sent.put("Nothing n")
    assert take(choice).text == "ENothing "
    sent.put("ice", reason="length")
    assert take(choice) == TextChunk(0, "nice", list(b"ice"), "length")
    assert sent.ends == []
    assert choice.take() is None


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a, b")])
def test_the_first_stop_string_ends_text_and_request(
    tokenizer: Tokenizer, include: bool, text: str
) -> None:
    sent = Sent()
    options = TextOptions(stops=("b", ", b"), include_stop=include)
    choice = TextChoice(sent.stream, tokenizer, options)
    sent.put("a, bc, b")
    chunk = take(choice)
    assert (chunk.text, chunk.finish_reason) == (text, "stop")
    assert chunk.token_ids == list(b"a, b")  # what comes behind is not counted
    assert sent.ends == [(RequestStatus.FINISHED, "stop")]
    assert choice.take() is None


def test_tokens_that_waited_come_as_one_piece(tokenizer: Tokenizer) -> None:
    sent = Sent()
    choice = TextChoice(sent.stream, tokenizer, TextOptions(), prefix="> ")
    sent.put([*b"x", *EURO[:2]])
    assert take(choice).text == "> x"
    sent.put(EURO[2:])
    assert take(choice).text == "€"
    sent.put(EURO[:1], reason="length")
    assert take(choice).text == "\ufffd"


def test_logprobs_of_the_prompt_come_once(tokenizer: Tokenizer) -> None:
    sent = Sent()
    choice = TextChoice(sent.stream, tokenizer, TextOptions())
    given = [TokenLogprobs(i, -float(i), []) for i in range(4)]
    sent.put([65], logprobs=given[:3])
    sent.put([66], reason="stop", logprobs=given[3:])
    chunk = take(choice)
    assert chunk.prompt_logprobs == given[:2]
    assert chunk.logprobs == given[2:]


def test_scoring_drops_the_token_that_had_to_be_made(tokenizer: Tokenizer) -> None:
    sent = Sent()
    choice = TextChoice(sent.stream, tokenizer, TextOptions(score_only=True), prefix="abc")
    given = [TokenLogprobs(i, -1.0, []) for i in range(3)]
    sent.put([65], reason="length", logprobs=given)
    assert take(choice) == TextChunk(0, "abc", [], "length", [], given[:2])


def test_a_request_that_was_cut_off_is_an_error(tokenizer: Tokenizer) -> None:
    sent = Sent()
    choice = TextChoice(sent.stream, tokenizer, TextOptions())
    sent.stream.put(TokenUpdate("r.0", -1, 0, "error"))
    with pytest.raises(UnavailableError):
        choice.take()


def test_several_choices_are_read_by_one_reader(tokenizer: Tokenizer) -> None:
    async def read() -> list[tuple[int, str]]:
        wake = asyncio.Event()
        sents = [Sent(), Sent()]
        for sent in sents:
            sent.stream.wake = wake
        choices = [TextChoice(s.stream, tokenizer, TextOptions(), i) for i, s in enumerate(sents)]
        found = []
        sents[1].put("b")
        async for chunk in text_chunks(choices, wake):
            found.append((chunk.index, chunk.text))
            if len(found) == 1:
                sents[0].put("a", reason="stop")
                asyncio.get_running_loop().call_soon(sents[1].put, "c", "length")
        return found

    assert asyncio.run(asyncio.wait_for(read(), 10)) == [(1, "b"), (0, "a"), (1, "c")]


# -------------------------------------------------------------------------------- templates


def with_template(tmp_path: Path, model_dir: Path, template: Any, **config: Any) -> Tokenizer:
    fast = FastTokenizer.from_file(str(model_dir / "tokenizer.json"))
    return write_tokenizer(tmp_path / "t", fast, {"chat_template": template} | config)


MESSAGES = [{"role": "user", "content": "é"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}{{ eos_token }}", "é<|e|>"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ([{"name": "only", "template": "this"}], "this"),
        ("{% if tools is none %}none{% endif %}{{ mood }}", "nonegood"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é"}'),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for m in messages %}{% continue %}{% endfor %}end", "end"),
    ],
)
def test_templates(tmp_path: Path, tiny_model_dir: Path, template: Any, text: str) -> None:
    tokenizer = with_template(tmp_path, tiny_model_dir, template, eos_token={"content": "<|e|>"})
    ids = tokenizer.apply_chat_template(MESSAGES, {"mood": "good"})
    assert bytes(ids).decode() == text


def test_a_template_file_comes_first(tmp_path: Path, tiny_model_dir: Path) -> None:
    with_template(tmp_path, tiny_model_dir, "config")
    (tmp_path / "t" / "chat_template.jinja").write_text("file")
    assert bytes(Tokenizer(tmp_path / "t").apply_chat_template(MESSAGES)) == b"file"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[7].content.x }}", "{% broken"],
)
def test_a_template_that_fails_is_the_callers_error(
    tmp_path: Path, tiny_model_dir: Path, template: str
) -> None:
    tokenizer = with_template(tmp_path, tiny_model_dir, template)
    with pytest.raises(InvalidRequestError, match="template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_broken_configuration_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    with_template(tmp_path, tiny_model_dir, "x")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer(tmp_path / "t")
