"""The posterior given prompt length, class and client, by hand and on drawn traffic."""

from __future__ import annotations

import numpy as np
import pytest

from controller.posterior import LabelCounts, TypePosterior
from controller.workload import PromptPosterior
from engine.cluster import LABEL_CHARS, WorkloadTyping

PROMPT, LONG = 50, 900


def _types(kind: int, number: int) -> np.ndarray:
    return np.full(number, kind, np.int64)


def test_counts_of_a_label_are_shrunk_towards_the_level_before_by_hand() -> None:
    """Memory 2: what was there halves with each request. Bucket 1 has (0.5 + 1 of type 0, then
    halved by the one of bucket 0) = 0.75; the level before counts as 3 requests."""
    counts = LabelCounts(8, memory_requests=2.0, smoothing=3.0)
    buckets, types = np.array([1, 1, 0]), np.array([0, 0, 1])
    counts.observe((2, 2), buckets, types, ["a", "a", "a"])
    rows = np.array([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8]])
    counts.refine(rows, np.array([1, 0, 1, 1]), ["a", "a", "b", None])
    assert rows[0] == pytest.approx([(0.75 + 0.6) / 3.75, 2.4 / 3.75])
    assert rows[1] == pytest.approx([0.6 / 4.0, (1.0 + 2.4) / 4.0])
    assert rows[2:].tolist() == [[0.2, 0.8], [0.2, 0.8]]


def test_class_then_client_by_hand(four_types: WorkloadTyping) -> None:
    """Two requests of one client: one pseudo-request of the prompt's row at the level of the
    class, one of the class's row at the level of the client. A memory of 1000 fades the first."""
    posterior = TypePosterior(four_types)
    posterior.observe_given([PROMPT] * 2, _types(1, 2), ["chat"] * 2, ["ann"] * 2)
    row, number = posterior.rows([PROMPT])[0], 1.999
    by_class = (row + number * np.eye(4)[1]) / (1.0 + number)
    by_client = (by_class + number * np.eye(4)[1]) / (1.0 + number)
    found = posterior.rows_given([PROMPT] * 2, ["chat"] * 2, ["bob", "ann"])
    assert found == pytest.approx(np.array([by_class, by_client]))


def test_what_was_not_seen_is_the_prompts_to_the_last_bit(four_types: WorkloadTyping) -> None:
    posterior, plain = TypePosterior(four_types), PromptPosterior(four_types)
    rng = np.random.default_rng(0)
    prompts, types = rng.integers(10, 2000, 500).tolist(), rng.integers(0, 4, 500)
    posterior.observe_given(prompts, types, ["chat", ""] * 250, ["ann"] * 500)
    plain.observe(prompts, types)
    arriving = [1, PROMPT, LONG, 10**6]
    expected = plain.rows(arriving)
    for classes, clients in (("", ""), ("batch", ""), ("batch", "ann"), ("nan", "nan")):
        found = posterior.rows_given(arriving, [classes] * 4, [clients] * 4)
        assert np.array_equal(found, expected)
    mixed = posterior.rows_given([PROMPT] * 2, ["chat", ""], ["", ""])
    assert np.array_equal(mixed[1], expected[1])
    assert not np.array_equal(mixed[0], expected[1])
    assert posterior.table == plain.table
    assert np.array_equal(posterior.mixing, plain.mixing)
    posterior.reset()
    plain.reset()
    assert np.array_equal(
        posterior.rows_given(arriving, ["chat"] * 4, ["ann"] * 4),
        plain.matrix[plain.buckets(arriving)],
    )


def test_unnamed_traffic_leaves_no_counts(four_types: WorkloadTyping) -> None:
    posterior = TypePosterior(four_types)
    posterior.observe_given([PROMPT] * 3, _types(1, 3), [""] * 3, ["", "ann", ""])
    assert [len(level) for level in posterior._levels] == [0, 1]


