"""SloConfig: configs/slo.yaml, the one place of TTFT and TPOT targets, read and checked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.cluster import SloSpec, UtilitySpec
from engine.config import load_config
from engine.errors import InvalidRequestError

DEFAULT_SLO = Path(__file__).parents[1] / "configs" / "slo.yaml"
CLASSES = ("interactive", "batch")


class Target(BaseModel):
    """What requests of one class may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: float = Field(gt=0, description="seconds to the first token, of an empty prompt")
    ttft_per_prompt_token_s: float = Field(default=0.0, ge=0, description="and for each of it")
    tpot_s: float = Field(gt=0, description="seconds per token after the first, on average")

    @property
    def spec(self) -> SloSpec:
        return SloSpec(self.ttft_s, self.tpot_s, self.ttft_per_prompt_token_s)


class UtilityConfig(BaseModel):
    """What a request is worth in rewards: see `envs.reward`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency: float = Field(ge=0, description="weight of latency, arrival to last token")
    tpot: float = Field(ge=0, description="weight of the time per output token")
    slo: float = Field(ge=0, description="weight of meeting both targets")
    worst_slowdown: float = Field(gt=1, description="latency / reference that is worth -1")
    window_s: float = Field(gt=0, description="over which arrivals are counted")

    @property
    def spec(self) -> UtilitySpec:
        return UtilitySpec(**self.model_dump())

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if abs(self.latency + self.tpot + self.slo - 1.0) > 1e-9:
            raise ValueError(
                f"weights latency, tpot and slo are {self.latency:g}, {self.tpot:g} and "
                f"{self.slo:g}; their sum must be 1"
            )
        return self


class SloConfig(BaseModel):
    """Targets by pool and class, and what counts as meeting them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attainment: float = Field(gt=0, le=1, description="share of a type's requests that must meet")
    unfinished: Literal["worst"] = Field(
        description="what a request that does not finish scores; anything else would pay for "
        "dropping the slow ones"
    )
    utility: UtilityConfig = Field(description="what a request is worth in rewards")
    pools: dict[str, dict[str, Target]] = Field(min_length=1)

    @model_validator(mode="after")
    def _classes(self) -> Self:
        for pool, classes in self.pools.items():
            if set(classes) != set(CLASSES):
                raise ValueError(
                    f"pool {pool!r} has targets for {', '.join(classes) or 'no class'}; expected "
                    f"one each for {' and '.join(CLASSES)}"
                )
        return self

    @property
    def targets(self) -> dict[str, Any]:
        """What SLO rates depend on."""
        return self.model_dump(exclude={"utility"})

    def spec(self, device: str, request_class: str) -> SloSpec:
        """Targets of a class on a profile's device. Raises InvalidRequestError."""
        if request_class not in CLASSES:
            raise InvalidRequestError(
                f"service level {request_class!r} is not known; expected {' or '.join(CLASSES)}."
            )
        for pool, classes in self.pools.items():
            if device.lower().split()[:1] == [pool.lower()]:
                return classes[request_class].spec
        raise InvalidRequestError(
            f"no service levels for device {device!r}, only for {', '.join(self.pools)}; add a "
            f"pool to {DEFAULT_SLO.name}, or give targets in seconds."
        )


@cache
def read_slo(path: Path = DEFAULT_SLO) -> SloConfig:
    """Raises InvalidRequestError in one sentence that names the key."""
    return load_config(SloConfig, path, {})


def find_slo(given: SloSpec | str, device: str) -> SloSpec:
    """Targets as given, or those of a class of configs/slo.yaml. Raises InvalidRequestError."""
    return read_slo().spec(device, given) if isinstance(given, str) else given
