"""The circuit breaker, step by step, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.breaker import ACTORS, Actor, BreakerConfig, CircuitBreaker
from engine.errors import InvalidRequestError

CONFIG = BreakerConfig(
    max_failures=3, window_s=100.0, cool_down_s=50.0, max_cool_down_s=150.0, num_trials=2
)


def _failing(times: list[float]) -> CircuitBreaker:
    breaker = CircuitBreaker(CONFIG)
    for at_s in times:
        breaker.failure(at_s, "policy late")
    return breaker


def test_failures_in_the_window_open_it_and_others_do_not() -> None:
    assert _failing([0.0, 60.0]).actor is Actor.POLICY
    assert _failing([0.0, 60.0, 101.0]).actor is Actor.POLICY  # the first has left the window
    opened = _failing([0.0, 60.0, 99.0])
    assert (opened.actor, opened.state) == (Actor.RULE, "open")
    assert opened.reason == "3 failures, the last: policy late"


def test_it_steps_back_to_the_rule_then_to_the_safe_plan_and_no_further() -> None:
    breaker = _failing([0.0, 1.0, 2.0, 3.0, 4.0])
    assert breaker.actor is Actor.RULE
    breaker.failure(5.0, "x")
    assert breaker.actor is Actor.SAFE
    for at_s in range(6, 20):
        breaker.failure(at_s, "x")
    assert (breaker.actor, breaker.state) == (Actor.SAFE, "open")


def test_on_trial_after_the_cool_down_and_back_after_good_decisions() -> None:
    breaker = _failing([0.0, 1.0, 2.0])
    breaker.success(10.0)  # the rule's
    assert breaker.advance(51.9) is Actor.RULE
    assert (breaker.advance(52.0), breaker.state) == (Actor.POLICY, "half_open")
    breaker.success(52.0)
    assert breaker.state == "half_open"
    breaker.success(67.0)
    assert (breaker.state, breaker.reason, breaker.advance(68.0)) == ("closed", "", Actor.POLICY)
    breaker.failure(70.0, "x")
    assert breaker.state == "closed"  # earlier failures are forgotten


def test_a_failed_trial_doubles_the_cool_down_up_to_its_limit() -> None:
    breaker = _failing([0.0, 1.0, 2.0])
    at_s = 2.0
    for wait_s in (50.0, 100.0, 150.0, 150.0):
        assert breaker.advance(at_s + wait_s - 0.1) is Actor.RULE
        at_s += wait_s
        assert breaker.advance(at_s) is Actor.POLICY
        breaker.failure(at_s, "still late")
        assert breaker.reason == "on trial: still late"
    breaker.close()
    assert (breaker.advance(at_s), breaker.state) == (Actor.POLICY, "closed")


def test_from_the_safe_plan_it_comes_back_one_step_at_a_time() -> None:
    breaker = _failing([0.0] * 6)
    assert breaker.advance(50.0) is Actor.RULE
    breaker.success(50.0)
    breaker.success(51.0)
    assert (breaker.advance(60.0), breaker.state) == (Actor.RULE, "open")
    assert breaker.advance(101.0) is Actor.POLICY


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans()), max_size=60))
def test_whatever_happens_it_moves_one_step_at_a_time(events: list[tuple[float, bool]]) -> None:
    breaker, at_s, before = CircuitBreaker(CONFIG), 0.0, 0
    for wait_s, is_failure in events:
        at_s += wait_s
        breaker.advance(at_s)
        breaker.failure(at_s, "x") if is_failure else breaker.success(at_s)
        level = ACTORS.index(breaker.actor)
        assert abs(level - before) <= 1
        assert (breaker.state == "closed") == (level == 0 and not breaker.reason)
        before = level


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_failures >= 1"):
        BreakerConfig(max_failures=0)
