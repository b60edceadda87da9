"""An embedded tiny Llama with random weights, in Hugging Face format: nothing is downloaded.

About six million parameters in float32 and a byte-level tokenizer; the same seed gives the same
bytes. `python -m engine.tiny_model FOLDER` writes one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 8, 8, 4, 32, 704
VOCAB, MAX_LEN = 320, 2048
BOS, EOS = 256, 257
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORMAT = 1  # raise it when the same seed no longer gives the same bytes


def write_tiny_model(folder: Path | str, seed: int = 0) -> Path:
    """Write config, weights and tokenizer into `folder` and return it.

    The files appear together by one rename; in a folder that has files already, one by one.
    """
    target = Path(folder)
    staged = _write_staged(target, seed)
    try:
        staged.rename(target)  # also onto an empty folder
    except OSError:
        for file in sorted(staged.iterdir()):
            os.replace(file, target / file.name)
        staged.rmdir()
    return target


def cached_tiny_model(cache_dir: Path | str, seed: int = 0) -> Path:
    """The tiny model in `cache_dir`, made when missing. Safe when several processes ask at once:
    the first rename wins and the others drop their copy, which has the same bytes."""
    target = Path(cache_dir) / f"tiny-llama-{FORMAT}-seed{seed}"
    if target.is_dir():
        return target
    staged = _write_staged(target, seed)
    try:
        staged.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(staged)
    return target


def _write_staged(target: Path, seed: int) -> Path:
    from safetensors.numpy import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    staged.chmod(0o755)
    weights = staged / "model.safetensors"
    save_file(_weights(seed), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
    (staged / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    _write_json(staged / "tokenizer_config.json", _tokenizer_config())
    _write_json(staged / "config.json", _config())
    return staged


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LEN,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }


def _weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Normal weights of variance gain^2 / fan_in. Queries and keys are louder than usual, so that
    attention is sharp and a token depends visibly on the context it looks at."""
    rng = np.random.default_rng(seed)

    def linear(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        weight = rng.standard_normal((rows, columns), dtype=np.float32)
        return weight * np.float32(gain / columns**0.5)

    def norm() -> NDArray[np.float32]:
        return 1 + np.float32(0.1) * rng.standard_normal(HIDDEN, dtype=np.float32)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN), np.float32)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": linear(q, HIDDEN, 1.5),
            prefix + "self_attn.k_proj.weight": linear(kv, HIDDEN, 1.5),
            prefix + "self_attn.v_proj.weight": linear(kv, HIDDEN, 1.0),
            prefix + "self_attn.o_proj.weight": linear(HIDDEN, q, 1.0),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": linear(INTERMEDIATE, HIDDEN, 1.0),
            prefix + "mlp.up_proj.weight": linear(INTERMEDIATE, HIDDEN, 1.0),
            prefix + "mlp.down_proj.weight": linear(HIDDEN, INTERMEDIATE, 1.0),
        }
    return weights | {"model.norm.weight": norm(), "lm_head.weight": linear(VOCAB, HIDDEN, 3.0)}


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255, which ByteLevel (de)coders use."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(b) if b in kept else chr(next(moved)) for b in range(256)]


def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    num_reserved = VOCAB - 256 - len(SPECIAL_TOKENS)
    names = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(num_reserved))]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return str(tokenizer.to_str(pretty=True))


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "model_max_length": MAX_LEN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded tiny model to a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args()
    print(write_tiny_model(args.folder, args.seed))


if __name__ == "__main__":
    main()
