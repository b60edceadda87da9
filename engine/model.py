"""Any supported transformers decoder as one rank of a replica: its stage's layers, its tp slices.

The modules are transformers' own, built on the meta device and found by the table of
`engine.architectures`; linear layers are replaced by this rank's slice, the loop over layers is
ours, and parameters are bound from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from engine.architectures import Architecture
from engine.attention import ATTENTION_NAME, ForwardContext, paged_attention
from engine.cluster import ModelSpec, ParallelConfig
from engine.layers import AllReduce, GatedMlp, ShardedLinear
from engine.shards import rank_shards
from engine.weights import read_architecture

AttentionInterface.register(ATTENTION_NAME, paged_attention)


class ShardedModel:
    """The part of a decoder that rank `rank` holds. Owns modules, not weights: `bind` gives those.

    `tp_all_reduce` must be given for tp > 1; each layer calls it twice.
    """

    def __init__(
        self,
        model_dir: Path,
        spec: ModelSpec,
        parallel: ParallelConfig,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        tp_all_reduce: AllReduce | None = None,
    ) -> None:
        assert parallel.tp == 1 or tp_all_reduce is not None, parallel
        self.stage = parallel.stage_of(rank)
        self.is_first = self.stage == 0
        self.is_last = self.stage == parallel.pp - 1
        self.samples = self.is_last and parallel.tp_rank_of(rank) == 0
        self._names = read_architecture(model_dir)
        built = _build_on_meta(model_dir, dtype)
        decoder = built.get_submodule(self._names.decoder)
        self.first_layer, stop = parallel.layer_range(self.stage, len(decoder.layers))
        self._layers: list[nn.Module] = list(decoder.layers[self.first_layer : stop])
        self._rotary: Any = _build_rotary(decoder, device) if self._names.rotary else None
        self._embed: nn.Module | None = decoder.embed_tokens if self.is_first else None
        learned = self.is_first and not self._names.rotary
        self._positions: nn.Module | None = decoder.embed_positions if learned else None
        self._norm: nn.Module | None = (
            decoder.get_submodule(self._names.norm) if self.is_last else None
        )
        self._head = _replace(built.lm_head, dtype) if self.samples else None
        widths = _shard_widths(spec, parallel, rank)
        for name, layer in self._named_layers().items():
            _slice_linears(layer, name, self._names, widths, dtype, tp_all_reduce)
            _count_own_heads(layer, self._names, spec.num_heads // parallel.tp)
            if self._names.gated_mlp and built.config.hidden_act == "silu":
                layer.mlp = GatedMlp(layer.mlp)

    def _named_layers(self) -> dict[str, nn.Module]:
        return {self._names.layer(self.first_layer + i): m for i, m in enumerate(self._layers)}

    def _owners(self, tied: bool) -> dict[str, nn.Module]:
        """Checkpoint prefix -> module. A tied head answers to the embedding's name."""
        named = {
            self._names.embedding: self._embed,
            self._names.positions: self._positions,
            self._names.final_norm: self._norm,
        }
        if not tied:
            named["lm_head"] = self._head
        others = {name: module for name, module in named.items() if module is not None}
        return self._named_layers() | others

    def packable(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Names of the weights that only linear layers read; a tied head's is an embedding too."""
        return [
            ".".join(filter(None, (prefix, name, "weight")))  # the head is a linear layer itself
            for prefix, owner in self._owners(self._is_tied(weights)).items()
            for name, module in owner.named_modules()
            if isinstance(module, ShardedLinear)
        ]

    def _is_tied(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether this rank's head is the embedding."""
        return self._head is not None and "lm_head.weight" not in weights

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Use these tensors as parameters, without copying: their storage stays the caller's.

        `weights` are this rank's shards under their checkpoint names; none may be missing.
        """
        tied = self._is_tied(weights)
        for prefix, owner in self._owners(tied).items():
            for name, parameter in list(owner.named_parameters()):
                _bind_parameter(owner, name, weights[f"{prefix}.{name}"], parameter)
        if tied:
            assert self._head is not None
            embed = weights[f"{self._names.embedding}.weight"]
            _bind_parameter(self._head, "weight", embed, self._head.weight)

    def unbind(self) -> None:
        """Let go of all weights, so that their storage is free once its owner lets go too. Shapes
        stay: the model can be bound again."""
        for owner in self._owners(tied=False).values():
            for name, old in list(owner.named_parameters()):
                empty = torch.empty(old.shape, dtype=old.dtype, device="meta")
                _bind_parameter(owner, name, empty, old)

    def forward(self, inputs: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [T, hidden] after this stage's layers, before the final norm.

        `inputs` are token ids [T] on the first stage, else the previous stage's hidden states.
        """
        hidden = self._embed(inputs) if self._embed is not None else inputs
        hidden = hidden.unsqueeze(0)
        positions = context.positions.unsqueeze(0)
        if self._positions is not None:
            hidden = hidden + self._positions(None, position_ids=positions)
        # a layer without rotary embedding takes no notice of None
        rotary = None if self._rotary is None else self._rotary(hidden, position_ids=positions)
        for layer in self._layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                use_cache=False,
                forward_context=context,
            )
        return hidden.squeeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab] in float32 of hidden states [n, hidden]; on the rank that samples."""
        assert self._norm is not None, "only the last stage has the final norm"
        assert self._head is not None, "only the last stage's tp rank 0 has the head"
        logits: Tensor = self._head(self._norm(hidden))
        return logits.float()


def _build_on_meta(model_dir: Path, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True)
    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model.eval().requires_grad_(False)


def _build_rotary(decoder: Any, device: torch.device | str) -> Any:
    """Its buffers are computed, not stored in checkpoints: what the meta device left is rebuilt."""
    with torch.device(device):
        return type(decoder.rotary_emb)(config=decoder.config)


def _shard_widths(spec: ModelSpec, parallel: ParallelConfig, rank: int) -> dict[str, int]:
    """Tensor -> length of this rank's shard along the dimension that is sliced."""
    shards = rank_shards(spec, parallel, rank)
    return {s.tensor: s.stop - s.start for s in shards if s.dim is not None}


