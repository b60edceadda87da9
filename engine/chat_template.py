"""Chat templates of a checkpoint, rendered by jinja2 in a sandbox as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequestError


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """The template in chat_template.jinja, else in the tokenizer's configuration: a text, or a list
    of named texts of which `default` is taken (the first when none is called so)."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    given = config.get("chat_template")
    if isinstance(given, list) and given:
        named = {entry["name"]: entry["template"] for entry in given}
        given = named.get("default", given[0]["template"])
    return given if isinstance(given, str) else None


class ChatTemplate:
    """One template, with the special tokens it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template: Any = None
        self._fault = ""
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            self._fault = f"this model's chat template is broken: {error}"
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str:
        """Text of a conversation, ending where the assistant is to answer.

        `options` are the template's own variables. Raises InvalidRequestError when it refuses.
        """
        if self._fault:
            raise InvalidRequestError(self._fault, param="messages")
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text: str = self._template.render(
                variables | self._special_tokens | dict(options or {}) | {"messages": messages}
            )
        # it runs on what the user sent
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequestError(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        return text


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
