"""A live switch of requests that begin alike: their common blocks move once, tokens stay."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from test_switch import NUM_TOKENS, Reference, assert_identical, plan_to, prompt
from transformers import AutoModelForCausalLM

from engine.cluster import SwitchPhase, SwitchPlan, SwitchTicket
from engine.request import SamplingParams
from engine.runtime import EngineRuntime


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path) -> list[Reference]:
    """Six prompts that begin with the same 128 tokens, and what transformers says to them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    prompts = [prompt(128) + prompt(5, salt) for salt in range(6)]
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)  # token 0 is padding to `generate` otherwise
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, **options)
        top = model(out).logits[:, ids.shape[1] - 1 : -1].topk(2).values
    gaps = (top[..., 0] - top[..., 1]).tolist()
    return [
        Reference(*row) for row in zip(prompts, out[:, ids.shape[1] :].tolist(), gaps, strict=True)
    ]


async def serve_through(
    runtime: EngineRuntime, shared: list[Reference], plan: SwitchPlan
) -> tuple[list[Reference], list[list[int]], SwitchTicket]:
    """Every prompt again and again until the plan is carried out, so that the switch meets them
    running: (what was asked, tokens, final ticket)."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    asked: list[Reference] = []
    outputs: list[list[int]] = []
    ended = asyncio.Event()

    async def client(index: int) -> None:
        while not ended.is_set():
            name = f"r{index}-{len(asked)}"
            stream = runtime.generate(name, shared[index].prompt, params)
            tokens = [token async for chunk in stream for token in chunk.token_ids]
            asked.append(shared[index])
            outputs.append(tokens)

    async def switch() -> SwitchTicket:
        ticket = await runtime.ended(runtime.apply(plan).ticket_id)
        ended.set()
        return ticket

    async with asyncio.timeout(60):
        ticket, *_ = await asyncio.gather(switch(), *(client(i) for i in range(len(shared))))
    return asked, outputs, ticket


def test_a_shared_prefix_moves_once(open_engine: Any, shared: list[Reference]) -> None:
    """With prefix caching and without: the same tokens, fewer bytes."""
    bytes_each = {}
    for caching in (True, False):
        with open_engine("1xtp2pp1", enable_prefix_caching=caching) as cluster:
            runtime = cluster.runtime
            plan = cluster.on_loop(lambda runtime=runtime: plan_to(runtime, "1xtp1pp3"))
            asked, outputs, ticket = cluster.run(serve_through(runtime, shared, plan), 120)
            assert ticket.phase is SwitchPhase.DONE, ticket.reason
            assert assert_identical(asked, outputs) == 0
            assert ticket.num_migrated >= 3
            bytes_each[caching] = ticket.kv_bytes / ticket.num_migrated
    # 8 blocks once and at most 2 more each, against 9 or 10 each (fewer where a prefill has begun)
    assert bytes_each[True] < 0.65 * bytes_each[False]
