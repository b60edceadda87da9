"""What tests of the model share: small checkpoints of every architecture, and all ranks of one
replica as threads of this process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from engine.attention import build_forward_context
from engine.cluster import ParallelConfig
from engine.request import StepInput, StepOutput
from engine.runner import ModelRunner, load_weights
from engine.weights import read_config

BLOCK = 4
SHAPES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
OPT_SHAPES = {
    "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "vocab_size": 96, "max_position_embeddings": 128,
}  # fmt: skip


def _rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}


VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **SHAPES | {"num_key_value_heads": 8}, attention_bias=True, mlp_bias=True
    ),
    "llama3-rope": lambda: LlamaConfig(
        **SHAPES,
        rope_parameters=_rope(
            "llama3", low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-linear-rope": lambda: LlamaConfig(**SHAPES, rope_parameters=_rope("linear")),
    "llama-dynamic-rope": lambda: LlamaConfig(**SHAPES, rope_parameters=_rope("dynamic")),
    "llama-yarn": lambda: LlamaConfig(
        **SHAPES, rope_parameters=_rope("yarn", original_max_position_embeddings=64)
    ),
    "mistral-window": lambda: MistralConfig(**SHAPES, sliding_window=6),
    "qwen2-tied": lambda: Qwen2Config(**SHAPES, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(
        **SHAPES, use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**SHAPES),
    "opt": lambda: OPTConfig(**OPT_SHAPES),
    "opt-untied": lambda: OPTConfig(**OPT_SHAPES, enable_bias=False, tie_word_embeddings=False),
}  # fmt: skip


def make_checkpoint(folder: Path, config: PretrainedConfig) -> Path:
    """A saved random model of transformers' own, so that names and shapes are theirs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # biases and norms must show in the logits
        is_norm = name.endswith("norm.weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.12)
    model.save_pretrained(folder)
    return folder


class ThreadAllReduce:
    """Sums a tensor over threads that stand for tp ranks, in the order of ranks."""

    def __init__(self, tp: int) -> None:
        self._slots: list[Tensor | None] = [None] * tp
        self._barrier = Barrier(tp, timeout=30)

    def bound_to(self, tp_rank: int) -> Callable[[Tensor], None]:
        def all_reduce(tensor: Tensor) -> None:
            self._slots[tp_rank] = tensor.clone()
            self._barrier.wait()
            total = torch.stack([slot for slot in self._slots if slot is not None]).sum(0)
            self._barrier.wait()
            tensor.copy_(total)

        return all_reduce


class RankThreads:
    """All ranks of one replica in this process: tp ranks as threads, stages one after another."""

    def __init__(
        self, folder: Path, parallel: ParallelConfig, num_blocks: int, dtype: str = "float32"
    ) -> None:
        self.parallel = parallel
        self._pool = ThreadPoolExecutor(parallel.tp)
        self.runners = []
        for stage in range(parallel.pp):
            shared = ThreadAllReduce(parallel.tp)
            for tp_rank in range(parallel.tp):
                reduce = shared.bound_to(tp_rank) if parallel.tp > 1 else None
                rank = stage * parallel.tp + tp_rank
                self.runners.append(
                    ModelRunner(folder, parallel, rank, num_blocks, BLOCK, dtype, "cpu", reduce)
                )
        for runner in self.runners:
            runner.bind(load_weights(folder, runner))

    def stage(self, stage: int) -> list[ModelRunner]:
        tp = self.parallel.tp
        return self.runners[stage * tp : stage * tp + tp]

    def logits(self, step: StepInput) -> Tensor:
        """Of every token of a step, [T, vocab]."""

        def forward(runner: ModelRunner) -> Tensor:
            context = build_forward_context(step, runner.kv, runner.model.first_layer)
            with torch.inference_mode():
                return runner.model.forward(inputs, context)

        inputs = torch.tensor(step.token_ids)
        for stage in range(self.parallel.pp):
            outputs = list(self._pool.map(forward, self.stage(stage)))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:])
            inputs = outputs[0]
        with torch.inference_mode():
            return self.stage(self.parallel.pp - 1)[0].model.logits(inputs)

    def execute(self, step: StepInput) -> StepOutput:
        hidden: Tensor | None = None
        for stage in range(self.parallel.pp):
            runners = self.stage(stage)
            outputs = list(self._pool.map(lambda r, h=hidden: r.execute(step, h), runners))
            if stage == self.parallel.pp - 1:
                assert all(other is None for other in outputs[1:])
                return outputs[0]  # type: ignore[return-value]
            assert isinstance(outputs[0], Tensor)
            hidden = outputs[0]
        raise AssertionError

    def close(self) -> None:
        self._pool.shutdown()


def two_sequences(vocab: int) -> tuple[list[list[int]], list[StepInput]]:
    """Two prompts of 21 and 11 tokens, fed in mixed chunks and single tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in (21, 11)]
    tables = [[9, 0, 3, 7, 1, 4], [2, 8, 5]]
    cuts = [[(0, 7), (0, 9)], [(7, 16), (9, 10)], [(16, 17), (10, 11)], [(17, 21)]]
    steps = []
    for number, parts in enumerate(cuts):
        pieces = [prompts[b][a:z] for b, (a, z) in enumerate(parts)]
        steps.append(
            StepInput(
                step_id=number,
                token_ids=[t for piece in pieces for t in piece],
                starts=[a for a, _ in parts],
                lengths=[z - a for a, z in parts],
                block_tables=tables[: len(parts)],
                samples=[None] * len(parts),
            )
        )
    return prompts, steps


def paged_logits(folder: Path, parallel: ParallelConfig, dtype: str = "float32") -> list[Tensor]:
    """[length, vocab] for each of `two_sequences`' prompts, in float32."""
    vocab = read_config(folder)["vocab_size"]
    ranks = RankThreads(folder, parallel, num_blocks=10, dtype=dtype)
    seen: list[list[Tensor]] = [[], []]
    try:
        for step in two_sequences(vocab)[1]:
            for b, part in enumerate(ranks.logits(step).split(step.lengths)):
                seen[b].append(part)
    finally:
        ranks.close()
    return [torch.cat(parts) for parts in seen]


def plain_logits(folder: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same of transformers' own model in `dtype`."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompts, _ = two_sequences(plain.config.vocab_size)
    with torch.inference_mode():
        return [plain(torch.tensor([p])).logits[0].float() for p in prompts]
