"""ServingProfile: measured step times per parallel configuration. Pure; JSON in and out."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.cluster import ClusterSpec, ModelSpec, ParallelConfig, TensorSpec
from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
PROFILE_SCHEMA = 4
TIME_FIELDS = ("base_s", "per_token_s", "per_seq_s", "per_context_token_s", "per_pair_s")


def attention_pairs(start: float, tokens: float) -> float:
    """(query token, context token) pairs of `tokens` tokens that follow `start` cached ones: each
    sees those before it and itself, so a decode step of one token has as many as its context."""
    return tokens * (start + (tokens + 1) / 2)


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Step time of one replica configuration that has its devices to itself.

    step_s = base_s + token term + per_seq_s * sequences
             + per_context_token_s * (sum over sequences of their context length after the step)
             + per_pair_s * (sum over sequences of `attention_pairs`)

    The token term is per_token_s * tokens, or, with knots, `token_s` interpolated linearly over
    `token_knots` (ascending token counts): constant before the first, rising by per_token_s a
    token beyond the last.

    The base and the terms of sequences and context are bound by memory, those of tokens and pairs
    by arithmetic: processes that read memory at the same time slow the first down.

    A step is one batch through all stages. `stage_share` is the share of it during which the
    slowest stage is busy (1 for pp=1, about 1/pp when stages overlap): with pp batches in flight
    a replica starts a new one every stage_share * step_s.

    Where `leader_computes`, the thread that starts steps and takes their results computes the first
    stage itself, as on processors: a step that ends meanwhile is known to have when that is done.
    """

    parallel: ParallelConfig
    base_s: float
    per_token_s: float
    per_seq_s: float
    per_context_token_s: float
    per_pair_s: float = 0.0
    token_knots: tuple[int, ...] = ()
    token_s: tuple[float, ...] = ()
    busy_cores: float = 0.0  # host cores that one step in flight keeps busy; 0 on accelerators
    crowding_exponent: float = 1.0  # of what others' `Crowding.slowdown` does to its steps
    stage_share: float = 1.0
    leader_computes: bool = False
    residual_p50: float = 0.0  # median |predicted / measured - 1| over the fitted points

    def __post_init__(self) -> None:
        knots = self.token_knots
        if len(knots) != len(self.token_s) or any(a >= b for a, b in itertools.pairwise(knots)):
            raise InvalidRequestError(
                f"step times of {self.parallel.key} have token_knots {knots} and "
                f"{len(self.token_s)} token_s; expected ascending knots with one time each."
            )

    def step_s(
        self,
        tokens: float,
        sequences: float,
        context_tokens: float,
        pairs: float = 0.0,
        memory: float = 1.0,
    ) -> float:
        """`memory` is how many times as long memory takes."""
        bound_by_memory_s = (
            self.base_s + self.per_seq_s * sequences + self.per_context_token_s * context_tokens
        )
        arithmetic_s = self.token_term_s(tokens) + self.per_pair_s * pairs
        return memory * bound_by_memory_s + arithmetic_s

    def token_term_s(self, tokens: float) -> float:
        return float(self.token_terms_s(np.float64(tokens)))

    def token_terms_s(self, tokens: ArrayLike) -> Floats:
        """The token term of each of many steps, in the shape of `tokens`."""
        number = np.asarray(tokens, np.float64)
        if not self.token_knots:
            return np.asarray(self.per_token_s * number)
        beyond = np.maximum(number - self.token_knots[-1], 0.0)
        inside = np.interp(number, self.token_knots, self.token_s)
        return np.asarray(inside + self.per_token_s * beyond)

    def scaled(self, factor: float) -> StepTimeModel:
        """Every time in it multiplied by `factor`."""
        times = {name: factor * getattr(self, name) for name in TIME_FIELDS}
        return replace(self, token_s=tuple(factor * t for t in self.token_s), **times)

    def linear(self, max_tokens: int) -> StepTimeModel:
        """The same without knots: a straight token term, fitted in relative error to steps of 1 to
        `max_tokens` tokens, equally many at each scale."""
        if not self.token_knots:
            return self
        tokens = np.geomspace(1.0, max(max_tokens, 2), 32)
        times = np.array([max(self.base_s + self.token_term_s(t), 1e-12) for t in tokens])
        slope, base = np.polyfit(tokens, times, 1, w=1.0 / times).tolist()
        return replace(
            self, base_s=max(base, 0.0), per_token_s=max(slope, 0.0), token_knots=(), token_s=()
        )


Knots = tuple[tuple[float, float], ...]  # (busy processors, slowdown)


