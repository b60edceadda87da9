"""The model that is switched: Llama's shape, random weights, few wide layers."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the checkpoint; 8 KV heads and 8 layers allow tp and pp of 1, 2 and 4."""

    name: str
    hidden_size: int
    inner_size: int
    num_heads: int
    vocab_size: int = 4096
    num_layers: int = 8
    num_kv_heads: int = 8
    max_model_len: int = 1024
    dtype: str = "float32"


LARGE = Shape("switch-1gb", hidden_size=1536, inner_size=5632, num_heads=16)  # 1.08e9 bytes
SMALL = Shape("switch-60mb", hidden_size=256, inner_size=1408, num_heads=8)


def make_model(shape: Shape) -> Path:
    """Folder of the checkpoint, written when missing, by a process of its own: the engine process
    never loads torch."""
    folder = CACHE / shape.name
    if not (folder / "config.json").exists():
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(shape, folder))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing {folder} ended with exit status {writer.exitcode}")
    return folder


def _write(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.inner_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_model_len,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)
