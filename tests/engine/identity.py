"""Token identity: requests through a running engine against tokens of transformers' own model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.cluster import KvCostParams, SwitchPlan, SwitchTicket, parse_deployment_key
from engine.migration.plan import plan_switch
from engine.request import SamplingParams
from engine.runtime import EngineRuntime

# A difference below this in the reference excuses another token: the order of sums changes with tp
# degree and batch shape. It is the gap of the two best logits for greedy tokens, and for sampled
# ones how far the drawn number is from where another token begins. Logits agree to 1e-4
# (test_model).
EPSILON = 1e-3
NUM_TOKENS = 24
PROMPT_LENGTHS = (3, 17, 40, 96)
MIGRATE = KvCostParams(1e9, 1.0, 0.01)  # recompute looks endless


@dataclass(frozen=True)
class Reference:
    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    temperature: float = 0.0
    seed: int = 0

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=len(self.tokens),
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=True,
        )


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i * i + 31 * i + length + 13 * salt) % 256 for i in range(length)]


def reference_of(model: Any, tokens: list[int], num_tokens: int) -> Reference:
    """What transformers generates from a prompt, and how far apart its two best logits were."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([tokens])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else token 0 would count as padding
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        top = model(out).logits[0, len(tokens) - 1 : -1].topk(2).values
    gaps = (top[:, 0] - top[:, 1]).tolist()
    return Reference(tokens, out[0, len(tokens) :].tolist(), gaps)


def sampled_reference(
    model: Any, tokens: list[int], num_tokens: int, temperature: float, seed: int
) -> Reference:
    """The same for tokens drawn by the inverse of the distribution function at `uniform`."""
    import torch

    from engine.sampler import uniform

    drawn, gaps = list[int](), list[float]()
    with torch.inference_mode():
        for position in range(num_tokens):
            logits = model(torch.tensor([tokens + drawn])).logits[0, -1].double()
            cdf = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
            u = uniform(seed, position)
            token = int(torch.searchsorted(cdf, u, right=True))
            below = float(cdf[token - 1]) if token else 0.0
            gaps.append(min(u - below, float(cdf[token]) - u))
            drawn.append(token)
    return Reference(tokens, drawn, gaps, temperature, seed)


def plan_to(runtime: EngineRuntime, key: str, kv: KvCostParams = MIGRATE) -> SwitchPlan:
    target = parse_deployment_key(key)
    return plan_switch(runtime.spec, runtime.deployment, runtime.epoch, target, kv)


async def outputs_of(
    runtime: EngineRuntime,
    references: list[Reference],
    name: str,
    at_token: int = 0,
    act: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Run one request per reference; `act` when the first has `at_token` tokens."""
    streams = [
        runtime.generate(f"{name}-{i}", r.prompt, r.params) for i, r in enumerate(references)
    ]

    async def collect(index: int) -> list[int]:
        tokens: list[int] = []
        async for chunk in streams[index]:
            tokens += chunk.token_ids
            if index == 0 and len(tokens) == at_token:
                act()
        return tokens

    async with asyncio.timeout(60):
        return list(await asyncio.gather(*(collect(i) for i in range(len(streams)))))


async def serve(
    runtime: EngineRuntime,
    references: list[Reference],
    at_token: int,
    plan: SwitchPlan | None,
    name: str,
) -> tuple[list[list[int]], SwitchTicket | None]:
    """Run one request per reference; apply the plan when the first has `at_token` tokens."""
    tickets: list[SwitchTicket] = []

    def act() -> None:
        if plan is not None:
            tickets.append(runtime.apply(plan))

    outputs = await outputs_of(runtime, references, name, at_token, act)
    return outputs, await runtime.ended(tickets[0].ticket_id) if tickets else None


async def serve_through_loss(
    runtime: EngineRuntime,
    references: list[Reference],
    strike: Callable[[], None],
    is_noticed: Callable[[], bool],
) -> list[list[int]]:
    """Run the requests, `strike` at the first one's fourth token, wait until it `is_noticed`."""
    outputs = await outputs_of(runtime, references, "lost", 4, strike)
    async with asyncio.timeout(60):
        while not is_noticed():
            await runtime.wait_for_change(1.0)
    return outputs


def assert_identical(references: list[Reference], outputs: list[list[int]]) -> int:
    """Tokens equal the reference up to an excused position; the number of excuses."""
    excused = 0
    for reference, tokens in zip(references, outputs, strict=True):
        assert len(tokens) == len(reference.tokens)
        for position, (expected, token) in enumerate(zip(reference.tokens, tokens, strict=True)):
            if token != expected:
                assert reference.gaps[position] < EPSILON, (position, expected, token)
                excused += 1
                break  # from here on the contexts differ
    return excused
