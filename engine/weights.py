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

from engine.architectures import (
    Architecture,
    find_architecture,
    read_sizes,
    tensor_specs,
)
from engine.cluster import ModelSpec, TensorSpec
from engine.errors import CheckpointError
from engine.shards import Shard

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

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
    architecture = find_architecture(config, model_dir / "config.json")
    sizes = read_sizes(architecture, config, model_dir / "config.json")
    tensors = tensor_specs(architecture, config, sizes)
    _check_headers(model_dir, tensors)
    return ModelSpec(
        name=model_dir.resolve().name,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        max_model_len=sizes.max_model_len,
        dtype_bytes=DTYPE_BYTES[dtype or checkpoint_dtype(config, model_dir)],
        tensors=tensors,
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a supported architecture. Raises CheckpointError."""
    if not model_dir.is_dir():
        raise CheckpointError(f"model folder {model_dir} does not exist; give a local folder.")
    path = model_dir / "config.json"
    config = _read_json(path)
    find_architecture(config, path)
    return config


def read_architecture(model_dir: Path) -> Architecture:
    """The table's entry for a checkpoint. Raises CheckpointError."""
    return find_architecture(read_config(model_dir), model_dir / "config.json")


def checkpoint_dtype(config: Mapping[str, Any], model_dir: Path) -> str:
    """Name of the dtype a checkpoint says it has, float32 if it says nothing."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in DTYPE_BYTES:
        raise CheckpointError(
            f"{model_dir / 'config.json'} has dtype {name}; supported are {', '.join(DTYPE_BYTES)}."
        )
    return name


# ------------------------------------------------------------------------------------
# Files


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, by the index or of the single file.

    Raises CheckpointError.
    """
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if not index.is_file():
        _check_no_pickle(model_dir, single)
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


def _check_no_pickle(model_dir: Path, single: Path) -> None:
    pickled = sorted(model_dir.glob("pytorch_model*.bin"))
    if pickled and not single.is_file():
        raise CheckpointError(
            f"{model_dir} has its weights in {pickled[0].name}, a pickle, and no safetensors file; "
            "convert it with transformers: from_pretrained, then save_pretrained."
        )


def stored_name(tensor: str, files: Mapping[str, Path]) -> str:
    """The name under which a checkpoint stores `tensor`: its own, or without "model." when the
    checkpoint was saved from the model without its head. Raises CheckpointError."""
    for name in (tensor, tensor.removeprefix("model.")):
        if name in files:
            return name
    where = next(iter(files.values())).parent if files else "the checkpoint"
    raise CheckpointError(
        f"tensor {tensor} is in no file of {where}; the checkpoint is incomplete."
    )


def _check_headers(model_dir: Path, tensors: tuple[TensorSpec, ...]) -> None:
    files = tensor_files(model_dir)
    headers = {file: _read_header(file) for file in set(files.values())}
    for tensor in tensors:
        name = stored_name(tensor.name, files)
        file = files[name]
        shape = tuple(headers[file][name]["shape"])
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

        name = stored_name(shard.tensor, self._files)
        view = self._file(self._files[name]).get_slice(name)
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
