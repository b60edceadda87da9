"""What is hidden is hidden, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from controller.observation import observation_spec
from envs.ablated import FORECAST, MIGRATION, QUANTILES, BlindPipeline, Hidden, hide
from envs.registered import make_surrogate
from policies.base import Observation


def seen(*hidden: Hidden) -> tuple[Observation, Observation, tuple[str, ...], tuple[str, ...]]:
    """The whole observation and the one with something hidden, of the same tick."""
    whole, less = make_surrogate(), make_surrogate()
    less.pipeline = BlindPipeline.of(less.pipeline, hidden)
    for env in (whole, less):
        env.reset(seed=1)
        for _ in range(6):
            env.step(0)
        env.close()
    assert whole.prepared is not None
    assert less.prepared is not None
    assert less.prepared.candidates == whole.prepared.candidates
    assert less.prepared.mask_reasons == whole.prepared.mask_reasons
    spec = whole.pipeline.observation_spec
    one, other = whole.prepared.observation, less.prepared.observation
    return one, other, spec.state_features, spec.candidate_features


def changed(one: np.ndarray, other: np.ndarray, names: tuple[str, ...]) -> set[str]:
    """Base names of the features that differ."""
    differs = (one != other).reshape(-1, len(names)).any(axis=0)
    return {name.split(".")[0] for name, d in zip(names, differs, strict=True) if d}


@pytest.mark.parametrize(("hidden", "names"), [("forecast", FORECAST), ("migration", MIGRATION)])
def test_hidden_features_are_zero_and_others_as_they_were(
    hidden: Hidden, names: tuple[str, ...]
) -> None:
    whole, less, state_names, row_names = seen(hidden)
    gone = changed(whole.state, less.state, state_names)
    gone |= changed(whole.candidates, less.candidates, row_names)
    assert gone
    assert gone <= set(names)
    for values, features in ((less.state, state_names), (less.candidates, row_names)):
        for i, name in enumerate(features):
            if name.split(".")[0] in names:
                assert not np.any(values[..., i])
    assert (less.mask == whole.mask).all()


def test_without_quantiles_the_mean_stands_for_them() -> None:
    whole, less, state_names, row_names = seen("quantiles")
    for values, names in ((less.state, state_names), (less.candidates, row_names)):
        for i, name in enumerate(names):
            base, dot, kind = name.partition(".")
            if base in QUANTILES:
                of = names.index(QUANTILES[base] + dot + kind)
                assert (values[..., i] == values[..., of]).all()
    assert changed(whole.candidates, less.candidates, row_names) <= {"headroom_q90"}


def test_without_masks_every_filled_row_may_be_chosen() -> None:
    spec = observation_spec(2, 4, 15.0)
    mask = np.array([True, False, True, False])
    rows = np.zeros((4, len(spec.candidate_features)), np.float32)
    whole = Observation(np.zeros(len(spec.state_features), np.float32), rows, mask, ("a", "b", "c"))
    assert hide(spec, whole, ("masks",)).mask.tolist() == [True, True, True, False]


def test_nothing_hidden_is_the_pipeline_itself() -> None:
    pipeline = make_surrogate().pipeline
    assert BlindPipeline.of(pipeline, ()) is pipeline
