"""Serving profiles of GPU nodes, from fitted operators and a stated roofline for attention. Pure.

Measured and fitted: the operators of a layer outside attention, all-reduce, send/recv. Assumed: the
constants of this module, each with its source. See docs/gpu-profiles.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.architectures import Architecture, Sizes, find_architecture, read_sizes, tensor_specs
from engine.cluster import ClusterSpec, ModelSpec, ParallelConfig
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel
from engine.shards import fits
from envs.surrogate.gpu import (
    BF16_BYTES,
    Curve,
    Floats,
    Roofline,
    matrix_work,
    operator_work,
)

NUM_DEVICES = 8
DEGREES = (1, 2, 4, 8)  # of tensor parallelism, as measured
MEMORY_UTILISATION = 0.9  # of device memory for weights and KV cache; vLLM's default
BLOCK_SIZE = 16  # tokens; vLLM's default
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
HOST_STEP_S = 1e-3  # scheduling, launching, sampling; our guess, nothing measured
SWITCH_OVERHEAD_S = 1.0  # process groups, verification, commit; our guess, nothing measured
PAUSE_OVERHEAD_S = 0.05  # our guess, nothing measured
TOKEN_KNOTS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
SHARE_TOKENS = 256  # of the step at which the slowest stage is looked for
LAYER_OPERATORS = (  # kind, times per layer
    ("input_layernorm", 1),
    ("attn_pre_proj", 1),
    ("attn_rope", 1),
    ("attn_post_proj", 1),
    ("post_attention_layernorm", 1),
    ("mlp_up_proj", 1),
    ("mlp_act", 1),
    ("mlp_down_proj", 1),
    ("add", 2),
)
ALL_REDUCES_PER_LAYER = 2


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU's data sheet, and how much of it attention kernels attain."""

    name: str
    flops_per_s: float  # bf16, dense
    bytes_per_s: float  # of its memory
    memory_bytes: int
    prefill_efficiency: float  # share of flops_per_s in prefill attention
    decode_efficiency: float  # share of bytes_per_s in decode attention


# Data sheets: NVIDIA H100 SXM5 80 GB, NVIDIA A100 SXM4 80 GB. Prefill: FlashAttention-2 attains 50
# to 73 % of an A100's peak (arXiv 2307.08691) and about 35 % of an H100's (arXiv 2407.08608).
# Decode: our guess of what a paged kernel attains, nothing measured.
ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM 80GB", 989e12, 3.35e12, 80 * 10**9, 0.35, 0.7),
    "a100": Accelerator("NVIDIA A100 SXM 80GB", 312e12, 2.0e12, 80 * 10**9, 0.6, 0.7),
}


def _llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, length: int
) -> Any:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": length,
    }


MODELS: dict[str, dict[str, Any]] = {  # as in their config.json
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256, 8192),
    "llama-30b": _llama(6656, 60, 52, 52, 17920, 32000, 2048),
    "opt-66b": {
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 9216,
        "num_hidden_layers": 64,
        "num_attention_heads": 72,
        "ffn_dim": 36864,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
}


@dataclass(frozen=True, slots=True)
class GpuNode:
    """What was fitted on one kind of node."""

    accelerator: Accelerator
    operators: Mapping[str, Roofline]  # kind -> time
    all_reduce: Mapping[int, Curve]  # tp -> time
    send_recv: Curve


