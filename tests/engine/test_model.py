"""A sharded model on the paged cache against transformers' own model, and generation through the
batch scheduler against transformers' generate."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from engine.attention import build_forward_context
from engine.block_manager import BlockManager
from engine.cluster import ParallelConfig
from engine.errors import InfeasibleError
from engine.request import SampleSpec, SamplingParams, Sequence, StepInput, StepOutput
from engine.runner import ModelRunner, load_weights
from engine.scheduler import BatchScheduler
from engine.tiny_model import cached_tiny_model

BLOCK = 4
SHAPES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPES, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: LlamaConfig(
        **SHAPES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "mistral-window": lambda: MistralConfig(**SHAPES, sliding_window=6),
    "qwen2-tied": lambda: Qwen2Config(**SHAPES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPES),
}  # fmt: skip


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

    def __init__(self, folder: Path, parallel: ParallelConfig, num_blocks: int) -> None:
        self.parallel = parallel
        self._pool = ThreadPoolExecutor(parallel.tp)
        self.runners = []
        for stage in range(parallel.pp):
            shared = ThreadAllReduce(parallel.tp)
            for tp_rank in range(parallel.tp):
                reduce = shared.bound_to(tp_rank) if parallel.tp > 1 else None
                rank = stage * parallel.tp + tp_rank
                self.runners.append(
                    ModelRunner(folder, parallel, rank, num_blocks, BLOCK, "float32", "cpu", reduce)
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_checkpoint(folder: Path, variant: str) -> Path:
    config = VARIANTS[variant]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # biases and norms must show in the logits
        is_norm = name.endswith("norm.weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.12)
    model.save_pretrained(folder)
    return folder


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


def assert_logits_equal_plain_model(folder: Path, parallel: ParallelConfig) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts, steps = two_sequences(plain.config.vocab_size)
    seen: list[list[Tensor]] = [[], []]
    with closing(RankThreads(folder, parallel, num_blocks=10)) as ranks:
        for step in steps:
            for b, part in enumerate(ranks.logits(step).split(step.lengths)):
                seen[b].append(part)
    for prompt, parts in zip(prompts, seen, strict=True):
        with torch.inference_mode():
            expected = plain(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.3
        assert (torch.cat(parts) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_logits_of_the_tiny_model(tiny: Path, tp: int, pp: int) -> None:
    assert_logits_equal_plain_model(tiny, ParallelConfig(tp, pp))


@pytest.mark.parametrize("key", [(1, 1), (4, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_other_architectures(variant: str, key: tuple[int, int], tmp_path: Path) -> None:
    assert_logits_equal_plain_model(make_checkpoint(tmp_path, variant), ParallelConfig(*key))


def test_heads_that_do_not_divide_are_refused(tiny: Path) -> None:
    with pytest.raises(InfeasibleError, match="8 attention heads, which tp=3"):
        ModelRunner(tiny, ParallelConfig(3, 1), 0, 4, BLOCK, "float32", "cpu")


def test_bound_weights_are_shared_and_checked(tiny: Path) -> None:
    parallel = ParallelConfig(1, 2)
    first, second = (ModelRunner(tiny, parallel, 1, 4, BLOCK, "float32", "cpu") for _ in range(2))
    weights = load_weights(tiny, first)
    assert set(weights) == {s.tensor for s in first.shards}
    pointers = {t.data_ptr() for t in weights.values()}
    for runner in (first, second):
        runner.bind(weights)
        modules = [*runner.model._layers, runner.model._norm, runner.model._head]
        held = {p.data_ptr() for m in modules if m is not None for p in m.parameters()}
        assert held == pointers
    name = "model.layers.5.mlp.down_proj.weight"
    with pytest.raises(AssertionError, match="down_proj"):
        first.bind(weights | {name: weights[name][:, :-1]})
    with pytest.raises(KeyError, match="down_proj"):
        first.bind({n: t for n, t in weights.items() if n != name})


def test_corrupting_any_block_changes_logits(tiny: Path) -> None:
    """The model can't ignore its cache: every block of either sequence matters."""
    with closing(RankThreads(tiny, ParallelConfig(1, 1), num_blocks=10)) as ranks:
        prompts, steps = two_sequences(256)
        for step in steps:
            ranks.logits(step)
        tables, kv = steps[0].block_tables, ranks.runners[0].kv
        decode = StepInput(9, [5, 6], [21, 11], [1, 1], tables, [None, None])
        kv.data[:, :, 6] = 100.0  # a block of nobody
        before = ranks.logits(decode)
        for row, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
            for block in table[: -(-len(prompt) // BLOCK)]:
                saved = kv.read_blocks([block], (0, 8), (0, 4))
                kv.write_blocks([block], (0, 8), (0, 4), saved.roll(1, dims=-1))
                moved = (ranks.logits(decode) - before).abs().amax(-1)
                assert moved[row] > 1e-2
                assert moved[1 - row] < 1e-5
                kv.write_blocks([block], (0, 8), (0, 4), saved)
        assert torch.equal(ranks.logits(decode), before)


def test_the_last_stage_samples_where_asked(tiny: Path) -> None:
    greedy = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0)
    first = two_sequences(256)[1][0]
    step = replace(first, samples=[None, greedy])
    with closing(RankThreads(tiny, ParallelConfig(2, 2), num_blocks=10)) as ranks:
        assert ranks.execute(step).tokens == [None, int(ranks.logits(step)[-1].argmax())]
        assert ranks.execute(first).tokens == [None, None]


@pytest.mark.parametrize("key", [(1, 1), (2, 2)])
def test_generation_equals_transformers(tiny: Path, key: tuple[int, int]) -> None:
    """Concurrent prompts, chunked prefill, and a KV cache so small that it forces preemption."""
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 70, 33, 17, 1, 64)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    seqs = [Sequence(f"r{i}", p, params, arrival_s=float(i)) for i, p in enumerate(prompts)]
    scheduler = BatchScheduler(BlockManager(72, BLOCK), 8, 32, 2048, eos_token_id=257)
    for seq in seqs:
        scheduler.add(seq)
    with closing(RankThreads(tiny, ParallelConfig(*key), num_blocks=72)) as ranks:
        while scheduler.has_work:
            batch = scheduler.schedule()
            assert batch is not None
            scheduler.update(batch, ranks.execute(batch.to_step_input()).tokens)
            scheduler.check_integrity()
    assert sum(seq.num_preemptions for seq in seqs) > 0
    plain = AutoModelForCausalLM.from_pretrained(tiny).eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, seq in zip(prompts, seqs, strict=True):
        tokens = plain.generate(torch.tensor([prompt]), max_new_tokens=40, **options)
        assert seq.output_token_ids == tokens[0, len(prompt) :].tolist()
