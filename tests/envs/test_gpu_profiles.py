"""GPU profiles: fits that find what made the measurements, numbers by hand, the committed files."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path

import numpy as np
import pytest

from controller.planner import Planner
from engine.architectures import Sizes
from engine.cluster import (
    ParallelConfig,
    Request,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from engine.shards import num_kv_blocks, rank_weight_bytes
from envs.fit_gpu import fit_operators, main, read_collective, read_operators, residuals
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.gpu import KINDS, MATRIX_KINDS, Curve, Roofline, fit_curve, operator_work
from envs.surrogate.gpu_profile import ACCELERATORS, HOST_STEP_S, MODELS, GpuNode, gpu_profile

FOLDER = Path(__file__).parents[2] / "configs" / "profiles"
NAMES = [f"{node}-{model}" for node, model in product(ACCELERATORS, MODELS)]
SIZES = Sizes(1, 32, 8, 128, 4096, 14336, 128256, 4096)
TRUTH = {
    kind: Roofline(4e-6 + 1e-6 * i, 4e14 if kind in MATRIX_KINDS else inf, 2e12, 2.0 + i / 5)
    for i, kind in enumerate(KINDS)
}


@pytest.fixture(scope="module", params=NAMES)
def committed(request: pytest.FixtureRequest) -> ProfiledCluster:
    return ProfiledCluster.from_json(json.loads((FOLDER / f"{request.param}.json").read_text()))


def flat_node(time_s: float) -> GpuNode:
    """Every operator and message takes the same time."""
    roofline, curve = Roofline(time_s, inf, inf, 2.0), Curve((1.0, 2.0), (time_s, time_s))
    gpu = ACCELERATORS["a100"]
    return GpuNode(gpu, dict.fromkeys(KINDS, roofline), dict.fromkeys((2, 4, 8), curve), curve)


def test_roofline_by_hand() -> None:
    smooth = Roofline(3.0, 10.0, 100.0, 2.0)
    assert smooth.seconds(40.0, 1200.0) == pytest.approx(13.0)  # 3, 4 and 12 squared
    sharp = replace(smooth, sharpness=200.0)
    assert sharp.seconds([1.0, 400.0, 1.0], [1.0, 1.0, 900.0]) == pytest.approx([3, 40, 9])


def test_work_of_operators_by_hand() -> None:
    """Llama-3-8B's shapes, two ranks, three tokens."""
    flops, nbytes = operator_work("attn_pre_proj", SIZES, True, 2, 3)
    columns = 2048 + 2 * 512  # 16 query heads, 4 of keys, 4 of values
    assert flops == 2 * 3 * 4096 * columns
    assert nbytes == 2 * (4096 * columns + 3 * (4096 + columns))
    flops, nbytes = operator_work("mlp_act", SIZES, True, 2, 3)
    assert (flops, nbytes) == (0, 2 * 3 * (2 * 7168 + 7168))


def write_operators(path: Path) -> None:
    names = [f"time_stats.{kind}.median" for kind in KINDS]
    sizes = "n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size,use_gated_mlp"
    lines = [",".join([*names, sizes, "num_tokens,num_tensor_parallel_workers"])]
    for tp, tokens in product((1, 2, 4, 8), (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)):
        work = [operator_work(kind, SIZES, True, tp, tokens) for kind in KINDS]
        times = [1e3 * float(TRUTH[k].seconds(*w)) for k, w in zip(KINDS, work, strict=True)]
        times[-1] *= tokens > 1  # below the clock's resolution
        lines.append(",".join(map(str, [*times, 32, 8, 4096, 14336, 128256, True, tokens, tp])))
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))


def test_fit_recovers_what_made_the_table(tmp_path: Path) -> None:
    write_operators(tmp_path / "mlp.csv.gz")
    measured = read_operators(tmp_path / "mlp.csv.gz")
    assert len(measured["emb"].tokens) == 32  # without those of 1 token and of 8192
    fitted = fit_operators([measured])
    for kind, truth in TRUTH.items():
        found = fitted[kind]
        assert found.overhead_s == pytest.approx(truth.overhead_s, rel=0.02), kind
        assert found.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.02), kind
        assert found.flops_per_s == pytest.approx(truth.flops_per_s, rel=0.02), kind
    table = residuals(measured, fitted)
    assert max(table[kind]["tp2"]["p90"] for kind in KINDS) < 1.0


def test_residuals_by_hand(tmp_path: Path) -> None:
    """A node a quarter faster than the fit is predicted a quarter too slow."""
    write_operators(tmp_path / "mlp.csv.gz")
    measured = read_operators(tmp_path / "mlp.csv.gz")
    faster = {kind: replace(m, times_s=m.times_s / 1.25) for kind, m in measured.items()}
    table = residuals(faster, TRUTH)
    assert table["layer"]["tp4"] == {"p50": 25.0, "p90": 25.0, "bias": 25.0}


def test_too_few_measurements_are_refused(tmp_path: Path) -> None:
    write_operators(tmp_path / "mlp.csv.gz")
    add = read_operators(tmp_path / "mlp.csv.gz")["add"]
    few = replace(add, flops=add.flops[:7], nbytes=add.nbytes[:7], times_s=add.times_s[:7])
    with pytest.raises(ValueError, match="4 parameters, got 7 measurements"):
        fit_operators([dict.fromkeys(KINDS, few)])
    with pytest.raises(ValueError, match="two sizes"):
        fit_curve([8.0, 8.0], [1.0, 2.0])


