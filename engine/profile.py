"""ServingProfile: measured step times per parallel configuration. Pure; JSON in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.cluster import ClusterSpec, ModelSpec, ParallelConfig, TensorSpec
from engine.errors import InvalidRequestError

PROFILE_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Linear step time of one replica configuration, measured with the whole pool busy.

    step_s = base_s + per_token_s * tokens + per_seq_s * sequences
             + per_context_token_s * (sum over sequences of their context length)

    A step is one batch through all stages. `stage_share` is the share of it during which the
    slowest stage is busy (1 for pp=1, about 1/pp when stages overlap): with pp batches in flight
    a replica starts a new one every stage_share * step_s.
    """

    parallel: ParallelConfig
    base_s: float
    per_token_s: float
    per_seq_s: float
    per_context_token_s: float
    stage_share: float = 1.0
    residual_p50: float = 0.0  # median |predicted / measured - 1| over the fitted points

    def step_s(self, tokens: float, sequences: float, context_tokens: float) -> float:
        return (
            self.base_s
            + self.per_token_s * tokens
            + self.per_seq_s * sequences
            + self.per_context_token_s * context_tokens
        )


@dataclass(frozen=True, slots=True)
class ServingProfile:
    """Everything measured that planner and surrogate read, for one cluster and model."""

    model: str
    device: str  # e.g. "cpu" and what processor
    steps: tuple[StepTimeModel, ...]
    link_bytes_per_s: float
    switch_overhead_s: float  # a switch that moves no byte: groups, verify, commit
    pause_overhead_s: float  # how long affected replicas stand still when no KV moves

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
            StepTimeModel(**(s | {"parallel": ParallelConfig(**s["parallel"])}))
            for s in fields.pop("steps")
        )
        return cls(steps=steps, **fields)


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
            fields = dict(data["spec"])
            model = dict(fields.pop("model"))
            tensors = [TensorSpec(**(t | {"shape": tuple(t["shape"])})) for t in model["tensors"]]
            spec = ClusterSpec(model=ModelSpec(**(model | {"tensors": tuple(tensors)})), **fields)
            return cls(spec, ServingProfile.from_json(data["profile"]))
        except (KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"this is no profile of a cluster ({error!r}); measure one with the profiler."
            ) from error
