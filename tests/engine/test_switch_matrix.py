"""Token identity over ordered pairs of four-worker deployments: greedy and seeded requests run
through every switch. A sample of the pairs by default, all of them where marked slow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from identity import (
    Reference,
    assert_identical,
    plan_to,
    prompt,
    sampled_reference,
    serve,
)

from engine.cluster import SwitchPhase
from engine.facade import EngineCluster

DEPLOYMENTS = (
    "4xtp1pp1",
    "3xtp1pp1",  # a device idle
    "2xtp2pp1",
    "1xtp2pp1+2xtp1pp1",
    "1xtp4pp1",
    "1xtp2pp2",
    "1xtp1pp4",
    "1xtp2pp1+1xtp1pp2",
    "1xtp1pp3+1xtp1pp1",
    "2xtp1pp2",
    "1xtp1pp2+2xtp1pp1",
)
SHORT, LONG = 12, 120  # output tokens
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def short(plain_model: Any, greedy: Callable[[list[int], int], Reference]) -> list[Reference]:
    """Two greedy requests and two sampled ones."""
    drawn = [sampled_reference(plain_model, prompt(n), SHORT, TEMPERATURE, n) for n in (9, 33)]
    return [greedy(prompt(5), SHORT), *drawn, greedy(prompt(70), SHORT)]


@pytest.fixture(scope="module")
def long(plain_model: Any, greedy: Callable[[list[int], int], Reference]) -> list[Reference]:
    return [
        greedy(prompt(24), LONG),
        sampled_reference(plain_model, prompt(40), LONG, TEMPERATURE, seed=7),
        greedy(prompt(100), LONG),
    ]


def every_ordered_pair(keys: tuple[str, ...]) -> list[str]:
    """A walk from keys[0] that goes from each to each other at least once."""
    walk = []
    for i, key in enumerate(keys):
        for other in keys[i + 1 :]:
            walk += [other, key]
        walk += keys[i + 1 : i + 2]
    return walk


def switch_under(
    engine: EngineCluster, references: list[Reference], at_token: int, key: str, name: str
) -> int:
    """Number of excused positions; 0 when the engine is at `key` already."""
    runtime = engine.runtime
    if runtime.deployment.key == key:
        return 0
    plan = engine.on_loop(lambda: plan_to(runtime, key))
    outputs, ticket = engine.run(serve(runtime, references, at_token, plan, name), 120)
    assert ticket is not None
    assert ticket.phase is SwitchPhase.DONE, ticket.reason
    assert runtime.deployment.key == key
    return assert_identical(references, outputs)


def test_the_walk_takes_every_ordered_pair() -> None:
    walk = [DEPLOYMENTS[0], *every_ordered_pair(DEPLOYMENTS)]
    n = len(DEPLOYMENTS)
    assert len(set(pairwise(walk))) == n * (n - 1)


def test_tokens_survive_a_sample_of_the_pairs(
    engine: EngineCluster, short: list[Reference], long: list[Reference]
) -> None:
    draw = random.Random(0)
    excused = 0
    for number in range(12):
        key = draw.choice([k for k in DEPLOYMENTS if k != engine.runtime.deployment.key])
        references = long if number % 3 == 0 else short
        at_token = draw.randint(1, len(references[0].tokens) - 1)
        excused += switch_under(engine, references, at_token, key, f"sample-{number}")
    assert excused == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("at_token", range(1, SHORT))
def test_tokens_survive_every_pair_at_every_token(
    engine: EngineCluster, short: list[Reference], at_token: int
) -> None:
    excused = 0
    for number, key in enumerate(every_ordered_pair(DEPLOYMENTS)):
        excused += switch_under(engine, short, at_token, key, f"pair-{at_token}-{number}")
    assert excused == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_long_requests_survive_every_pair_at_a_random_token(
    engine: EngineCluster, long: list[Reference]
) -> None:
    draw, excused = random.Random(1), 0
    for number, key in enumerate(every_ordered_pair(DEPLOYMENTS)):
        at_token = draw.randint(1, LONG - 1)
        excused += switch_under(engine, long, at_token, key, f"long-{number}")
    assert excused == 0
