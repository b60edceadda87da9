"""Tokenizer and chat template of a checkpoint, by `tokenizers` and jinja2: no torch, no
transformers, so the engine process stays light."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from engine.errors import CheckpointError, InvalidRequestError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not a whole character yet


class Tokenizer:
    """Text <-> token ids of one checkpoint folder. Raises CheckpointError when files are broken."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        config_path = model_dir / "tokenizer_config.json"
        config = json.loads(config_path.read_text()) if config_path.exists() else {}
        self._special = {k: _content(v) for k, v in config.items() if k.endswith("_token")}
        self._template = _default_template(config.get("chat_template"))
        template_path = model_dir / "chat_template.jinja"
        if template_path.exists():  # where newer checkpoints keep it, and what counts there
            self._template = template_path.read_text(encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to answer."""
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or serve a chat model."
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            text = environment.from_string(self._template).render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # it runs on user data
            raise InvalidRequestError(f"the chat template refused the messages: {error}") from error
        return self.encode(text, add_special_tokens=False)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Like transformers' filter: jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _default_template(found: Any) -> str | None:
    """A tokenizer config has one template, or a list of named ones."""
    if isinstance(found, list):
        return {t["name"]: t["template"] for t in found}.get("default")
    return None if found is None else str(found)


class IncrementalDecoder:
    """Text of a growing token list, whole characters only.

    Decodes from the last emitted character on, with one token of context before it, because a
    token's text can depend on its left neighbour.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix, self._read = 0, 0  # text of ids[:_read] is out; _prefix is the context

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Text that became whole with these tokens; on the last call, everything left."""
        self._ids += token_ids
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        text = self._tokenizer.decode(self._ids[self._prefix :])
        unfinished = text.endswith(REPLACEMENT) and not last
        # four bytes make the longest character: what is still broken after them stays broken
        if unfinished and len(self._ids) - self._read < 4:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(before) :]