def test_messages_take_medians_that_never_fall(tmp_path: Path) -> None:
    path = tmp_path / "network_all_reduce.csv.gz"
    rows = [(1, 2e-3), (1, 9e-3), (1, 3e-3), (1024, 2e-3), (2**20, 8e-3), (2**21, 16e-3)]
    head = "size,num_workers,devices_per_node,time_stats.all_reduce.median"
    lines = [head] + [f"{size},{n},8,{t}" for size, t in rows for n in (2, 8)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    curve = fit_curve(*(x.tolist() for x in read_collective(path, 8, 8)))
    flat = np.sqrt(2e-6 * 3e-6)  # 3 us, then 2 us: both become their geometric mean
    assert curve.seconds([0, 1, 1024]) == pytest.approx(flat)
    assert curve.seconds([2**20, 2**21]) == pytest.approx([8e-6, 16e-6])
    assert curve.seconds(2**22) == pytest.approx(32e-6)  # at the last slope
    assert curve.bytes_per_s == pytest.approx(2**21 / 16e-6)


def test_step_model_by_hand() -> None:
    """Operators of a microsecond each: 10 a layer, or 9 without rotary, and 2 all-reduces."""
    profile = gpu_profile(flat_node(1e-6), "llama-3-8b").profile
    step = profile.step_model(ParallelConfig(2, 2))
    assert step.token_term_s(64) == pytest.approx((32 * 12 + 1 + 1) * 1e-6)  # a border, emb
    assert step.base_s == pytest.approx(HOST_STEP_S + 1e-6)
    context_bytes = 32 * 2 * 4 * 128 * 2  # layers, K and V, heads of a rank, head_dim, bf16
    assert step.per_context_token_s == pytest.approx(context_bytes / (0.7 * 2.0e12))
    assert step.per_pair_s == pytest.approx(4 * 32 * 16 * 128 / (0.6 * 312e12))
    half = 16 * 12  # layers of a stage; the first has the embedding and a border, the last the head
    assert step.stage_share == pytest.approx((half + 2) / (2 * half + 3))
    opt = gpu_profile(flat_node(1e-6), "opt-66b").profile.step_model(ParallelConfig(4, 1))
    assert opt.token_term_s(64) == pytest.approx((64 * 11 + 1) * 1e-6)


def test_kv_capacity_by_hand() -> None:
    """Llama-2-7B on one 80 GB device at 90 %."""
    spec = gpu_profile(flat_node(1e-6), "llama-2-7b").spec
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    weights = 2 * (32 * layer + 2 * 32000 * 4096 + 4096)
    assert rank_weight_bytes(spec.model, ParallelConfig(1, 1), 0) == weights
    block_bytes = 16 * 2 * 32 * 32 * 128 * 2  # tokens, K and V, layers, heads, head_dim, bf16
    assert num_kv_blocks(spec, ParallelConfig(1, 1)) == (72 * 10**9 - weights) // block_bytes


def test_what_does_not_fit_is_absent(committed: ProfiledCluster) -> None:
    degrees = (1, 2, 4, 8)
    possible = {ParallelConfig(t, p) for t in degrees for p in degrees if t * p <= 8}
    model, found = committed.spec.model, set(committed.profile.configs)
    assert (found == possible) == (model.name in ("llama-2-7b", "llama-3-8b"))
    for parallel in possible - found:
        with pytest.raises(InvalidRequestError, match=parallel.key):
            committed.profile.step_model(parallel)
        if model.allows_tp(parallel.tp):
            room = num_kv_blocks(committed.spec, parallel) * committed.spec.block_size
            assert room < model.max_model_len
    if ParallelConfig(1, 1) in possible - found:
        with pytest.raises(InvalidRequestError, match="tp1pp1"):
            SurrogateCluster(committed, dense_deployment([ParallelConfig(1, 1)]))


def test_larger_batches_and_contexts_never_take_less(committed: ProfiledCluster) -> None:
    for step in committed.profile.steps:
        times = [step.step_s(t, 1, 0) for t in (1, 7, 100, 1000, 2048)]
        assert times == sorted(times)
        assert min(step.per_seq_s, step.per_context_token_s, step.per_pair_s) > 0
        assert 1 / step.parallel.pp <= step.stage_share <= 1.0
        assert 1e-3 < step.step_s(1, 1, 500) < 0.1


def test_surrogate_serves_and_planner_plans(committed: ProfiledCluster) -> None:
    parallel = committed.profile.configs[0]
    replicas = [parallel] * (committed.spec.num_devices // parallel.num_devices)
    surrogate = SurrogateCluster(committed, dense_deployment(replicas))
    for i in range(40):
        surrogate.submit(Request(str(i), 0.1 * i, 500, 50))
    surrogate.advance(300.0)
    assert surrogate.snapshot().num_finished == 40
    outcomes = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    prefill = committed.profile.step_model(parallel).step_s(500, 1, 500, 500 * 501 / 2)
    assert min(o.ttft_s for o in outcomes if o.ttft_s) >= prefill * (1 - 1e-9)
    planner = Planner(committed, WorkloadTyping((WorkloadType("chat", 500.0, 200.0),)))
    best = planner.optimum([2.0])
    assert set(best) <= set(committed.profile.configs)
    assert 0 < sum(config.num_devices for config in best) <= committed.spec.num_devices


def test_missing_timings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--profiles", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert "cannot read the timings" in capsys.readouterr().err
