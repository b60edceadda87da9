"""Tokenizer of a checkpoint, by `tokenizers`: no torch, no transformers, so the engine process
stays light. Decoding one token at a time goes by bytes, which needs no look at its neighbours."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from engine.chat_template import ChatTemplate, find_template
from engine.errors import CheckpointError, InvalidRequestError


class Tokenizer:
    """Text <-> token ids of one checkpoint folder. Raises CheckpointError when files are broken."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        config = _read_json(model_dir / "tokenizer_config.json")
        special = {k: _content(v) for k, v in config.items() if k.endswith("_token") and v}
        source = find_template(model_dir, config)
        self._template = None if source is None else ChatTemplate(source, special)
        self._added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self._shown_bytes: dict[int, bytes] = {}  # empty for special tokens
        self._piece_bytes = _rule_of(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = list(token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for wherever it is; may be part of a character. Ids that the
        vocabulary does not use stand for nothing."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._tokenizer.id_to_token(token_id)
            if piece is None:
                found = b""
            elif token_id in self._added:
                found = piece.encode()
            else:
                found = self._piece_bytes(token_id, piece)
            self._bytes[token_id] = found
        return found

    def shown_bytes(self, token_id: int) -> bytes:
        """`token_bytes`, but nothing for special tokens."""
        found = self._shown_bytes.get(token_id)
        if found is None:
            added = self._added.get(token_id)
            is_special = added is not None and added.special
            found = b"" if is_special else self.token_bytes(token_id)
            self._shown_bytes[token_id] = found
        return found

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to answer."""
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or serve a chat model."
            )
        return self.encode(self._template.render(messages, options), add_special_tokens=False)


class IncrementalDecoder:
    """Text of a growing token list, whole characters only: what is broken becomes U+FFFD."""

    __slots__ = ("_bytes_of", "_decode")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.shown_bytes if skip_special_tokens else tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Text that became whole with these tokens; on the last call, everything left."""
        if len(token_ids) == 1:
            return self._decode(self._bytes_of(token_ids[0]), last)
        return self._decode(b"".join(map(self._bytes_of, token_ids)), last)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return data


def _content(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)


# -------------------------------------------------------------------------------- bytes


def _rule_of(tokenizer: Any) -> Any:
    """(id, piece) -> bytes, by the kind of decoder: byte-level (GPT-2, Llama 3, Qwen, OPT),
    SentencePiece (Llama 2, Mistral), or, for any other, by decoding it behind another token."""
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_bytes
    anchor = next((i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i])), 0)
    before = tokenizer.decode([anchor])

    def behind_anchor(token_id: int, piece: str) -> bytes:
        text: str = tokenizer.decode([anchor, token_id])
        return text.removeprefix(before).encode()

    return behind_anchor


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return {chr(b) if b in kept else chr(next(moved)): b for b in range(256)}


_BYTE_OF = _byte_characters()


def _byte_level_bytes(token_id: int, piece: str) -> bytes:
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def _sentencepiece_bytes(token_id: int, piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
