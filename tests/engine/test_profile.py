"""Step times: the formula by hand, its straight approximation, its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cluster import ParallelConfig
from engine.errors import InvalidRequestError
from engine.profile import (
    Crowding,
    ProfiledCluster,
    ServingProfile,
    StepTimeModel,
    attention_pairs,
)

ONE = ParallelConfig(1, 1)
CROWDING = Crowding(processors=((2.0, 1.0), (4.0, 3.0)), memory=((1.0, 1.0), (3.0, 1.25)))
CURVED = StepTimeModel(
    ONE, 1.0, 0.5, 0.25, 0.125, per_pair_s=0.01, token_knots=(4, 8, 16), token_s=(2.0, 4.0, 12.0)
)


def test_step_time_by_hand() -> None:
    straight = replace(CURVED, token_knots=(), token_s=())
    assert straight.step_s(6, 2, 40, 100) == pytest.approx(1 + 3 + 0.5 + 5 + 1)
    for tokens, term_s in ((1, 2.0), (6, 3.0), (8, 4.0), (12, 8.0), (20, 14.0)):
        assert CURVED.step_s(tokens, 0, 0) == pytest.approx(1.0 + term_s)


def test_chunks_have_the_pairs_of_the_whole_prompt() -> None:
    by_hand = sum(position + 1 for position in range(7, 7 + 30))
    assert attention_pairs(7, 30) == by_hand
    assert attention_pairs(0, 37) == attention_pairs(0, 7) + attention_pairs(7, 30)
    assert attention_pairs(99, 1) == 100  # a decode step sees its context


def test_straight_line_lies_between_the_extremes_of_the_curve() -> None:
    knots, token_s = (1, 64, 256, 2048), (4e-3, 4.2e-3, 6e-3, 40e-3)
    model = StepTimeModel(ONE, 1e-3, 2e-5, 0.0, 0.0, token_knots=knots, token_s=token_s)
    line = model.linear(2048)
    assert line.token_knots == ()
    assert line.parallel == ONE
    ratios = [line.step_s(t, 1, 9) / model.step_s(t, 1, 9) for t in (1, 16, 64, 256, 1024, 2048)]
    assert 0.8 < min(ratios) < 1.0 < max(ratios) < 1.25
    straight = replace(model, token_knots=(), token_s=())
    assert straight.linear(64) is straight


def test_profile_survives_its_file(small_cluster: ProfiledCluster) -> None:
    profile = replace(small_cluster.profile, steps=(CURVED,), crowding=CROWDING)
    written = json.loads(json.dumps(replace(small_cluster, profile=profile).to_json()))
    assert ProfiledCluster.from_json(written).profile == profile


def test_slowdowns_follow_the_knots() -> None:
    busy = (0.0, 2.0, 3.0, 4.0, 8.0)
    assert [CROWDING.slowdown(b) for b in busy] == [1.0, 1.0, 2.0, 3.0, 6.0]
    assert [CROWDING.memory_slowdown(b) for b in busy] == [1.0, 1.125, 1.25, 1.25, 1.25]
    assert Crowding().slowdown(99.0) == Crowding().memory_slowdown(99.0) == 1.0
    for knots in (((2.0, 1.5),), ((2.0, 1.0), (2.0, 3.0)), ((1.0, 1.0), (2.0, 0.9))):
        with pytest.raises(InvalidRequestError, match="processors"):
            Crowding(processors=knots)
        with pytest.raises(InvalidRequestError, match="memory"):
            Crowding(memory=knots)


def test_memory_slows_what_it_bounds() -> None:
    model = StepTimeModel(ONE, 1.0, 0.5, 0.25, 0.125, per_pair_s=0.01)
    assert model.step_s(6, 2, 40, 100, memory=1.5) == pytest.approx(1.5 * (1 + 0.5 + 5) + 3 + 1)


def test_other_schema_and_bad_knots_are_refused(small_cluster: ProfiledCluster) -> None:
    old = small_cluster.profile.to_json() | {"schema": 1}
    with pytest.raises(InvalidRequestError, match="schema 1, expected 4"):
        ServingProfile.from_json(old)
    for knots, times in (((4, 4), (1.0, 2.0)), ((4, 8), (1.0,))):
        with pytest.raises(InvalidRequestError, match="token_knots"):
            replace(CURVED, token_knots=knots, token_s=times)


@pytest.mark.parametrize("path", sorted(Path("configs/profiles").glob("*cpu4.json")))
def test_committed_profiles_can_be_read(path: Path) -> None:
    cluster = ProfiledCluster.from_json(json.loads(path.read_text()))
    assert all(model.step_s(1, 1, 1) > 0 for model in cluster.profile.steps)
