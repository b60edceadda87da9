"""From a measured serving profile to the flat coefficients that the surrogate kernel reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ParallelConfig
from engine.profile import ServingProfile

COEFFICIENTS = ("base_s", "per_token_s", "per_seq_s", "per_context_token_s", "stage_share")


def step_coefficients(profile: ServingProfile) -> dict[ParallelConfig, NDArray[np.float64]]:
    """[5] numbers per configuration, in the order of `COEFFICIENTS` (`StepTimeModel`)."""
    return {
        model.parallel: np.array([getattr(model, name) for name in COEFFICIENTS])
        for model in profile.steps
    }