def _slice_linears(
    layer: nn.Module,
    prefix: str,
    names: Architecture,
    widths: Mapping[str, int],
    dtype: torch.dtype,
    all_reduce: AllReduce | None,
) -> None:
    """Replace the projections of the layer called `prefix` by meta-device ones of this rank's
    shape."""
    for name, axes in names.linears.items():
        path, _, leaf = name.rpartition(".")
        whole: Any = layer.get_submodule(name)
        width = widths.get(f"{prefix}.{name}.weight")
        match axes.tp_dim:
            case 0:
                narrow = _replace(whole, dtype, rows=width)
            case 1:
                narrow = _replace(whole, dtype, columns=width, all_reduce=all_reduce)
            case _:
                narrow = _replace(whole, dtype)
        setattr(layer.get_submodule(path), leaf, narrow)


def _replace(
    whole: nn.Linear,
    dtype: torch.dtype,
    columns: int | None = None,
    rows: int | None = None,
    all_reduce: AllReduce | None = None,
) -> ShardedLinear:
    """On the meta device; sizes that are not given are the whole layer's."""
    has_bias = whole.bias is not None
    with torch.device("meta"):
        narrow = ShardedLinear(
            columns or whole.in_features, rows or whole.out_features, has_bias, all_reduce
        )
    return narrow.to(dtype).requires_grad_(False)


def _count_own_heads(layer: nn.Module, names: Architecture, num_heads: int) -> None:
    """Most layers see from a projection how many heads they have; OPT's are told."""
    path, _, attribute = names.head_count.rpartition(".")
    if attribute:
        setattr(layer.get_submodule(path), attribute, num_heads)


def _bind_parameter(owner: nn.Module, name: str, tensor: Tensor, old: Tensor) -> None:
    assert tensor.shape == old.shape, (name, tuple(tensor.shape), tuple(old.shape))
    assert tensor.dtype == old.dtype, (name, tensor.dtype, old.dtype)
    path, _, leaf = name.rpartition(".")
    setattr(owner.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
