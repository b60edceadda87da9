import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

from engine.architectures import ARCHITECTURES
from engine.cluster import ParallelConfig
from engine.errors import CheckpointError
from engine.shards import Shard, rank_shards
from engine.tiny_model import cached_tiny_model
from engine.weights import CheckpointReader, load_shard, read_model_spec

CONFIGS = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "OPTForCausalLM": OPTConfig,
}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
    "ffn_dim": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_tiny_model(tmp_path_factory.getbasetemp())


def make_checkpoint(folder: Path, architecture: str, **changes: object) -> Path:
    """A saved random model of transformers' own, so that names and shapes are theirs."""
    from transformers import AutoModelForCausalLM

    config = CONFIGS[architecture](**SMALL, **changes)
    config.architectures = [architecture]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.base_model_tp_plan])
def test_tp_dims_agree_with_transformers_plan(name: str) -> None:
    plan = {"colwise": 0, "rowwise": 1}
    theirs = {
        pattern.removeprefix("layers.*."): plan[how]
        for pattern, how in CONFIGS[name].base_model_tp_plan.items()
        if how in plan
    }
    assert {n: linear.tp_dim for n, linear in ARCHITECTURES[name].linears.items()} == theirs


def test_tp_dims_of_tensors(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "OPTForCausalLM")
    dims = {
        t.name.removeprefix("model.decoder."): t.tp_dim for t in read_model_spec(folder).tensors
    }
    sliced = {n.removeprefix("layers.1."): dim for n, dim in dims.items() if dim is not None}
    assert {n: dim for n, dim in sliced.items() if not n.startswith("layers.0.")} == {
        "self_attn.q_proj.weight": 0, "self_attn.q_proj.bias": 0,
        "self_attn.k_proj.weight": 0, "self_attn.k_proj.bias": 0,
        "self_attn.v_proj.weight": 0, "self_attn.v_proj.bias": 0,
        "self_attn.out_proj.weight": 1, "fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {"attention_bias": True}),
        ("OPTForCausalLM", {}),
        ("OPTForCausalLM", {"enable_bias": False, "tie_word_embeddings": False}),
    ],
)
def test_the_spec_names_exactly_the_checkpoints_tensors(
    architecture: str, changes: dict[str, bool], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", architecture, **changes)
    spec = read_model_spec(folder)
    stored = load_file(folder / "model.safetensors")
    assert {t.name: t.shape for t in spec.tensors} == {n: tuple(t.shape) for n, t in stored.items()}
    heads = (4, 4) if architecture == "OPTForCausalLM" else (4, 2)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (2, *heads, 8)
    assert (spec.vocab_size, spec.max_model_len, spec.dtype_bytes) == (64, 128, 4)
    roles = {t.name: t.role for t in spec.tensors if t.layer is None}
    tied = changes.get("tie_word_embeddings", architecture == "OPTForCausalLM")
    embedding = f"{ARCHITECTURES[architecture].embedding}.weight"
    assert roles.pop(embedding) == ("embed+head" if tied else "embed")
    assert ("lm_head.weight" in roles) is not tied
    assert {n: r for n, r in roles.items() if "norm" not in n and n != "lm_head.weight"} == (
        {"model.decoder.embed_positions.weight": "embed"} if heads == (4, 4) else {}
    )
    layers = [t for t in spec.tensors if t.layer is not None]
    assert {t.name.split(".")[-2] for t in layers if t.role == "kv"} == {"k_proj", "v_proj"}
    assert all(t.layer == int(re.findall(r"layers\.(\d+)\.", t.name)[0]) for t in layers)


@pytest.mark.parametrize("parallel", [ParallelConfig(1, 1), ParallelConfig(2, 2)])
def test_shards_of_all_ranks_make_up_the_checkpoint(tiny: Path, parallel: ParallelConfig) -> None:
    spec = read_model_spec(tiny)
    stored = load_file(tiny / "model.safetensors")
    covered = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in stored.items()}
    with CheckpointReader(tiny) as reader:
        for rank in range(parallel.num_devices):
            for shard in rank_shards(spec, parallel, rank):
                whole, part = stored[shard.tensor], reader.read(shard)
                interval = (shard.start, shard.stop - shard.start)
                expected = whole if shard.dim is None else whole.narrow(shard.dim, *interval)
                assert torch.equal(part, expected)
                assert part.is_contiguous()
                assert part.nbytes == shard.nbytes
                seen = covered[shard.tensor]
                (seen if shard.dim is None else seen.narrow(shard.dim, *interval)).fill_(True)
    assert all(seen.all() for seen in covered.values())


def test_dtype_is_cast_and_counted(tiny: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    part = load_shard(tiny, Shard(name, 1, 176, 352, 0), "bfloat16")
    assert (part.dtype, tuple(part.shape)) == (torch.bfloat16, (256, 176))
    assert read_model_spec(tiny, "bfloat16").dtype_bytes == 2


def test_files_with_an_index(tiny: Path, tmp_path: Path) -> None:
    folder = split_checkpoint(tiny, tmp_path / "m")
    assert read_model_spec(folder).tensors == read_model_spec(tiny).tensors
    shard = Shard("lm_head.weight", None, 0, 320, 0)
    assert torch.equal(load_shard(folder, shard), load_shard(tiny, shard))


def split_checkpoint(source: Path, folder: Path) -> Path:
    """The same checkpoint in two files with an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = ["a.safetensors", "b.safetensors"]
    weight_map = {t: names[i % 2] for i, t in enumerate(tensors)}
    for file in names:
        save_file({t: v for t, v in tensors.items() if weight_map[t] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def damage(folder: Path, how: str) -> None:
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    weights = folder / "model.safetensors"
    match how:
        case "no config":
            config_path.unlink()
        case "bad json":
            config_path.write_text("{")
        case "architecture":
            config_path.write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
        case "incomplete config":
            config_path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "truncated header":
            weights.write_bytes(weights.read_bytes()[:100])
        case "empty":
            weights.write_bytes(b"")
        case "tensor":
            tensors = load_file(weights)
            del tensors["model.norm.weight"]
            save_file(tensors, weights)
        case "shape":
            config_path.write_text(json.dumps(config | {"vocab_size": 321}))
        case "dtype":
            config_path.write_text(json.dumps(config | {"torch_dtype": "int8"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"config\.json does not exist"),
        ("bad json", r"config\.json is not valid JSON"),
        ("architecture", "GPT2LMHeadModel, which is not supported; supported are LlamaForCausalLM"),
        ("incomplete config", r"config\.json lacks num_hidden_layers"),
        ("no weights", r"model\.safetensors does not exist"),
        ("truncated", r"model\.safetensors is truncated: 24273791 bytes"),
        ("truncated header", r"model\.safetensors is truncated inside its header"),
        ("empty", r"model\.safetensors is truncated inside its header"),
        ("tensor", r"tensor model\.norm\.weight is in no file"),
        ("shape", r"embed_tokens\.weight in .* has shape \(320, 256\).*\(321, 256\)"),
        ("dtype", "has dtype int8"),
    ],
)
def test_damage_is_named_in_one_sentence(
    how: str, message: str, tiny: Path, tmp_path: Path
) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_the_index_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = split_checkpoint(tiny, tmp_path / "m")
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not exist"):
        read_model_spec(folder)
    with pytest.raises(CheckpointError, match="does not exist; give a local folder"):
        read_model_spec(tmp_path / "nowhere")


def test_reading_headers_needs_no_torch(tiny: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.weights import read_model_spec\n"
        "read_model_spec(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True, timeout=60)
