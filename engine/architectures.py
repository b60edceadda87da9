"""The supported architectures, as one table: where transformers keeps what, how large each tensor
is, what tensor parallelism slices, and what is refused. Pure; nothing of it is decided elsewhere.

A layer is described by its linear layers and norms. Their axes have names; an axis that belongs to
attention heads, KV heads or the inner width of the MLP is split over the tp ranks, `hidden` never.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.cluster import TensorSpec
from engine.errors import CheckpointError

Config = Mapping[str, Any]  # config.json
SPLIT_AXES = ("query", "kv", "inner")  # rows of one: sliced along dim 0; columns: along dim 1
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer with weight [rows, columns], by names of axes. `bias` is True or the key of
    config.json that tells."""

    rows: str
    columns: str
    bias: str | bool = False

    @property
    def tp_dim(self) -> int | None:
        """The dimension that tensor parallelism slices; a bias follows along dimension 0 only."""
        if self.rows in SPLIT_AXES:
            return 0
        return 1 if self.columns in SPLIT_AXES else None


@dataclass(frozen=True, slots=True)
class Architecture:
    """How transformers lays out one decoder-only model.

    `decoder` is the path of the module that has the embedding, the layers and the final norm;
    checkpoints whose names lack its first part ("model.") are read as well. `defaults` are
    transformers' values of keys that config.json may lack, `required` are keys whose other values
    are refused.
    """

    linears: Mapping[str, Linear]
    norms: Mapping[str, str]  # of a layer: name -> axis
    decoder: str = "model"
    norm: str = "norm"
    norm_bias: bool = False
    position_offset: int | None = None  # of a learned position embedding; None: rotary
    free_heads: bool = True  # whether config.json may choose head_dim and the KV heads
    head_count: str = ""  # attribute of a layer that counts attention heads, of this rank then
    inner_key: str = "intermediate_size"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rotary(self) -> bool:
        return self.position_offset is None

    @property
    def gated_mlp(self) -> bool:
        """Whether a layer's MLP is down(act(gate x) * (up x))."""
        return "mlp.gate_proj" in self.linears

    @property
    def embedding(self) -> str:
        return f"{self.decoder}.embed_tokens"

    @property
    def positions(self) -> str:
        """The learned position embedding, where there is one."""
        return f"{self.decoder}.embed_positions"

    @property
    def final_norm(self) -> str:
        return f"{self.decoder}.{self.norm}"

    def layer(self, index: int) -> str:
        return f"{self.decoder}.layers.{index}"


# ------------------------------------------------------------------------------------
# The table

_NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}
_HEAD_NORMS = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}


def _attention(qkv_bias: str | bool, out_bias: str | bool, out: str) -> dict[str, Linear]:
    return {
        "self_attn.q_proj": Linear("query", "hidden", qkv_bias),
        "self_attn.k_proj": Linear("kv", "hidden", qkv_bias),
        "self_attn.v_proj": Linear("kv", "hidden", qkv_bias),
        f"self_attn.{out}": Linear("hidden", "query", out_bias),
    }


