"""One rank of one replica generation: its part of the model, its KV cache, one step at a time."""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.attention import build_forward_context
from engine.cluster import ParallelConfig
from engine.decode_kernel import compile_for
from engine.kv_cache import KvCache
from engine.layers import AllReduce
from engine.model import ShardedModel
from engine.packing import can_pack, pack
from engine.request import StepInput, StepOutput, TokenLogprobs
from engine.sampler import sample, token_logprobs
from engine.shards import Shard, rank_shards
from engine.weights import CheckpointReader, read_model_spec

PROMPT_ROWS = 64


class ModelRunner:
    """Owns a KV cache and the modules; the weights' storage belongs to whoever calls `bind`, so
    that two generations can share what did not change.

    `dtype` is a torch name such as "float32". `tp_all_reduce` sums a tensor over the tp ranks of
    this rank's stage, in place; None for tp = 1. `num_threads` is how many compute here; `plain`
    keeps to torch's operations.
    """

    def __init__(
        self,
        model_dir: Path,
        parallel: ParallelConfig,
        rank: int,
        num_blocks: int,
        block_size: int,
        dtype: str,
        device: str,
        tp_all_reduce: AllReduce | None = None,
        num_threads: int = 1,
        plain: bool = False,
    ) -> None:
        self.spec = read_model_spec(model_dir, dtype)
        self.spec.check(parallel)
        self.parallel, self.rank, self.device = parallel, rank, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = ShardedModel(
            model_dir, self.spec, parallel, rank, self.dtype, self.device, tp_all_reduce
        )
        self._block_size = block_size
        self.size_kv(num_blocks)
        self._plain, self._parallel = plain, num_threads > 1
        if self.kv.arrays is not None and not plain:
            compile_for(self.kv.arrays[0, 0], self._parallel)

    def size_kv(self, num_blocks: int) -> None:
        """A KV cache of so many blocks, perhaps 0, in place of the one there was."""
        first, stop = self.parallel.layer_range(
            self.parallel.stage_of(self.rank), self.spec.num_layers
        )
        self.kv = KvCache(
            num_layers=stop - first,
            num_blocks=num_blocks,
            block_size=self._block_size,
            num_kv_heads=self.spec.kv_heads_per_rank(self.parallel),
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What `bind` needs, under `Shard.tensor`."""
        return rank_shards(self.spec, self.parallel, self.rank)

    def bind(self, weights: MutableMapping[str, Tensor]) -> None:
        """Use these tensors (this rank's shards) as parameters, without copying them. On the CPU
        those of linear layers are packed first: each takes its plain form's place in `weights`."""
        if self.device.type == "cpu" and not self._plain and can_pack(self.dtype):
            for name in self.model.packable(weights):
                weights[name] = pack(weights[name])
        self.model.bind(weights)

    @torch.inference_mode()
    def execute(self, step: StepInput, hidden: Tensor | None) -> Tensor | StepOutput | None:
        """Run one step through this stage.

        `hidden` [T, hidden_size] comes from the previous stage; None on the first. Returns hidden
        states [T, hidden_size] before the last stage; there, on tp rank 0, the step's output,
        and None on the other tp ranks.
        """
        assert (hidden is None) == self.model.is_first, self.rank
        if hidden is None:
            hidden = torch.tensor(step.token_ids, device=self.device)
        context = build_forward_context(
            step, self.kv, self.model.first_layer, self._plain, self._parallel
        )
        hidden = self.model.forward(hidden, context)
        if not self.model.is_last:
            return hidden
        return self._sample(step, hidden) if self.model.samples else None

    def _sample(self, step: StepInput, hidden: Tensor) -> StepOutput:
        ends = list(accumulate(step.lengths))
        tokens: list[int | None] = [None] * len(ends)
        logprobs = self._prompt_logprobs(step, hidden, ends) if step.prompt_targets else {}
        drawn = [(b, spec) for b, spec in enumerate(step.samples) if spec is not None]
        if not drawn:
            return StepOutput(step.step_id, tokens, logprobs)
        rows = torch.tensor([ends[b] - 1 for b, _ in drawn], device=hidden.device)
        logits = self.model.logits(hidden[rows])
        wanted = [i for i, (_, spec) in enumerate(drawn) if spec.logprobs is not None]
        raw = logits[wanted] if wanted else None  # a copy: penalties change the logits
        ids = sample(logits, [spec for _, spec in drawn], self._plain)
        for (b, _), token in zip(drawn, ids, strict=True):
            tokens[b] = token
        if raw is not None:
            tops = [drawn[i][1].logprobs or 0 for i in wanted]
            own = token_logprobs(raw, [ids[i] for i in wanted], tops)
            for i, found in zip(wanted, own, strict=True):
                logprobs.setdefault(drawn[i][0], []).append(found)
        return StepOutput(step.step_id, tokens, logprobs)

    def _prompt_logprobs(
        self, step: StepInput, hidden: Tensor, ends: list[int]
    ) -> dict[int, list[TokenLogprobs]]:
        """Log probabilities of prompt tokens, PROMPT_ROWS rows of the vocabulary at a time."""
        found: dict[int, list[TokenLogprobs]] = {}
        for b, targets in step.prompt_targets.items():
            first, ids = ends[b] - step.lengths[b], targets.token_ids
            found[b] = []
            for at in range(0, len(ids), PROMPT_ROWS):
                part = ids[at : at + PROMPT_ROWS]
                logits = self.model.logits(hidden[first + at : first + at + len(part)])
                found[b] += token_logprobs(logits, part, [targets.num_top] * len(part))
        return found


def load_weights(model_dir: Path, runner: ModelRunner) -> dict[str, Tensor]:
    """A runner's shards, read from disk in its dtype, on its device."""
    name = str(runner.dtype).removeprefix("torch.")
    with CheckpointReader(model_dir, name) as reader:
        return {shard.tensor: reader.read(shard).to(runner.device) for shard in runner.shards}
