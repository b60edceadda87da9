"""Profiles of GPU nodes: fits, what they rest on, and bounds that no GPU breaks."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.architectures import Sizes
from engine.profile import ProfiledCluster, attention_pairs
from engine.shards import num_kv_blocks, rank_weight_bytes
from envs import fit_gpu
from envs.surrogate.gpu import KINDS, Roofline, fit_curve, fit_roofline, operator_work
from envs.surrogate.gpu_profile import ACCELERATORS, DEGREES, MODELS

SIZES = Sizes(1, 8, 2, 16, 128, 256, 1000, 4096)
MATRIX = Roofline(2e-5, 4e14, 2e12, 3.0)
VECTOR = Roofline(8e-6, np.inf, 1.5e12, 2.0)
PROFILES = [Path(f"configs/profiles/{node}-{m}.json") for node in ACCELERATORS for m in MODELS]


def work(tokens: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    flops, nbytes = zip(
        *(
            operator_work("mlp_up_proj", Sizes(1, 8, 8, 64, w, 4 * w, 1, 1), True, 1, tokens)
            for w in (512, 2048, 8192)
        ),
        strict=True,
    )
    return np.concatenate(flops), np.concatenate(nbytes)


def test_work_of_operators_by_hand() -> None:
    """[t, 128] @ [128, 32 + 2 * 16]: of 8 query heads 2 a rank, of 2 KV heads at least one."""
    flops, nbytes = operator_work("attn_pre_proj", SIZES, True, 4, [3])
    assert flops == pytest.approx(2 * 3 * 128 * 64)
    assert nbytes == pytest.approx(2 * (128 * 64 + 3 * (128 + 64)))
    for gated, columns in ((True, 128), (False, 64)):
        assert operator_work("mlp_up_proj", SIZES, gated, 4, [1])[0] == 2 * 128 * columns
    assert operator_work("add", SIZES, True, 2, [5])[1] == 5 * 2 * 3 * 128


def test_roofline_is_found_again_despite_outliers() -> None:
    rng = np.random.default_rng(1)
    flops, nbytes = work(np.geomspace(1, 4096, 40).round())
    exact = MATRIX.seconds(flops, nbytes)
    noisy = exact * rng.lognormal(0.0, 0.03, len(exact))
    noisy[rng.random(len(exact)) < 0.1] *= 3.0
    found = fit_roofline(flops, nbytes, noisy)
    assert np.abs(found.seconds(flops, nbytes) / exact - 1.0).max() < 0.05
    assert found.flops_per_s == pytest.approx(MATRIX.flops_per_s, rel=0.05)
    assert found.bytes_per_s == pytest.approx(MATRIX.bytes_per_s, rel=0.05)


def test_too_few_or_impossible_measurements_are_refused() -> None:
    ones = np.ones(8)
    for times in (ones[:4], 0.0 * ones):
        with pytest.raises(ValueError, match="4 parameters"):
            fit_roofline(ones[: len(times)], ones[: len(times)], times)
    with pytest.raises(ValueError, match="two sizes"):
        fit_curve([8.0, 8.0], [1.0, 2.0])


def test_curve_never_falls_and_goes_on_at_its_last_slope() -> None:
    sizes = np.geomspace(2e3, 1e8, 200)
    exact = 2e-5 + sizes / 2e11
    noise = np.random.default_rng(2).lognormal(0.0, 0.1, len(sizes))
    curve = fit_curve(sizes.tolist(), (exact * noise).tolist())
    assert np.all(np.diff(curve.seconds(np.geomspace(1e3, 1e9, 500))) >= 0)
    assert np.median(np.abs(curve.seconds(sizes) / exact - 1.0)) < 0.1
    slope = (curve.times_s[-1] - curve.times_s[-2]) / (curve.sizes[-1] - curve.sizes[-2])
    assert curve.seconds(3e8) - curve.seconds(2e8) == pytest.approx(slope * 1e8)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_timings(folder: Path, node: str) -> None:
    """The files of one node as an ideal GPU would have filled them."""
    for model, layers in zip(fit_gpu.MEASURED[node], (2048, 4096), strict=True):
        sizes = Sizes(1, 32, 8, layers // 32, layers, 3 * layers, 32000, 4096)
        rows = []
        for tp in DEGREES:
            for tokens in (1, 16, 128, 512, 1024, 4096):
                row: dict[str, Any] = {
                    "n_head": 32,
                    "n_kv_head": 8,
                    "n_embd": layers,
                    "n_expanded_embd": 3 * layers,
                    "vocab_size": 32000,
                    "use_gated_mlp": True,
                    "num_tokens": tokens,
                    "num_tensor_parallel_workers": tp,
                }
                for kind in KINDS:
                    flops, nbytes = operator_work(kind, sizes, True, tp, tokens)
                    roofline = MATRIX if flops > 0 else VECTOR
                    row[f"time_stats.{kind}.median"] = 1e3 * roofline.seconds(flops, nbytes)
                rows.append(row)
        write(folder / f"compute_{node}_{model}_mlp.csv.gz", rows)
    for kind, counts in (("all_reduce", (2, 4, 8)), ("send_recv", (2,))):
        write(
            folder / f"network_{node}_dgx_{kind}.csv.gz",
            [
                {
                    f"time_stats.{kind}.median": 1e3 * (1e-5 + size / 2e11),
                    "size": size,
                    "num_workers": workers,
                    "devices_per_node": workers,
                }
                for workers in counts
                for size in np.geomspace(2e3, 1e8, 64).round()
            ],
        )


def test_script_finds_an_ideal_gpu(tmp_path: Path) -> None:
    for node in fit_gpu.MEASURED:
        write_timings(tmp_path, node)
    assert fit_gpu.main(["--profiles", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.json"))) == len(PROFILES) + 1
    report = json.loads((tmp_path / "gpu_residuals.json").read_text())
    for parts in report.values():
        for part in ("operators", "left_out"):
            for table in parts[part].values():
                assert all(row["p90"] < 0.01 for row in table["layer"].values())


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_no_committed_profile_outruns_its_gpu(path: Path) -> None:
    """A decode step reads every weight once; a prefill step computes with each of them."""
    cluster = ProfiledCluster.from_json(json.loads(path.read_text()))
    gpu, spec = ACCELERATORS[path.stem.split("-")[0]], cluster.spec
    model, tokens = spec.model, 2048
    assert len({m.parallel for m in cluster.profile.steps}) == len(cluster.profile.steps) > 10
    matrices = sum(int(np.prod(t.shape)) for t in model.tensors if t.layer is not None)
    for steps in cluster.profile.steps:
        parallel = steps.parallel
        shares = [
            rank_weight_bytes(model, parallel, parallel.tp * stage) for stage in range(parallel.pp)
        ]
        embedding = model.vocab_size * model.hidden_size * model.dtype_bytes  # looked up, not read
        assert steps.step_s(1, 1, 1, 1) > (sum(shares) - 2 * embedding) / gpu.bytes_per_s
        pairs = attention_pairs(0, tokens)
        flops = tokens * 2 * matrices / parallel.tp + steps.per_pair_s * pairs * gpu.flops_per_s
        assert steps.step_s(tokens, 1, tokens, pairs) > flops / gpu.flops_per_s
        capacity = num_kv_blocks(spec, parallel) * spec.block_size
        assert capacity >= model.max_model_len
        assert 1.0 / parallel.pp <= steps.stage_share <= 1.0


def test_models_have_the_size_of_their_name() -> None:
    for path in PROFILES[: len(MODELS)]:
        model = ProfiledCluster.from_json(json.loads(path.read_text())).spec.model
        billions = sum(int(np.prod(t.shape)) for t in model.tensors) / 1e9
        assert billions == pytest.approx(float(path.stem.split("-")[-1].rstrip("b")), rel=0.1), path


def test_a_model_left_out_of_the_fit_is_predicted() -> None:
    report = json.loads(Path("configs/profiles/gpu_residuals.json").read_text())
    assert set(report) == set(ACCELERATORS)
    for parts in report.values():
        assert len(parts["left_out"]) == 2
        for table in parts["left_out"].values():
            assert all(row["p50"] < 0.1 for row in table["layer"].values())
