"""What several engine tests compare with: transformers' own model and its greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from identity import NUM_TOKENS, PROMPT_LENGTHS, Reference, prompt


@pytest.fixture(scope="session")
def plain_model(tiny_model_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def greedy(plain_model: Any) -> Callable[[list[int], int], Reference]:
    """greedy(prompt, number of tokens): what transformers generates, and how far apart its two
    best logits were."""
    import torch

    @torch.inference_mode()
    def generate(tokens: list[int], num_tokens: int) -> Reference:
        ids = torch.tensor([tokens])
        out = plain_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else token 0 would count as padding
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        top = plain_model(out).logits[0, len(tokens) - 1 : -1].topk(2).values
        gaps = (top[:, 0] - top[:, 1]).tolist()
        return Reference(tokens, out[0, len(tokens) :].tolist(), gaps)

    return generate


@pytest.fixture(scope="session")
def references(greedy: Callable[[list[int], int], Reference]) -> list[Reference]:
    return [greedy(prompt(length), NUM_TOKENS) for length in PROMPT_LENGTHS]
