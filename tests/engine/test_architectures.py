"""Every supported architecture against transformers' own model: logits of each way to split it, in
each dtype; and what is refused, in which words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_threads import OPT_SHAPES, SHAPES, VARIANTS, make_checkpoint, paged_logits, plain_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from engine.architectures import ARCHITECTURES
from engine.cluster import ParallelConfig
from engine.errors import CheckpointError
from engine.weights import read_model_spec

# Largest difference of a logit (standard deviation about 1) from transformers' model in float32.
BOUNDS = {"float32": 2e-5, "bfloat16": 0.3, "float16": 0.03}
SPLITS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 4) if tp * pp <= 4]
Checkpoint = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("architectures")

    def made(variant: str) -> Path:
        if not (root / variant).exists():
            make_checkpoint(root / variant, VARIANTS[variant]())
        return root / variant

    return made


def max_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_float32(checkpoint: Checkpoint, variant: str, tp: int, pp: int) -> None:
    """Five layers, which no pp above 1 divides; two KV heads, which four tp ranks share."""
    folder = checkpoint(variant)
    expected = plain_logits(folder)
    error = max_error(paged_logits(folder, ParallelConfig(tp, pp)), expected)
    print(f"{variant} tp{tp}pp{pp}: max error {error:.1e}")
    assert min(logits.std() for logits in expected) > 0.5
    assert error <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_half_precision(checkpoint: Checkpoint, variant: str, dtype: str) -> None:
    """No further from float32 than twice what transformers' own model in that dtype is."""
    folder = checkpoint(variant)
    expected = plain_logits(folder)
    theirs = max_error(plain_logits(folder, getattr(torch, dtype)), expected)
    for tp, pp in ((1, 1), (2, 2), (4, 1)):
        error = max_error(paged_logits(folder, ParallelConfig(tp, pp), dtype), expected)
        print(f"{variant} {dtype} tp{tp}pp{pp}: max error {error:.1e}, transformers {theirs:.1e}")
        assert error <= min(2 * theirs, BOUNDS[dtype])


def test_every_architecture_of_the_table_is_tested() -> None:
    tested = {type(make()).model_type for make in VARIANTS.values()}
    assert {f"{kind}forcausallm" for kind in tested} == {name.lower() for name in ARCHITECTURES}


@pytest.mark.parametrize("variant", ["opt", "llama"])
def test_names_without_their_first_part(
    checkpoint: Checkpoint, variant: str, tmp_path: Path
) -> None:
    """As a model saved without its head has them; with a spare head where embeddings are tied."""
    source = checkpoint(variant)
    tensors = {
        n.removeprefix("model."): t for n, t in load_file(source / "model.safetensors").items()
    }
    if variant == "opt":
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    found = paged_logits(tmp_path, ParallelConfig(2, 2))
    assert max_error(found, plain_logits(source)) <= BOUNDS["float32"]


def test_several_files_with_an_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES, initializer_range=0.12))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = paged_logits(tmp_path, ParallelConfig(2, 2))
    assert max_error(found, plain_logits(tmp_path)) <= BOUNDS["float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel, which is not supported; supported are LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, OPTForCausalLM",
        ),
        ({"do_layer_norm_before": False}, "of OPTForCausalLM, only do_layer_norm_before True is"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 beside hidden_size 64"),
        ({"_remove_final_layer_norm": True}, "only _remove_final_layer_norm False is supported"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    OPTConfig(**OPT_SHAPES, architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_model_spec(tmp_path)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rope_type_that_depends_on_the_batch_is_refused(tmp_path: Path, key: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], key: {"rope_type": "longrope"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rope type longrope, which is not supported"):
        read_model_spec(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    OPTConfig(**OPT_SHAPES, architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        read_model_spec(tmp_path)
