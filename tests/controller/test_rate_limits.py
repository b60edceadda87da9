"""Token buckets, by hand."""

from __future__ import annotations

from controller.rate_limits import RateLimits


def test_a_burst_then_the_rate() -> None:
    limits = RateLimits(per_s=2.0, burst=3)
    assert [limits.take("a", 10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert limits.take("a", 10.25) == 0.25  # what is refused costs nothing
    assert limits.take("a", 10.5) == 0.0
    assert [limits.take("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]  # never above burst


def test_each_caller_has_a_bucket_of_its_own() -> None:
    limits = RateLimits(per_s=1.0, burst=1)
    assert [limits.take(name, 0.0) for name in ("a", "b", "a")] == [0.0, 0.0, 1.0]


def test_a_clock_that_goes_back_gives_nothing() -> None:
    limits = RateLimits(per_s=1.0, burst=1)
    assert limits.take("a", 5.0) == 0.0
    assert limits.take("a", 1.0) == 1.0


def test_only_so_many_callers_are_remembered() -> None:
    limits = RateLimits(per_s=0.001, burst=1, max_callers=2)
    for name in ("a", "b", "c"):  # forgets a
        assert limits.take(name, 0.0) == 0.0
    assert limits.take("b", 0.0) > 0.0
    assert limits.take("a", 0.0) == 0.0


def test_no_rate_is_no_limit() -> None:
    limits = RateLimits(per_s=0.0, burst=1)
    assert {limits.take("a", 0.0) for _ in range(100)} == {0.0}
