"""StudyConfig: configs/headroom.yaml, the cells of the study, listed before they are run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from envs.adversarial import Adversary
from policies.baselines import HysteresisConfig
from policies.guarded import GuardedConfig
from policies.mpc import MpcConfig
from policies.oracle import BeamConfig, RefineConfig

GENERATED = "generated"  # the embedded generator in place of a trace file
MAIN = ("seen", "unseen")  # roles of the cells that means are taken over
PEAK_LOAD = 0.95  # of the heaviest of them
MORE_TUNING = 3  # times as many windows
Role = Literal["seen", "unseen", "bursts", "misleading"]
Ladder = Literal["full", "rules", "failures", "policy"]


def is_main(role: str, load: float) -> bool:
    """Whether means are taken over cells like that."""
    return role in MAIN and load <= PEAK_LOAD


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Windows(_Section):
    """What rules are tuned on, and what is scored: evenly spaced, never the same days."""

    training_share: float = Field(gt=0, lt=1, description="of the trace's days, or of its time")
    number: int = Field(ge=1, description="windows that are scored")
    tuning: int = Field(ge=1, description="windows that rules are tuned on")
    window_s: float = Field(gt=0, description="seconds of a window")
    peak_s: float = Field(
        gt=0, description="the peak is the highest mean rate of so many seconds of them"
    )


class Cell(_Section):
    """One pool under one load."""

    name: str = Field(pattern=r"^[a-z0-9_.-]+$")
    trace: str = Field(description=f"file in the folder of traces, or {GENERATED!r}")
    profile: str = Field(description="file in configs/profiles")
    devices: int = Field(ge=1)
    load: float = Field(gt=0, description="peak over the best static capacity")
    length_factor: float = Field(default=1.0, gt=0, description="multiplies lengths in tokens")
    lost_devices: int = Field(default=0, ge=0, description="lost a third into each window")
    adversary: Adversary | None = Field(default=None, description="that shapes what is scored")
    ladder: Ladder = Field(
        default="rules",
        description="full: also those that look ahead; failures: keep and those that re-plan; "
        "policy: those that a learned policy is compared with",
    )
    beam: bool = Field(default=False, description="hindsight too, as in the full ladder")
    role: Role = Field(
        default="seen", description="of the traffic, to the policies: whether they trained on it"
    )
    policy: str | None = Field(
        default=None, description="folder of checkpoints, one a seed, in policies/artifacts"
    )
    windows: Windows | None = Field(default=None, description="in place of the study's own")


class Tuning(_Section):
    """What hysteresis, and then the guarded policy over it, may be set to; the best on the tuning
    windows is taken."""

    horizon_s: tuple[float, ...] = Field(min_length=1)
    num_ticks: tuple[int, ...] = Field(min_length=1)
    margin: tuple[float, ...] = Field(min_length=1)
    guarded_margin: tuple[float, ...] = Field(
        default=(),
        description="of the guarded policy; none: as `guarded` says. The first of equals",
    )

    def rules(self) -> list[HysteresisConfig]:
        return [
            HysteresisConfig(horizon_s, ticks, margin)
            for horizon_s in self.horizon_s
            for ticks in self.num_ticks
            for margin in self.margin
        ]

    def guards(self, fixed: GuardedConfig) -> list[GuardedConfig]:
        """The first of those that do equally well is taken."""
        return [replace(fixed, margin=margin) for margin in self.guarded_margin] or [fixed]


class StudyConfig(_Section):
    """One study."""

    report: Literal["headroom", "verdict"] = Field(
        default="headroom", description="what the page made from the results says"
    )
    windows: Windows
    num_types: int = Field(ge=1)
    num_equal: int = Field(ge=1, description="static deployments of equal replicas, simulated")
    num_unequal: int = Field(ge=0, description="and of unequal ones")
    reload_s: float = Field(gt=0, description="seconds a replica is away in a cold reload")
    seed: int = Field(ge=0)
    tuning: Tuning
    mpc: MpcConfig
    beam: BeamConfig
    refine: RefineConfig | None = Field(
        default=None, description="of what is known with hindsight, in cells with a policy"
    )
    guarded: GuardedConfig = Field(
        default=GuardedConfig(), description="of the learned policies of a cell together"
    )
    by: Literal["latency", "utility"] = Field(
        default="latency", description="what rules are tuned by, and the beam seeks"
    )
    times_tuning: int = Field(
        default=1, ge=1, description="as many windows to tune on; where rules start stays"
    )
    beam_deployments: int = Field(ge=1, description="deployments that the beam chooses from")
    cells: tuple[Cell, ...] = Field(min_length=1)

    def windows_of(self, cell: Cell) -> Windows:
        return cell.windows or self.windows

    def with_more_tuning(self) -> Self:
        """The cells of the means, with MORE_TUNING times as many windows to tune on and without
        hindsight."""
        cells = [
            cell.model_copy(update={"beam": False})
            for cell in self.cells
            if cell.policy and is_main(cell.role, cell.load)
        ]
        changed = {"times_tuning": MORE_TUNING, "cells": tuple(cells), "refine": None}
        return self.model_copy(update=changed)


DEFAULT_STUDY = Path(__file__).parents[2] / "configs" / "headroom.yaml"
POLICY_STUDY = DEFAULT_STUDY.with_name("policy.yaml")
