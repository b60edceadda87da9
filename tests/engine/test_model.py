"""A sharded model on the paged cache against transformers' own model, and generation through the
batch scheduler against transformers' generate."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_threads import BLOCK, RankThreads, paged_logits, plain_logits, two_sequences
from transformers import AutoModelForCausalLM

from engine.block_manager import BlockManager
from engine.cluster import ParallelConfig
from engine.errors import InfeasibleError
from engine.packing import dense
from engine.request import SampleSpec, SamplingParams, Sequence, StepInput
from engine.runner import ModelRunner, load_weights
from engine.scheduler import BatchScheduler
from engine.tiny_model import cached_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_logits_of_the_tiny_model(tiny: Path, tp: int, pp: int) -> None:
    """Up to sixteen ranks; other architectures: test_architectures."""
    found = paged_logits(tiny, ParallelConfig(tp, pp))
    for ours, theirs in zip(found, plain_logits(tiny), strict=True):
        assert theirs.std() > 0.3
        assert (ours - theirs).abs().max() <= 1e-4


def test_heads_that_do_not_divide_are_refused(tiny: Path) -> None:
    with pytest.raises(InfeasibleError, match="8 attention heads, which tp=3"):
        ModelRunner(tiny, ParallelConfig(3, 1), 0, 4, BLOCK, "float32", "cpu")


def test_bound_weights_are_shared_and_checked(tiny: Path) -> None:
    parallel = ParallelConfig(1, 2)
    first, second = (ModelRunner(tiny, parallel, 1, 4, BLOCK, "float32", "cpu") for _ in range(2))
    weights = load_weights(tiny, first)
    assert set(weights) == {s.tensor for s in first.shards}
    plain = dict(weights)
    first.bind(weights)
    shared = dict(weights)
    second.bind(weights)
    assert all(weights[name] is shared[name] for name in weights)  # packed once
    for name, tensor in weights.items():
        assert torch.equal(dense(tensor), plain[name])
    pointers = {t.data_ptr() for t in weights.values() if not t.is_mkldnn}
    for runner in (first, second):
        modules = [*runner.model._layers, runner.model._norm, runner.model._head]
        parameters = [p for m in modules if m is not None for p in m.parameters()]
        assert {p.data_ptr() for p in parameters if not p.is_mkldnn} == pointers
        assert len(parameters) == len(weights)
    name = "model.layers.5.mlp.down_proj.weight"
    with pytest.raises(AssertionError, match="down_proj"):
        first.bind(weights | {name: plain[name][:, :-1]})
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
