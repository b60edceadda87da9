"""Which rows are drawn how often, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec
from policies.exploration import Exploration, ExplorationConfig

SPEC = ObservationSpec(("s",), ("log_latency", "headroom"), 6, 15.0)


def seen(latency_s: list[float], headroom: list[float], legal: list[bool]) -> Observation:
    rows = np.stack([np.log(latency_s), headroom], axis=1).astype(np.float32)
    return Observation(np.zeros(1, np.float32), rows, np.array(legal), ("x",) * len(rows))


def test_only_near_ties_that_hold_the_load_are_drawn() -> None:
    """Row 0 is chosen, 1 nearly ties, 2 is slow, 3 overloaded, 4 illegal, 5 faster."""
    latency_s, headroom = [1.0, 1.08, 1.3, 0.9, 1.0, 0.5], [1.4, 1.1, 2.0, 0.9, 2.0, 1.0]
    legal = [True, True, True, True, False, True]
    exploration = Exploration(SPEC, ExplorationConfig(epsilon=0.3, tie=0.1))
    mixed = exploration.mix(np.array([0.6, 0.2, 0, 0, 0, 0.2]), seen(latency_s, headroom, legal))
    assert mixed.tolist() == pytest.approx([0.8, 0.1, 0.0, 0.0, 0.0, 0.1])


def test_under_overload_what_holds_more_is_near_too() -> None:
    exploration = Exploration(SPEC, ExplorationConfig(epsilon=0.1))
    observation = seen([1.0, 1.0, 1.0], [0.5, 0.6, 0.4], [True] * 3)
    mixed = exploration.mix(np.array([1.0, 0.0, 0.0]), observation)
    assert mixed.tolist() == pytest.approx([0.95, 0.05, 0.0])


def test_the_chosen_row_is_taken_where_nothing_ties() -> None:
    observation = seen([1.0, 2.0], [2.0, 2.0], [True, True])
    mixed = Exploration(SPEC, ExplorationConfig(epsilon=0.5)).mix(np.array([0.9, 0.1]), observation)
    assert mixed.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("wrong", [{"epsilon": 1.0}, {"epsilon": -0.1}, {"tie": -1.0}])
def test_refuses_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match="exploration needs"):
        ExplorationConfig(**wrong)
