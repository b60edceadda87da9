"""What several engine tests compare with: transformers' own model and its greedy tokens."""

from __future__ import annotations

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
def references(plain_model: Any) -> list[Reference]:
    """Greedy tokens of transformers, and how far apart its two best logits were."""
    import torch

    found = []
    for length in PROMPT_LENGTHS:
        ids = torch.tensor([prompt(length)])
        with torch.inference_mode():
            out = plain_model.generate(
                ids,
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            logits = plain_model(out).logits[0, length - 1 : -1]
        top = logits.topk(2).values
        found.append(
            Reference(prompt(length), out[0, length:].tolist(), (top[:, 0] - top[:, 1]).tolist())
        )
    return found
