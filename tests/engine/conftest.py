"""What several engine tests compare with: transformers' own model and its greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from identity import NUM_TOKENS, PROMPT_LENGTHS, Reference, prompt, reference_of


@pytest.fixture(scope="session")
def plain_model(tiny_model_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def greedy(plain_model: Any) -> Callable[[list[int], int], Reference]:
    """greedy(prompt, number of tokens): see `reference_of`."""
    return partial(reference_of, plain_model)


@pytest.fixture(scope="session")
def references(greedy: Callable[[list[int], int], Reference]) -> list[Reference]:
    return [greedy(prompt(length), NUM_TOKENS) for length in PROMPT_LENGTHS]