def test_any_name_gives_a_distribution(four_types: WorkloadTyping) -> None:
    """Names that are numbers, blank or endless are names; endless ones by their beginning."""
    posterior = TypePosterior(four_types)
    names = ["nan", "None", " ", "\0", "ü", "x" * 10**6]
    posterior.observe_given([PROMPT] * 6, _types(2, 6), names, names[::-1])
    rows = posterior.rows_given([PROMPT] * 6, names, names[::-1])
    assert rows.sum(axis=1) == pytest.approx(np.ones(6))
    assert (rows[:, 2] > posterior.rows([PROMPT])[0, 2]).all()
    cut = posterior.rows_given([PROMPT], ["x" * LABEL_CHARS + "y"], [""])
    assert np.array_equal(cut, posterior.rows_given([PROMPT], ["x" * 10**6], [""]))


def test_the_least_recently_seen_are_forgotten(four_types: WorkloadTyping) -> None:
    posterior = TypePosterior(four_types, max_classes=2, max_clients=3)

    def finish(*clients: str) -> None:
        number = len(clients)
        posterior.observe_given([PROMPT] * number, _types(3, number), [""] * number, clients)

    finish("a", "b", "c", "a", "d")
    prompt_only = posterior.rows([PROMPT])[0]
    rows = posterior.rows_given([PROMPT] * 4, [""] * 4, ["a", "b", "c", "d"])
    assert [bool((row != prompt_only).any()) for row in rows] == [True, False, True, True]
    finish(*(f"once-{i}" for i in range(5000)))
    assert [len(level) for level in posterior._levels] == [0, 3]


def test_a_client_whose_ways_change_is_followed(four_types: WorkloadTyping) -> None:
    posterior = TypePosterior(four_types)
    for kind, number in ((0, 3000), (1, 1500)):
        posterior.observe_given(
            [PROMPT] * number, _types(kind, number), [""] * number, ["a"] * number
        )
    assert posterior.rows_given([PROMPT], [""], ["a"])[0, 1] > 0.7


def _log_loss(rows: np.ndarray, types: np.ndarray) -> float:
    return float(-np.log(rows[np.arange(len(types)), types]).mean())


def test_clients_that_determine_the_type_are_told_apart(four_types: WorkloadTyping) -> None:
    """Equal prompts, so their length tells nothing; the type is the client's, and, for the client
    that sends both, the class's."""
    posterior, rng = TypePosterior(four_types), np.random.default_rng(1)
    kind_of = {("", "a"): 0, ("", "b"): 1, ("chat", "c"): 2, ("batch", "c"): 3, ("chat", "d"): 1}
    senders = list(kind_of)

    def draw(number: int) -> tuple[list[str], list[str], np.ndarray]:
        chosen = [senders[i] for i in rng.integers(0, len(senders), number)]
        types = np.array([kind_of[sender] for sender in chosen], np.int64)
        return [c for c, _ in chosen], [c for _, c in chosen], types

    for _ in range(20):
        classes, clients, types = draw(50)
        posterior.observe_given([PROMPT] * 50, types, classes, clients)
    classes, clients, types = draw(400)
    full = posterior.rows_given([PROMPT] * 400, classes, clients)
    assert _log_loss(posterior.rows([PROMPT] * 400), types) > 1.0
    assert _log_loss(full, types) < 0.02


def test_names_that_tell_nothing_cost_little(four_types: WorkloadTyping) -> None:
    """Types drawn without regard to 40 clients: the full posterior is hardly worse."""
    posterior, rng = TypePosterior(four_types), np.random.default_rng(2)
    prompt, full = [], []
    for step in range(200):
        types = rng.choice(4, 50, p=[0.1, 0.2, 0.3, 0.4])
        clients = [f"c{i}" for i in rng.integers(0, 40, 50)]
        if step >= 100:
            prompt.append(_log_loss(posterior.rows([PROMPT] * 50), types))
            full.append(_log_loss(posterior.rows_given([PROMPT] * 50, [""] * 50, clients), types))
        posterior.observe_given([PROMPT] * 50, types, [""] * 50, clients)
    assert np.mean(full) - np.mean(prompt) < 0.02
