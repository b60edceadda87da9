import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jinja2 import Template
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tiny_model import cached_tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_tiny_model(tmp_path_factory.getbasetemp())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again, other = write_tiny_model(tmp_path / "again"), write_tiny_model(tmp_path / "other", 1)
    assert contents(again) == contents(folder)
    assert contents(other)["model.safetensors"] != contents(folder)["model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]  # no rests


def test_it_replaces_what_is_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert write_tiny_model(tmp_path) == tmp_path
    assert contents(tmp_path) == contents(folder)


def test_many_may_ask_for_the_cached_model_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(cached_tiny_model, [tmp_path] * 3))
    assert len(paths) == 1
    assert list(tmp_path.iterdir()) == list(paths)


def test_importing_it_is_cheap_and_the_command_writes_it(folder: Path, tmp_path: Path) -> None:
    check = "import sys, engine.tiny_model; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
    command = [sys.executable, "-m", "engine.tiny_model", str(tmp_path / "m")]
    subprocess.run(command, check=True, timeout=60)
    assert contents(tmp_path / "m") == contents(folder)


def test_the_tokenizer_round_trips_any_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " Tabs\tand\nlines, ümlauts, 漢字, ☃ and \U0001f642 "
    ids = tokenizer.encode(text).ids
    assert ids == [256, *text.encode()]  # <|bos|>, then each byte is its own token
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 320
    assert tokenizer.token_to_id("<|eos|>") == 257


def test_the_chat_template_needs_only_jinja(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = Template(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True, bos_token=config["bos_token"]
    )
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False).ids == ids
    assert ids[0] == 256
    assert all(i >= 256 for i in (ids[1], ids[-1]))


def test_its_tokens_depend_on_the_whole_context(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 8e6
    prompt = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        tokens = model.generate(prompt, max_new_tokens=100, **options)
        logits = model(tokens).logits[0, 23:-1]
        changed = tokens.clone()
        changed[0, 0] = (changed[0, 0] + 1) % 256
        moved = model(changed).logits[0, 23:-1]
    assert len(set(tokens[0, 24:].tolist())) > 40  # it does not collapse
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1] > 1e-4).float().mean() > 0.98
    assert (moved - logits).abs().mean(-1).min() > 0.1  # the first token is never forgotten