@dataclass(frozen=True, slots=True)
class Crowding:
    """How replicas that share a host's processors slow one another down, by how many of them
    are kept busy together (`StepTimeModel.busy_cores`). Without knots they share nothing.

    `processors`: how many times as long every step takes, once up to the first knot, linear
    between knots, in proportion to the busy processors beyond the last. `memory`: how many times as
    long, besides, what memory bounds takes in steps that start then; beyond the last knot no more.
    """

    processors: Knots = ()
    memory: Knots = ()

    def __post_init__(self) -> None:
        """Raises InvalidRequestError."""
        for name, knots in (("processors", self.processors), ("memory", self.memory)):
            rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(knots))
            if knots and not (rises and knots[0][0] > 0 and knots[0][1] == 1):
                raise InvalidRequestError(
                    f"the crowding has {name} {knots}; expected pairs of rising busy processors "
                    "and slowdowns, the first slowdown 1."
                )

    def slowdown(self, busy: float) -> float:
        """Of every step."""
        beyond = busy / self.processors[-1][0] if self.processors else 1.0
        return _at(self.processors, busy) * max(1.0, beyond)

    def memory_slowdown(self, busy: float) -> float:
        """Of what memory bounds, besides."""
        return _at(self.memory, busy)


def _at(knots: Knots, busy: float) -> float:
    return float(np.interp(busy, *np.array(knots).T)) if knots else 1.0


@dataclass(frozen=True, slots=True)
class ServingProfile:
    """Everything measured that planner and surrogate read, for one cluster and model."""

    model: str
    device: str  # e.g. "cpu" and what processor
    steps: tuple[StepTimeModel, ...]
    link_bytes_per_s: float
    switch_overhead_s: float  # a switch that moves no byte: groups, verify, commit
    pause_overhead_s: float  # how long affected replicas stand still, but for KV bytes
    crowding: Crowding = Crowding()

    def __hash__(self) -> int:  # equal profiles hash alike; `steps` is long and left to equality
        return hash((self.model, self.device, len(self.steps)))

    def step_model(self, parallel: ParallelConfig) -> StepTimeModel:
        for model in self.steps:
            if model.parallel == parallel:
                return model
        known = ", ".join(m.parallel.key for m in self.steps)
        raise InvalidRequestError(
            f"the serving profile of {self.model} has no step times for {parallel.key}, only for "
            f"{known}; profile that configuration or leave it out."
        )

    @property
    def configs(self) -> tuple[ParallelConfig, ...]:
        return tuple(m.parallel for m in self.steps)

    def to_json(self) -> dict[str, Any]:
        return {"schema": PROFILE_SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ServingProfile:
        if data.get("schema") != PROFILE_SCHEMA:
            raise InvalidRequestError(
                f"serving profile has schema {data.get('schema')!r}, expected {PROFILE_SCHEMA}; "
                "measure it again with this version."
            )
        fields = {k: v for k, v in data.items() if k != "schema"}
        steps = tuple(
            StepTimeModel(
                **s
                | {
                    "parallel": ParallelConfig(**s["parallel"]),
                    "token_knots": tuple(s["token_knots"]),
                    "token_s": tuple(s["token_s"]),
                }
            )
            for s in fields.pop("steps")
        )
        knots = fields.pop("crowding")
        crowding = Crowding(*(tuple(map(tuple, knots[k])) for k in ("processors", "memory")))
        return cls(steps=steps, crowding=crowding, **fields)


def spec_from_json(data: dict[str, Any]) -> ClusterSpec:
    """From what `dataclasses.asdict` makes of it. Raises KeyError and TypeError."""
    fields = dict(data)
    model = dict(fields.pop("model"))
    tensors = [TensorSpec(**(t | {"shape": tuple(t["shape"])})) for t in model["tensors"]]
    return ClusterSpec(model=ModelSpec(**(model | {"tensors": tuple(tensors)})), **fields)


@dataclass(frozen=True, slots=True)
class ProfiledCluster:
    """A cluster's static facts with its measured profile: one JSON file, `--profile`."""

    spec: ClusterSpec
    profile: ServingProfile

    def to_json(self) -> dict[str, Any]:
        return {"spec": asdict(self.spec), "profile": self.profile.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ProfiledCluster:
        """Raises InvalidRequestError when it is not what `to_json` writes."""
        try:
            return cls(spec_from_json(data["spec"]), ServingProfile.from_json(data["profile"]))
        except (KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"this is no profile of a cluster ({error!r}); measure one with the profiler."
            ) from error
