"""When a guarded policy leaves its rule, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation
from policies.guarded import GuardedConfig, GuardedPolicy

MASK = np.array([True, True, True, False])
KEYS = ("1xtp4pp1", "2xtp2pp1", "4xtp1pp1", "1xtp2pp2")
SEEN = Observation(np.zeros(2, np.float32), np.zeros((4, 3), np.float32), MASK, KEYS)


class Fixed:
    """Says the same whatever it sees; counts its resets."""

    def __init__(self, *probabilities: float) -> None:
        self._probabilities = np.array(probabilities)
        self.name, self.resets = "fixed", 0

    def reset(self) -> None:
        self.resets += 1

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return self._probabilities


KEEP = Fixed(1.0, 0.0, 0.0, 0.0)
SURE, LUKEWARM, OTHER = (
    Fixed(0.1, 0.8, 0.1, 0.0),
    Fixed(0.4, 0.5, 0.1, 0.0),
    Fixed(0.1, 0.1, 0.8, 0),
)


def row(members: list[Fixed], rule: Fixed = KEEP, **settings: float) -> int:
    policy = GuardedPolicy(members, rule, GuardedConfig(**settings))
    probabilities = policy.probabilities(SEEN)
    assert probabilities.sum() == pytest.approx(1.0)
    assert probabilities.max() == 1.0
    return int(probabilities.argmax())


def test_acts_where_all_are_sure() -> None:
    assert row([SURE, SURE, SURE]) == 1


def test_leaves_it_to_the_rule_where_one_is_not_sure() -> None:
    assert np.log(0.5 / 0.4) < 0.5
    assert row([SURE, SURE, LUKEWARM]) == 0
    assert row([SURE, SURE, LUKEWARM], margin=0.2) == 1
    assert row([SURE, SURE, LUKEWARM], agreement=0.6) == 1


def test_leaves_it_to_the_rule_where_they_disagree() -> None:
    assert row([SURE, SURE, OTHER]) == 0
    assert row([SURE, SURE, OTHER], rule=Fixed(0.0, 0.0, 1.0, 0.0)) == 2
    assert row([SURE, SURE, OTHER], agreement=0.6) == 1


def test_takes_what_all_prefer_to_the_rule_s_though_each_has_another_favourite() -> None:
    """Favourites 0 and 1; both like either better than the rule's row 2."""
    first, second = Fixed(0.7, 0.25, 0.05, 0.0), Fixed(0.35, 0.6, 0.05, 0.0)
    to_third = Fixed(0.0, 0.0, 1.0, 0.0)
    assert 0.7 * 0.35 > 0.25 * 0.6  # the members' mean in the logarithm
    assert row([first, second], rule=to_third) == 0
    assert row([first, second, Fixed(0.1, 0.1, 0.8, 0.0)], rule=to_third) == 2


def test_is_the_rule_where_the_members_want_nothing_else() -> None:
    to_second = Fixed(0.0, 1.0, 0.0, 0.0)
    assert row([SURE, SURE], rule=to_second) == 1
    assert row([KEEP, KEEP], rule=to_second) == 0  # sure that it should be kept


def test_a_margin_above_all_ratios_never_overrules() -> None:
    certain = Fixed(0.0, 1.0, 0.0, 0.0)
    assert GuardedConfig(margin=30.0).never_overrules
    assert row([certain, certain], margin=30.0) == 0
    assert not GuardedConfig(margin=27.0).never_overrules
    assert row([certain, certain], margin=27.0) == 1


def test_reset_reaches_everyone() -> None:
    member, rule = Fixed(1.0, 0, 0, 0), Fixed(1.0, 0, 0, 0)
    GuardedPolicy([member], rule).reset()
    assert (member.resets, rule.resets) == (1, 1)


@pytest.mark.parametrize("wrong", [{"margin": -0.1}, {"agreement": 0.5}, {"agreement": 1.1}])
def test_refuses_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError):
        GuardedConfig(**wrong)
