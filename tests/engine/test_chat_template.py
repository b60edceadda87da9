"""Chat templates as checkpoints have them, against what transformers renders from them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.errors import InvalidRequestError
from engine.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "<b>Short</b> & plain."},
    {"role": "user", "content": "Is 2 < 3?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Ünïcode?"},
]
# loop controls, a filter that jinja2's own would escape, special tokens, and what is not given
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% continue %}"
    "{% endif %}{{ m | tojson }}{% endfor %}{% if tools is not none %}tools{% endif %}"
    "{% if add_generation_prompt %}{{ eos_token }}answer:{% endif %}"
)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((tiny_model_dir / file).read_bytes())
    return tmp_path


def set_template(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def rendered(folder: Path) -> str:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert Tokenizer(folder).apply_chat_template(MESSAGES) == ids
    return str(theirs.decode(ids))


def test_a_template_in_the_config_in_a_list_and_in_its_own_file(folder: Path) -> None:
    set_template(folder, TEMPLATE)
    text = rendered(folder)
    assert "<b>Short</b> & plain." in text
    assert "tools" not in text
    set_template(
        folder, [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": ""}]
    )
    assert rendered(folder) == text
    set_template(folder, "of the config")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert rendered(folder) == text


def test_no_template_is_said_in_a_sentence(folder: Path) -> None:
    set_template(folder, None)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer(folder).apply_chat_template(MESSAGES)
