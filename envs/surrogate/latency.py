"""Step times for the surrogate kernel: from a measured or fitted profile, or plainly linear.

Measured profiles come from `engine.profiler`, fitted ones of accelerators from `envs.fit_gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import TIME_FIELDS, ServingProfile, StepTimeModel
from envs.surrogate import layout


def check_knots(what: str, knots: int) -> None:
    """Raises InvalidRequestError for more than the kernel has room for; `what` ends in a verb."""
    if knots > layout.MAX_KNOTS:
        raise InvalidRequestError(
            f"{what} {knots} knots, the surrogate takes at most {layout.MAX_KNOTS}; fit them with "
            "fewer."
        )


def step_records(
    profile: ServingProfile, factor: float = 1.0
) -> dict[ParallelConfig, NDArray[Any]]:
    """A record `layout.STEP` per configuration, every time in it multiplied by `factor`.

    Raises InvalidRequestError for more knots than the kernel has room for.
    """
    return {model.parallel: _record(model.scaled(factor)) for model in profile.steps}


def _record(model: StepTimeModel) -> NDArray[Any]:
    knots = len(model.token_knots)
    check_knots(f"step times of {model.parallel.key} have", knots)
    record = np.zeros((), layout.STEP)
    for name in TIME_FIELDS:
        record[name] = getattr(model, name)
    record["stage_share"], record["num_knots"] = model.stage_share, knots
    record["busy_cores"], record["crowding_exponent"] = model.busy_cores, model.crowding_exponent
    record["leader_computes"] = model.leader_computes
    record["token_knots"][:knots] = model.token_knots
    record["token_s"][:knots] = model.token_s
    return record


def linear_profile(
    configs: Sequence[ParallelConfig],
    base_s: float,
    per_token_s: float,
    per_seq_s: float = 0.0,
    per_context_token_s: float = 0.0,
    link_bytes_per_s: float = 1e9,
) -> ServingProfile:
    """An ideal machine: terms that grow with the batch shrink by tp, stages overlap perfectly,
    communication and switches without bytes cost nothing."""
    steps = tuple(
        StepTimeModel(
            config,
            base_s,
            per_token_s / config.tp,
            per_seq_s / config.tp,
            per_context_token_s / config.tp,
            stage_share=1.0 / config.pp,
        )
        for config in configs
    )
    return ServingProfile("linear", "ideal", steps, link_bytes_per_s, 0.0, 0.0)
