"""Fewer KV heads than tp ranks: who holds what, plans and KV copies by property, and live switches
of a model with two KV heads between four ranks, two and one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity import MIGRATE, Reference, assert_identical, plan_to, reference_of, serve
from rank_threads import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.architectures import ARCHITECTURES, Sizes, tensor_specs
from engine.cluster import (
    ClusterSpec,
    Deployment,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    SwitchPhase,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError
from engine.executor import LocalExecutor, WorkerConfig
from engine.facade import EngineCluster
from engine.migration.check import check_plan
from engine.migration.kv import kv_move_bytes, kv_moves
from engine.migration.plan import plan_switch
from engine.runtime import EngineRuntime, make_run_dir
from engine.shards import fits, kv_bytes_per_block, rank_shards
from engine.weights import read_model_spec

CONFIGS = [ParallelConfig(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 4) if tp * pp <= 4]


def toy(num_heads: int = 8, num_kv_heads: int = 2) -> ModelSpec:
    """A Qwen3 of 5 layers: with biases and norms of heads."""
    sizes = Sizes(5, num_heads, num_kv_heads, 4, 16, 24, 32, 64)
    tensors = tensor_specs(ARCHITECTURES["Qwen3ForCausalLM"], {"attention_bias": True}, sizes)
    return ModelSpec("toy", 5, num_heads, num_kv_heads, 4, 16, 32, 64, 4, tensors)


TOY = ClusterSpec(4, 4, 10**6, 1e9, 4, toy(), 8, 64)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_tile_every_tensor_and_match_the_query_heads(tp: int, num_kv_heads: int) -> None:
    model, parallel = toy(num_kv_heads=num_kv_heads), ParallelConfig(tp, 2)
    held = [
        {s.tensor: s for s in rank_shards(model, parallel, r)} for r in range(parallel.num_devices)
    ]
    for tensor in model.tensors:
        shards = [h[tensor.name] for h in held if tensor.name in h]
        size = tensor.shape[tensor.tp_dim or 0]
        copies = [sum(s.start <= i < s.stop for s in shards) for i in range(size)]
        replicas = max(1, tp // num_kv_heads) if tensor.role == "kv" else 1
        if tensor.tp_dim is not None:
            assert copies == [replicas] * size, tensor
    group = model.num_heads // num_kv_heads  # query heads that attend to one KV head
    for rank in range(tp):
        first, stop = parallel.kv_head_range(rank, num_kv_heads)
        queries = range(*parallel.shard_range(rank, model.num_heads))
        assert {q // group for q in queries} == set(range(first, stop))
        assert kv_bytes_per_block(model, parallel, rank, 4) == 4 * 2 * 3 * (stop - first) * 4 * 4


def test_which_tp_a_model_allows() -> None:
    assert [tp for tp in range(1, 9) if toy(8, 2).allows_tp(tp)] == [1, 2, 4, 8]
    assert [tp for tp in range(1, 13) if toy(12, 6).allows_tp(tp)] == [1, 2, 3, 6, 12]
    smol = replace(toy(9, 3), name="smol")
    spec = replace(TOY, model=smol)
    assert fits(spec, ParallelConfig(3, 1))
    assert not fits(spec, ParallelConfig(2, 1))
    with pytest.raises(
        InfeasibleError, match=r"9 attention heads, which tp=2 does not divide.*from 1, 3, 9\."
    ):
        smol.check(ParallelConfig(2, 1))
    with pytest.raises(
        InfeasibleError, match=r"6 key/value heads, which tp=4 neither.*from 1, 2, 3, 6, 12\."
    ):
        toy(12, 6).check(ParallelConfig(4, 1))


def deployments() -> st.SearchStrategy[tuple[ParallelConfig, ...]]:
    lists = st.lists(st.sampled_from(CONFIGS), min_size=1, max_size=4).map(tuple)
    return lists.filter(lambda configs: sum(c.num_devices for c in configs) <= 4)


@settings(max_examples=60, deadline=None)
@given(deployments(), deployments(), st.permutations(range(4)))
def test_a_plan_between_any_two_deployments_passes_the_check(
    old: tuple[ParallelConfig, ...], new: tuple[ParallelConfig, ...], order: list[int]
) -> None:
    current = Deployment(
        tuple(
            replace(r, placement=Placement(tuple(order[d] for d in r.placement.devices)))
            for r in dense_deployment(old).replicas
        )
    )
    plan = plan_switch(TOY, current, 0, new, MIGRATE)
    check_plan(TOY, current, plan)
    assert plan.weight_bytes == sum(t.nbytes for t in plan.transfers)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CONFIGS), st.sampled_from(CONFIGS), st.permutations(range(4)))
def test_kv_copies_fill_every_layer_and_head_of_every_rank_once(
    old: ParallelConfig, new: ParallelConfig, order: list[int]
) -> None:
    model = TOY.model
    src = Replica(0, old, Placement(tuple(order[: old.num_devices])))
    dst = Replica(1, new, Placement(tuple(range(new.num_devices))))

    def origin(replica: Replica, device: int) -> tuple[int, int, int, int]:
        parallel, rank = replica.parallel, replica.placement.devices.index(device)
        layers = parallel.layer_range(parallel.stage_of(rank), model.num_layers)
        return *layers, *parallel.kv_head_range(parallel.tp_rank_of(rank), model.num_kv_heads)

    written: set[tuple[int, int, int]] = set()
    moves = list(kv_moves(model, src, dst, [3, 1], [0, 2]))
    for move in moves:
        (s_layer, _, s_head, _), (d_layer, _, d_head, _) = (
            origin(src, move.src), origin(dst, move.dst),
        )  # fmt: skip
        assert [x + s_layer for x in move.src_layers] == [x + d_layer for x in move.dst_layers]
        assert [x + s_head for x in move.src_heads] == [x + d_head for x in move.dst_heads]
        for layer in range(*move.dst_layers):
            for head in range(*move.dst_heads):
                key = (move.dst, layer + d_layer, head + d_head)
                assert key not in written, "written twice"
                written.add(key)
    wanted = {
        (device, layer, head)
        for device in dst.placement.devices
        for layer in range(*origin(dst, device)[:2])
        for head in range(*origin(dst, device)[2:])
    }
    assert written == wanted
    # what the target's device holds already is never taken over a link
    for move in moves:
        if move.src != move.dst and move.dst in src.placement.devices:
            here, there = origin(src, move.dst), origin(src, move.src)
            assert here != there
    total = sum(kv_move_bytes(model, m, 4) for m in moves)
    assert total <= len(wanted) * 2 * 4 * model.kv_bytes_per_token(1, 1)


# ------------------------------------------------------------------------------------
# Live


NUM_TOKENS = 64  # with fewer, this small model ends before a switch has begun to move them
CYCLE = ("4xtp1pp1", "1xtp4pp1", "2xtp2pp1", "1xtp4pp1")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Louder than the other small models, so that tokens depend on far context and vary."""
    folder = make_checkpoint(tmp_path_factory.mktemp("two-heads"), LlamaConfig(**SHAPES))
    tensors = load_file(folder / "model.safetensors")
    for part, gain in (("embed_tokens", 8), ("q_proj", 1.5), ("k_proj", 1.5), ("lm_head", 3)):
        tensors |= {n: t * gain for n, t in tensors.items() if part in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def references(model_dir: Path) -> list[Reference]:
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = []
    for length in (3, 17, 40, 70):
        prompt = [(7 * i * i + 31 * i + length) % 96 for i in range(length)]
        found.append(reference_of(plain, prompt, NUM_TOKENS))
        assert len(set(found[-1].tokens)) > 20
    return found


@contextmanager
def open_engine(model_dir: Path, key: str) -> Iterator[EngineCluster]:
    model = replace(read_model_spec(model_dir, "float32"), max_model_len=192)
    spec = ClusterSpec(4, 4, 2_000_000, 1e9, 8, model, 8, 64)

    def build() -> EngineRuntime:
        run_dir = make_run_dir()
        workers = [
            WorkerConfig(
                device=device,
                run_dir=str(run_dir),
                model_dir=str(model_dir),
                dtype="float32",
                torch_device="cpu",
                block_size=spec.block_size,
                max_model_len=model.max_model_len,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                eos_token_ids=(),
            )
            for device in range(spec.num_devices)
        ]
        initial = dense_deployment(parse_deployment_key(key))
        return EngineRuntime(spec, initial, LocalExecutor(), workers, run_dir, max_queue=100)

    with EngineCluster(build) as cluster:
        yield cluster


def test_tokens_survive_switches_to_and_from_replicated_heads(
    model_dir: Path, references: list[Reference]
) -> None:
    with open_engine(model_dir, CYCLE[-1]) as cluster:
        runtime: Any = cluster.runtime
        for key in CYCLE:
            plan = cluster.on_loop(partial(plan_to, runtime, key))
            outputs, ticket = cluster.run(serve(runtime, references, 3, plan, key), 120)
            assert ticket is not None
            assert ticket.phase is SwitchPhase.DONE, ticket.reason
            assert ticket.num_migrated > 0
            assert runtime.deployment.key == key
            assert assert_identical(references, outputs) == 0
