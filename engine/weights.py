"""Checkpoints in Hugging Face format: what tensors a model has, and slices of them from disk.

Importing this loads no torch: the engine process reads headers only, ranks read tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.cluster import ModelSpec, TensorSpec
from engine.errors import CheckpointError
from engine.shards import Shard

if TYPE_CHECKING:
    import torch

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Which dimension of a projection's weight tensor parallelism slices; a bias follows its weight
# only along dimension 0. The same as transformers' base_model_tp_plan (colwise 0, rowwise 1).
TP_DIM = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1,
}  # fmt: skip


def tp_dim(name: str) -> int | None:
    """Dimension of checkpoint tensor `name` that tensor parallelism slices, or None."""
    module, _, kind = name.rpartition(".")
    dim = TP_DIM.get(module.rpartition(".")[2])
    return None if kind == "bias" and dim == 1 else dim


# ------------------------------------------------------------------------------------
# The model as planning sees it


def read_model_spec(model_dir: Path, dtype: str | None = None) -> ModelSpec:
    """Read config.json and the safetensors headers of a checkpoint, and check both.

    `dtype` is the one served, None for the checkpoint's own; bytes follow from it. Raises
    CheckpointError: folder, config.json, a file or a tensor is missing, a file is truncated, a
    tensor has another shape than the config says, or the architecture is not supported.
    """
    model_dir = Path(model_dir)
    config = read_config(model_dir)
    tensors = _tensor_specs(config, model_dir)
    _check_headers(model_dir, tensors)
    heads = int(config["num_attention_heads"])
    return ModelSpec(
        name=model_dir.resolve().name,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=_head_dim(config),
        hidden_size=int(config["hidden_size"]),
        vocab_size=int(config["vocab_size"]),
        max_model_len=int(config["max_position_embeddings"]),
        dtype_bytes=DTYPE_BYTES[dtype or checkpoint_dtype(config, model_dir)],
        tensors=tensors,
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a supported architecture. Raises CheckpointError."""
    if not model_dir.is_dir():
        raise CheckpointError(f"model folder {model_dir} does not exist; give a local folder.")
    path = model_dir / "config.json"
    config = _read_json(path)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        raise CheckpointError(
            f"{path} names architecture {architecture}, which is not supported; supported are "
            f"{', '.join(SUPPORTED)}."
        )
    wanted = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
              "vocab_size", "max_position_embeddings")  # fmt: skip
    missing = [key for key in wanted if key not in config]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it is not a complete config.")
    return config


def checkpoint_dtype(config: Mapping[str, Any], model_dir: Path) -> str:
    """Name of the dtype a checkpoint says it has, float32 if it says nothing."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in DTYPE_BYTES:
        raise CheckpointError(
            f"{model_dir / 'config.json'} has dtype {name}; supported are {', '.join(DTYPE_BYTES)}."
        )
    return name


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _tensor_specs(config: Mapping[str, Any], model_dir: Path) -> tuple[TensorSpec, ...]:
    """Every tensor the architecture has, in the order a token meets them."""
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    tied = bool(config.get("tie_word_embeddings", False))
    embed_role = "embed+head" if tied else "embed"
    specs = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), embed_role)]
    for layer in range(int(config["num_hidden_layers"])):
        for name, shape in _layer_shapes(config).items():
            full = f"model.layers.{layer}.{name}"
            specs.append(TensorSpec(full, shape, "layer", layer, tp_dim(full)))
    specs.append(TensorSpec("model.norm.weight", (hidden,), "norm"))
    if not tied:
        specs.append(TensorSpec("lm_head.weight", (vocab, hidden), "head"))
    return tuple(specs)


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    architecture = config["architectures"][0]
    hidden, inner, head = (
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        _head_dim(config),
    )
    q = int(config["num_attention_heads"]) * head
    kv = int(config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if architecture == "Qwen3ForCausalLM":
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    for name in _biased(config, architecture):
        shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    return shapes


def _biased(config: Mapping[str, Any], architecture: str) -> list[str]:
    """Projections of a layer that have a bias."""
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    if architecture == "Qwen2ForCausalLM":
        return qkv
    if architecture == "MistralForCausalLM":
        return []
    attention = [*qkv, "self_attn.o_proj"] if config.get("attention_bias") else []
    mlp = architecture == "LlamaForCausalLM" and config.get("mlp_bias")
    return attention + (["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if mlp else [])


# ------------------------------------------------------------------------------------
# Files


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, by the index or of the single file.

    Raises CheckpointError.
    """
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if not index.is_file():
        return dict.fromkeys(_read_header(single), single)
    files = {n: model_dir / f for n, f in _read_json(index).get("weight_map", {}).items()}
    for file in sorted(set(files.values())):
        header = _read_header(file)
        absent = [name for name, where in files.items() if where == file and name not in header]
        if absent:
            raise CheckpointError(
                f"{file} lacks tensor {absent[0]}, which {index.name} says it has."
            )
    return files


def _check_headers(model_dir: Path, tensors: tuple[TensorSpec, ...]) -> None:
    files = tensor_files(model_dir)
    headers = {file: _read_header(file) for file in set(files.values())}
    for tensor in tensors:
        if tensor.name not in files:
            raise CheckpointError(
                f"tensor {tensor.name} is in no file of {model_dir}; the checkpoint is incomplete."
            )
        file = files[tensor.name]
        shape = tuple(headers[file][tensor.name]["shape"])
        if shape != tensor.shape:
            raise CheckpointError(
                f"tensor {tensor.name} in {file} has shape {shape}, config.json implies "
                f"{tensor.shape}; config and weights are of different models."
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object.")
    return data


def _read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file: name -> dtype, shape, data_offsets. The size is checked."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the checkpoint lacks this file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header ({size} bytes).")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has no valid safetensors header: {error}.") from error
    header.pop("__metadata__", None)
    wanted = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if size < wanted:
        raise CheckpointError(f"{path} is truncated: {size} bytes, its header says {wanted}.")
    return header


class CheckpointReader:
    """Reads shards of a checkpoint, and only their bytes. Owns the open files; close it.

    `dtype` is what tensors are returned in, None for the checkpoint's own.
    """

    def __init__(self, model_dir: Path, dtype: str | None = None) -> None:
        self._files = tensor_files(Path(model_dir))
        self._dtype = dtype
        self._open: dict[Path, Any] = {}

    def read(self, shard: Shard) -> torch.Tensor:
        """The interval of a tensor that `shard` names, contiguous, in its own memory."""
        import torch

        if shard.tensor not in self._files:
            raise CheckpointError(f"tensor {shard.tensor} is in no file of the checkpoint.")
        view = self._file(self._files[shard.tensor]).get_slice(shard.tensor)
        interval = slice(shard.start, shard.stop)
        index = (slice(None),) * (shard.dim or 0) + (
            interval if shard.dim is not None else slice(None),
        )
        tensor: torch.Tensor = view[index]
        dtype = tensor.dtype if self._dtype is None else getattr(torch, self._dtype)
        # never a view of the mapped file: the file may be replaced while the tensor is served
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format).copy_(
            tensor
        )

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path]

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load_shard(model_dir: Path, shard: Shard, dtype: str | None = None) -> torch.Tensor:
    """One shard, opening and closing the checkpoint for it."""
    with CheckpointReader(model_dir, dtype) as reader:
        return reader.read(shard)