@dataclass(frozen=True, slots=True)
class _Timed:
    """One model on one node: seconds by number of tokens."""

    node: GpuNode
    architecture: Architecture
    sizes: Sizes

    def _operator_s(self, kind: str, tp: int, tokens: Floats) -> Floats:
        work = operator_work(kind, self.sizes, self.architecture.gated_mlp, tp, tokens)
        return self.node.operators[kind].seconds(*work)

    def layer_s(self, tp: int, tokens: Floats) -> Floats:
        """Outside attention, with all-reduces."""
        total = np.zeros_like(tokens)
        for kind, times in LAYER_OPERATORS:
            if kind != "attn_rope" or self.architecture.rotary:
                total += times * self._operator_s(kind, tp, tokens)
        if tp > 1:
            message = BF16_BYTES * self.sizes.hidden_size * tokens
            total += ALL_REDUCES_PER_LAYER * self.node.all_reduce[tp].seconds(message)
        return total

    def border_s(self, tokens: Floats) -> Floats:
        """From one stage to the next."""
        return self.node.send_recv.seconds(BF16_BYTES * self.sizes.hidden_size * tokens)

    def embed_s(self, tokens: Floats) -> Floats:
        return self._operator_s("emb", 1, tokens)

    def head_s(self, sequences: float) -> float:
        """Logits, on one rank as in this engine, at the speed of the widest measured matrix."""
        work = matrix_work(self.sizes.hidden_size, self.sizes.vocab_size, sequences)
        return float(self.node.operators["mlp_up_proj"].seconds(*work))

    def step_model(self, model: ModelSpec, parallel: ParallelConfig) -> StepTimeModel:
        tp, layers, gpu = parallel.tp, self.sizes.num_layers, self.node.accelerator
        knots = np.array(TOKEN_KNOTS, np.float64)
        layer_s, border_s = self.layer_s(tp, knots), self.border_s(knots)
        token_s = layers * layer_s + (parallel.pp - 1) * border_s + self.embed_s(knots)
        head_s = self.head_s(1)
        pair_flops = 4 * layers * self.sizes.num_heads * self.sizes.head_dim / tp
        kv_bytes = model.kv_bytes_per_token(layers, model.kv_heads_per_rank(parallel))
        return StepTimeModel(
            parallel,
            base_s=HOST_STEP_S + head_s,
            per_token_s=float((token_s[-1] - token_s[-2]) / (knots[-1] - knots[-2])),
            per_seq_s=(self.head_s(MAX_NUM_SEQS) - head_s) / (MAX_NUM_SEQS - 1),
            per_context_token_s=kv_bytes / (gpu.decode_efficiency * gpu.bytes_per_s),
            per_pair_s=pair_flops / (gpu.prefill_efficiency * gpu.flops_per_s),
            token_knots=TOKEN_KNOTS,
            token_s=tuple(token_s.tolist()),
            stage_share=self._stage_share(parallel),
        )

    def _stage_share(self, parallel: ParallelConfig) -> float:
        """Of the slowest stage, in a step of `SHARE_TOKENS` tokens, attention left out."""
        tokens = np.array([float(SHARE_TOKENS)])
        layer_s, border_s = self.layer_s(parallel.tp, tokens)[0], self.border_s(tokens)[0]
        stages = []
        for stage in range(parallel.pp):
            first, last = parallel.layer_range(stage, self.sizes.num_layers)
            stages.append((last - first) * layer_s + (border_s if stage < parallel.pp - 1 else 0.0))
        stages[0] += self.embed_s(tokens)[0]
        stages[-1] += self.head_s(SHARE_TOKENS)
        return float(max(stages) / sum(stages))


def gpu_profile(node: GpuNode, name: str) -> ProfiledCluster:
    """An 8-GPU node that serves `MODELS[name]`, in every (tp, pp) that fits it."""
    config = MODELS[name]
    architecture = find_architecture(config, name)
    sizes = read_sizes(architecture, config, name)
    model = ModelSpec(
        name,
        sizes.num_layers,
        sizes.num_heads,
        sizes.num_kv_heads,
        sizes.head_dim,
        sizes.hidden_size,
        sizes.vocab_size,
        sizes.max_model_len,
        BF16_BYTES,
        tensor_specs(architecture, config, sizes),
    )
    memory = node.accelerator.memory_bytes
    usable, link = int(MEMORY_UTILISATION * memory), node.send_recv.bytes_per_s
    spec = ClusterSpec(
        NUM_DEVICES,
        NUM_DEVICES,
        usable,
        link,
        BLOCK_SIZE,
        model,
        MAX_NUM_SEQS,
        MAX_NUM_BATCHED_TOKENS,
        switch_headroom_bytes=memory - usable,
    )
    timed = _Timed(node, architecture, sizes)
    configs = (ParallelConfig(tp, pp) for tp in DEGREES for pp in range(1, NUM_DEVICES // tp + 1))
    steps = tuple(timed.step_model(model, c) for c in configs if fits(spec, c))
    device = f"{node.accelerator.name}, fitted"
    profile = ServingProfile(name, device, steps, link, SWITCH_OVERHEAD_S, PAUSE_OVERHEAD_S)
    return ProfiledCluster(spec, profile)