def _gated_mlp(bias: str | bool = False) -> dict[str, Linear]:
    return {
        "mlp.gate_proj": Linear("inner", "hidden", bias),
        "mlp.up_proj": Linear("inner", "hidden", bias),
        "mlp.down_proj": Linear("hidden", "inner", bias),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        linears=_attention("attention_bias", "attention_bias", "o_proj") | _gated_mlp("mlp_bias"),
        norms=_NORMS,
    ),
    "MistralForCausalLM": Architecture(
        linears=_attention(False, False, "o_proj") | _gated_mlp(),
        norms=_NORMS,
        defaults={"num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": Architecture(
        linears=_attention(True, False, "o_proj") | _gated_mlp(),
        norms=_NORMS,
        defaults={"num_key_value_heads": 32},
    ),
    "Qwen3ForCausalLM": Architecture(
        linears=_attention("attention_bias", "attention_bias", "o_proj") | _gated_mlp(),
        norms=_NORMS | _HEAD_NORMS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "OPTForCausalLM": Architecture(
        linears=_attention("enable_bias", "enable_bias", "out_proj")
        | {
            "fc1": Linear("inner", "hidden", "enable_bias"),
            "fc2": Linear("hidden", "inner", "enable_bias"),
        },
        norms={"self_attn_layer_norm": "hidden", "final_layer_norm": "hidden"},
        decoder="model.decoder",
        norm="final_layer_norm",
        norm_bias=True,
        position_offset=2,
        free_heads=False,
        head_count="self_attn.num_heads",
        inner_key="ffn_dim",
        defaults={"enable_bias": True, "tie_word_embeddings": True},
        required={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
    ),
}


# ------------------------------------------------------------------------------------
# What a config.json means


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the shapes of a model's tensors follow from."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    max_model_len: int  # tokens

    def axis(self, name: str) -> int:
        sizes = {
            "hidden": self.hidden_size,
            "inner": self.inner_size,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
        }
        return sizes[name]


def find_architecture(config: Config, where: object) -> Architecture:
    """The table's entry for a config.json that was read from `where`.

    Raises CheckpointError when the architecture or an option of it is not supported.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where} names architecture {name}, which is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    found = ARCHITECTURES[name]
    for key, only in found.required.items():
        if config.get(key, only) != only:
            raise CheckpointError(
                f"{where} has {key} {config[key]}; of {name}, only {key} {only} is supported."
            )
    _check_projected_embeddings(config, name, where)
    _check_rope(config, where)
    return found


def _check_projected_embeddings(config: Config, name: str, where: object) -> None:
    width, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if width is not None and width != hidden:
        raise CheckpointError(
            f"{where} has word_embed_proj_dim {width} beside hidden_size {hidden}; of {name}, only "
            "models whose embeddings are as wide as their layers are supported."
        )


def _check_rope(config: Config, where: object) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{where} has rope type {kind}, which is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}."
        )


def read_sizes(architecture: Architecture, config: Config, where: object) -> Sizes:
    """Raises CheckpointError when config.json lacks a size."""
    wanted = ("num_hidden_layers", "num_attention_heads", "hidden_size", architecture.inner_key,
              "vocab_size", "max_position_embeddings")  # fmt: skip
    missing = [key for key in wanted if key not in config]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; it is not a complete config.")
    values = {**architecture.defaults, **config} if architecture.free_heads else {}
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return Sizes(
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or hidden // heads),
        hidden_size=hidden,
        inner_size=int(config[architecture.inner_key]),
        vocab_size=int(config["vocab_size"]),
        max_model_len=int(config["max_position_embeddings"]),
    )


def tensor_specs(
    architecture: Architecture, config: Config, sizes: Sizes
) -> tuple[TensorSpec, ...]:
    """Every tensor the model has, in the order a token meets them."""
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    tied = _flag(architecture, config, "tie_word_embeddings")
    specs = [
        TensorSpec(
            f"{architecture.embedding}.weight", (vocab, hidden), "embed+head" if tied else "embed"
        )
    ]
    if architecture.position_offset is not None:
        rows = sizes.max_model_len + architecture.position_offset
        specs.append(TensorSpec(f"{architecture.positions}.weight", (rows, hidden), "embed"))
    for layer in range(sizes.num_layers):
        specs += _layer_specs(architecture, config, sizes, layer)
    for kind in ("weight", "bias") if architecture.norm_bias else ("weight",):
        specs.append(TensorSpec(f"{architecture.final_norm}.{kind}", (hidden,), "norm"))
    if not tied:
        specs.append(TensorSpec("lm_head.weight", (vocab, hidden), "head"))
    return tuple(specs)


def _layer_specs(
    architecture: Architecture, config: Config, sizes: Sizes, layer: int
) -> Iterator[TensorSpec]:
    prefix = architecture.layer(layer)
    for name, axis in architecture.norms.items():
        for kind in ("weight", "bias") if architecture.norm_bias else ("weight",):
            yield TensorSpec(f"{prefix}.{name}.{kind}", (sizes.axis(axis),), "layer", layer)
    for name, linear in architecture.linears.items():
        role = "kv" if linear.rows == "kv" else "layer"
        shape = sizes.axis(linear.rows), sizes.axis(linear.columns)
        yield TensorSpec(f"{prefix}.{name}.weight", shape, role, layer, linear.tp_dim)
        if linear.bias is True or (linear.bias and _flag(architecture, config, linear.bias)):
            dim = 0 if linear.tp_dim == 0 else None
            yield TensorSpec(f"{prefix}.{name}.bias", shape[:1], role, layer, dim)


def _flag(architecture: Architecture, config: Config, key: str) -> bool:
    return bool(config.get(key, architecture.defaults.get(key, False)))
