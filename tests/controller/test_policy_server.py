"""PolicyServer against policies that are late, wrong, or imprecise."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.policy_server import PolicyServer
from policies.base import Observation, ObservationSpec, Policy
from policies.baselines import KeepPolicy
from policies.exploration import Exploration, ExplorationConfig

Answer = Callable[[Observation], NDArray[np.float64]]
MASK = np.array([True, True, False, True])
OBSERVATION = Observation(
    np.zeros(2, np.float32), np.zeros((4, 3), np.float32), MASK, ("a", "b", "c", "d")
)


class Told:
    """A policy that answers as told."""

    def __init__(self, answer: Answer, name: str = "told") -> None:
        self.name, self._answer = name, answer

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return self._answer(observation)


def second(observation: Observation) -> NDArray[np.float64]:
    return np.array([0.0, 1.0, 0.0, 0.0])


def fail(observation: Observation) -> NDArray[np.float64]:
    raise RuntimeError("boom")


@pytest.fixture
def serve() -> Iterator[Callable[..., PolicyServer]]:
    made: list[PolicyServer] = []

    def build(
        answer: Answer, fallback: Policy | None = None, deadline_s: float = 10.0
    ) -> PolicyServer:
        made.append(PolicyServer(Told(answer), fallback or KeepPolicy(), deadline_s, False))
        return made[-1]

    yield build
    for server in made:
        server.close()


def test_an_answer_rounded_in_float32_is_drawn_from(serve: Callable[..., PolicyServer]) -> None:
    """Off by less than the tolerance, but by more than numpy's generator takes."""
    given = np.array([0.25, 0.25, 0.0, 0.5]) * (1 + 8e-7)
    result = serve(lambda observation: given).act(OBSERVATION, np.random.default_rng(0))
    assert result.reason == "policy"
    assert result.probabilities.sum() == pytest.approx(1.0, abs=1e-15)
    with pytest.raises(ValueError, match="do not sum to 1"):
        np.random.default_rng(0).choice(4, p=given)


def test_draws_follow_the_distribution_and_the_seed(serve: Callable[..., PolicyServer]) -> None:
    server = serve(lambda observation: np.array([0.5, 0.2, 0.0, 0.3]))
    rng = np.random.default_rng(3)
    actions = [server.act(OBSERVATION, rng).action for _ in range(400)]
    again = np.random.default_rng(3)
    assert actions == [server.act(OBSERVATION, again).action for _ in range(400)]
    shares = np.bincount(actions, minlength=4) / 400
    assert shares[2] == 0.0
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.0, 0.3], atol=0.08)  # 3 sigma: 0.075


def test_a_late_call_and_the_next_never_overlap(serve: Callable[..., PolicyServer]) -> None:
    release, calls, inside = threading.Event(), [], threading.Lock()

    def slow(observation: Observation) -> NDArray[np.float64]:
        assert inside.acquire(blocking=False), "two calls at once"
        calls.append(release.wait(30))
        inside.release()
        return second(observation)

    server, rng = serve(slow, deadline_s=0.05), np.random.default_rng(0)
    for _ in range(3):
        result = server.act(OBSERVATION, rng)
        assert (result.policy, result.action) == ("keep", 0)
        assert "told no answer within 0.05 s" in result.reason
    release.set()
    later = [server.act(OBSERVATION, rng)]
    while later[-1].policy != "told" and len(later) < 100:
        later.append(server.act(OBSERVATION, rng))
    assert (later[-1].policy, later[-1].action) == ("told", 1)
    assert len(calls) <= 1 + len(later)  # of the first three, two were withdrawn unasked


@pytest.mark.parametrize("kind", ["raises", "illegal"])
def test_when_the_rule_fails_too_the_answer_is_keep(
    serve: Callable[..., PolicyServer], kind: str
) -> None:
    rule = Told(fail if kind == "raises" else lambda o: np.array([0.0, 0, 1, 0]), "rule")
    result = serve(fail, rule).act(OBSERVATION, np.random.default_rng(0))
    assert (result.policy, result.action) == ("keep", 0)
    assert result.probabilities.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert "told RuntimeError: boom; rule" in result.reason


def test_explores_around_what_the_policy_wants_and_nothing_else() -> None:
    """Row 3 nearly ties with the policy's 1; a fall-back's decision is taken as it is."""
    spec = ObservationSpec(("s",), ("log_latency", "headroom", "switch_s"), 4, 15.0)
    rows = np.array([[2, 2, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0]], np.float32)
    seen = Observation(np.zeros(1, np.float32), rows, MASK, OBSERVATION.keys)
    exploration = Exploration(spec, ExplorationConfig(epsilon=0.5))
    for answer, wanted in ((second, [0.0, 0.75, 0.0, 0.25]), (fail, [1.0, 0.0, 0.0, 0.0])):
        server = PolicyServer(Told(answer), KeepPolicy(), 10.0, True, exploration=exploration)
        found = [server.act(seen, np.random.default_rng(seed)) for seed in range(40)]
        assert all(f.probabilities.tolist() == wanted for f in found)
        assert {f.action for f in found} == set(np.flatnonzero(wanted))
        server.close()


HANGING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
from controller.policy_server import PolicyServer
from policies.base import Observation
from policies.baselines import KeepPolicy
class Hung:
    name = "hung"
    def reset(self): ...
    def probabilities(self, observation): threading.Event().wait()
server = PolicyServer(Hung(), KeepPolicy(), 0.05, True)
seen = Observation(np.zeros(1, np.float32), np.zeros((2, 1), np.float32), np.ones(2, bool), ("a",))
print(server.act(seen, np.random.default_rng(0)).policy)
server.close()
"""


def test_a_policy_that_hangs_for_ever_does_not_keep_the_process() -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", HANGING, root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "keep\n"), done.stderr
