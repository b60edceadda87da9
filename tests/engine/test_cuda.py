"""The same engine on a GPU: parity with transformers, tp, pp and live switches as several ranks
that share one device, over gloo with host staging. Skipped without CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import Reference, assert_identical, plan_to, prompt, serve

from engine.cluster import ParallelConfig, SwitchPhase
from engine.facade import EngineCluster
from engine.request import StepInput
from engine.runner import ModelRunner, load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine(torch_device="cuda") as cluster:
        yield cluster


def test_logits_equal_those_on_the_cpu(tiny_model_dir: Path) -> None:
    tokens = prompt(40)
    step = StepInput(0, tokens, [0], [len(tokens)], [[0, 1, 2]], [None])
    logits = {}
    for device in ("cpu", "cuda:0"):
        one = ParallelConfig(1, 1)
        runner = ModelRunner(tiny_model_dir, one, 0, 4, 16, "float32", device)
        runner.bind(load_weights(tiny_model_dir, runner))
        logits[device] = _logits(runner, step).cpu()
    torch.testing.assert_close(logits["cpu"], logits["cuda:0"], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def _logits(runner: ModelRunner, step: StepInput) -> torch.Tensor:
    from engine.attention import build_forward_context

    context = build_forward_context(step, runner.kv, runner.model.first_layer)
    ids = torch.tensor(step.token_ids, device=runner.device)
    return runner.model.logits(runner.model.forward(ids, context))


@pytest.mark.parametrize("key", ["1xtp2pp1", "1xtp1pp2", "1xtp2pp2", "1xtp4pp1", "4xtp1pp1"])
def test_switches_between_ranks_on_one_gpu_keep_tokens(
    engine: EngineCluster, references: list[Reference], key: str
) -> None:
    runtime = engine.runtime
    plan = engine.on_loop(lambda: plan_to(runtime, key))
    outputs, ticket = engine.run(serve(runtime, references, 5, plan, key), 120)
    assert ticket is not None
    assert ticket.phase is SwitchPhase.DONE, ticket.reason
    assert assert_identical(references, outputs) == 0
    outputs, _ = engine.run(serve(runtime, references, 0, None, f"after-{key}"), 120)
    assert assert_identical(references, outputs) == 0
