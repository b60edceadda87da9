"""The batch scheduler by hand, and against an imitation of the paged KV cache."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imitated_cache import (
    EOS,
    ImitatedCache,
    make_scheduler,
    make_sequence,
    reference,
    run_all,
    shape,
)

from engine.batch import ScheduledBatch
from engine.errors import InfeasibleError
from engine.migration.arrivals import Arrivals, state_of
from engine.migration.kv import FilledBlocks
from engine.request import SequenceStatus


def test_prefill_is_chunked_and_decodes_go_first() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 5))
    scheduler.add(make_sequence("b", 20))
    batch = scheduler.schedule()
    assert shape(batch) == [("a", 0, 5, True), ("b", 0, 11, False)]
    assert batch is not None
    updates = scheduler.update(batch, [3, None])
    assert [(u.request_id, u.token_id, u.index, u.finish_reason) for u in updates] == [
        ("a", 3, 0, "")
    ]
    assert shape(scheduler.schedule()) == [("a", 5, 1, True), ("b", 11, 9, True)]


def test_step_input_concatenates_prompt_and_output() -> None:
    scheduler = make_scheduler()
    seq = make_sequence("a", 3, temperature=0.5, seed=11)
    scheduler.add(seq)
    batch = scheduler.schedule()
    assert batch is not None
    step = batch.to_step_input()
    assert (step.token_ids, step.starts, step.lengths) == (seq.prompt_token_ids, [0], [3])
    assert step.block_tables == [[0]]
    scheduler.update(batch, [42])
    second = scheduler.schedule()
    assert second is not None
    step = second.to_step_input()
    assert (step.token_ids, step.starts, step.lengths) == ([42], [3], [1])
    spec = step.samples[0]
    assert spec is not None
    assert (spec.temperature, spec.seed, spec.position) == (0.5, 11, 1)


def test_a_sequence_in_flight_is_skipped() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", 8))
    scheduler.add(make_sequence("b", 8))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shape(first) == [("a", 0, 8, True)]
    assert shape(second) == [("b", 0, 8, True)]
    assert scheduler.schedule() is None
    assert scheduler.num_in_flight == 2


def test_the_latest_arrival_is_preempted_and_comes_back_in_front() -> None:
    scheduler = make_scheduler(num_blocks=4, caching=False)  # 16 tokens
    for name, arrival in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        scheduler.add(make_sequence(name, 7, max_tokens=8, arrival_s=arrival))
    batch = scheduler.schedule()
    assert shape(batch) == [("a", 0, 7, True), ("b", 0, 7, True)]  # c would need a fifth block
    assert batch is not None
    scheduler.update(batch, [1, 2])
    batch = scheduler.schedule()
    assert shape(batch) == [("a", 7, 1, True), ("b", 7, 1, True)]
    assert batch is not None
    scheduler.update(batch, [3, 4])
    batch = scheduler.schedule()  # both need a third block; b, the later one, gives way
    assert shape(batch) == [("a", 8, 1, True)]
    b = scheduler.sequences()[1]
    assert (b.request_id, b.status, b.num_computed_tokens) == ("b", SequenceStatus.WAITING, 0)
    assert (b.num_preemptions, b.output_token_ids, b.block_table) == (1, [2, 4], [])
    assert (scheduler.num_waiting, scheduler.waiting_prompt_tokens) == (2, 14)
    assert batch is not None
    scheduler.update(batch, [EOS])
    assert shape(scheduler.schedule())[0] == ("b", 0, 9, True)  # before c; outputs re-prefilled


def test_sequences_in_flight_are_never_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", 8, max_tokens=8))
    scheduler.add(make_sequence("b", 8, max_tokens=8, arrival_s=1.0))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.update(first, [1])
    assert scheduler.schedule() is None  # a needs a block, b is in flight: a waits
    scheduler.update(second, [2])
    assert shape(scheduler.schedule()) == [("a", 8, 1, True)]
    assert [s.num_preemptions for s in scheduler.sequences()] == [0, 1]


@pytest.mark.parametrize(
    ("params", "token", "reason"),
    [
        ({}, EOS, "stop"),
        ({"ignore_eos": True}, EOS, ""),
        ({"stop_token_ids": (5,), "ignore_eos": True}, 5, "stop"),
        ({}, 5, ""),
        ({"max_tokens": 1}, 5, "length"),
    ],
)
def test_finishing(params: dict[str, object], token: int, reason: str) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 3, **params))  # type: ignore[arg-type]
    batch = scheduler.schedule()
    assert batch is not None
    (update,) = scheduler.update(batch, [token])
    assert update.finish_reason == reason
    assert scheduler.has_work == (not reason)
    assert scheduler.block_manager.num_used == (0 if reason else 1)


def test_the_context_ends_at_max_model_len() -> None:
    scheduler = make_scheduler(max_model_len=10)
    seq = make_sequence("a", 7, max_tokens=50)
    scheduler.add(seq)
    run_all(scheduler, ImitatedCache())
    assert seq.output_token_ids == reference(seq.prompt_token_ids, 3)


@pytest.mark.parametrize(("num_prompt", "word"), [(64, "context ends"), (15, "KV cache")])
def test_what_can_never_fit_is_refused(num_prompt: int, word: str) -> None:
    with pytest.raises(InfeasibleError, match=word):
        make_scheduler(num_blocks=4).add(make_sequence("a", num_prompt))


def test_abort_waiting_running_and_in_flight() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(name, 4))
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.abort("c")  # waiting: at once
    assert scheduler.abort("a")  # in flight: at its update
    assert not scheduler.abort("a")
    assert not scheduler.abort("nobody")
    assert [s.request_id for s in scheduler.sequences()] == ["a", "b"]
    updates = scheduler.update(batch, [1, 2])
    assert [u.request_id for u in updates] == ["b"]
    assert scheduler.abort("b")
    assert not scheduler.has_work
    scheduler.check_integrity()
    assert scheduler.block_manager.num_used == 0


def test_sequences_go_on_in_another_scheduler() -> None:
    old, new = make_scheduler(), make_scheduler(max_num_batched_tokens=6)
    old_cache, new_cache = ImitatedCache(), ImitatedCache()
    for i, name in enumerate("abc"):
        old.add(make_sequence(name, 9, max_tokens=6, arrival_s=float(i)))
    batch = old.schedule()
    assert batch is not None
    old.update(batch, old_cache.execute(batch.to_step_input()))  # b is half prefilled, c waits
    new.block_manager.allocate(2)  # so that the tables must differ
    moving = [state_of(seq) for seq in old.sequences()]
    assert [(s.request_id, s.num_computed_tokens) for s in moving] == [("a", 9), ("b", 7), ("c", 0)]
    arrivals = Arrivals(new)
    tables, blocks_to_fill = arrivals.reserve(moving[:2])
    filled = FilledBlocks(new.block_manager.block_size)
    filled.expect(blocks_to_fill)
    for state, table in zip(moving, tables, strict=False):
        copies = filled.take_copies(state.block_table, table, state.num_computed_tokens)
        new_cache.copy_blocks(old_cache, *copies)
    new.add(make_sequence("c", 9, max_tokens=6, arrival_s=2.0))
    arrivals.adopt()
    new.block_manager.free([0, 1])
    new.check_integrity()
    seqs = new.sequences()
    assert [s.request_id for s in seqs] == ["a", "b", "c"]
    run_all(new, new_cache)
    assert [s.output_token_ids for s in seqs] == [reference(s.prompt_token_ids, 6) for s in seqs]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=7),
    num_blocks=st.integers(8, 14),
    budget=st.integers(1, 24),
    max_num_seqs=st.integers(1, 5),
    pp=st.integers(1, 4),
)
def test_every_sequence_ends_with_its_own_tokens(
    lengths: list[tuple[int, int]], num_blocks: int, budget: int, max_num_seqs: int, pp: int
) -> None:
    scheduler = make_scheduler(num_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    seqs = [make_sequence(f"r{i}", n, m, float(i)) for i, (n, m) in enumerate(lengths)]
    for seq in seqs:
        scheduler.add(seq)
    run_all(scheduler, ImitatedCache(), pp)
    for seq, (_, max_tokens) in zip(seqs, lengths, strict=True):
        assert seq.output_token_ids == reference(seq.prompt_token_ids, max_tokens)
        assert seq.status is SequenceStatus.FINISHED
    assert scheduler.block_manager.num_used == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=7),
    aborts=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6)), max_size=4),
    pp=st.integers(1, 3),
)
def test_aborts_at_any_time_leave_the_others_alone(
    lengths: list[tuple[int, int]], aborts: list[tuple[int, int]], pp: int
) -> None:
    scheduler, cache = make_scheduler(num_blocks=9), ImitatedCache()
    seqs = [make_sequence(f"r{i}", n, m, float(i)) for i, (n, m) in enumerate(lengths)]
    for seq in seqs:
        scheduler.add(seq)
    in_flight: deque[tuple[ScheduledBatch, list[int | None]]] = deque()
    gone: set[str] = set()
    step = 0
    while scheduler.has_work:
        while len(in_flight) < pp and (batch := scheduler.schedule()) is not None:
            in_flight.append((batch, cache.execute(batch.to_step_input())))
        names = [f"r{index}" for at, index in aborts if at == step]
        gone |= {name for name in names if scheduler.abort(name)}
        if in_flight:
            updates = scheduler.update(*in_flight.popleft())
            assert not gone & {u.request_id for u in updates}
        scheduler.check_integrity()
        step += 1
    for seq, (_, max_tokens) in zip(seqs, lengths, strict=True):
        if seq.request_id not in gone:
            assert seq.output_token_ids == reference(seq.prompt_token_ids, max_tokens)
    assert scheduler.block_manager.num_used == 0


# ---------------------------------------------------------------- micro-batches of a pipeline


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_every_stage_has_its_share_of_the_sequences(pp: int) -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=16, num_stages=pp)
    seqs = [make_sequence(f"r{i}", 1, 40, float(i), ignore_eos=True) for i in range(10)]
    for seq in seqs:
        scheduler.add(seq)
    in_flight: deque[ScheduledBatch] = deque()
    found: list[list[int]] = []
    for _ in range(6 * pp):
        while len(in_flight) < pp and (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        found.append([len(batch.items) for batch in in_flight])
        batch = in_flight.popleft()
        scheduler.update(batch, [7] * len(batch.items))
    for later in found[3 * pp :]:
        assert (len(later), sum(later), max(later)) == (pp, 10, -(-10 // pp))
    lengths = [len(seq.output_token_ids) for seq in seqs]
    assert max(lengths) - min(lengths) <= 2  # nobody is passed over


def test_shares_even_out_when_sequences_end() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=16, num_stages=2)
    for i in range(8):
        scheduler.add(make_sequence(f"r{i}", 1, 40, float(i), ignore_eos=True))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    for name in ("r0", "r1", "r2"):  # three of the first batch's four
        assert scheduler.abort(name)
    in_flight = deque([first, second])
    for _ in range(4):
        batch = in_flight.popleft()
        scheduler.update(batch, [7] * len(batch.items))
        following = scheduler.schedule()
        assert following is not None
        in_flight.append(following)
    assert sorted(len(batch.items) for batch in in_flight) == [2, 3]


def test_prompts_that_wait_for_blocks_do_not_widen_a_share() -> None:
    scheduler = make_scheduler(num_blocks=8, caching=False, max_num_seqs=8, num_stages=2)
    for i in range(4):
        scheduler.add(make_sequence(f"r{i}", 4, 3, float(i), ignore_eos=True))  # one block each
    for i in range(4, 12):
        scheduler.add(make_sequence(f"r{i}", 16, 3, float(i)))  # four blocks
    batch = scheduler.schedule()
    assert batch is not None
    assert [item.num_tokens for item in batch.items] == [4, 4, 4, 4]
    scheduler.update(batch, [7] * 4)
    first, second = scheduler.schedule(), scheduler.schedule()  # now two blocks each
    assert shape(first) == [("r0", 4, 1, True), ("r1", 4, 1, True)]
    assert shape(second) == [("r2", 4, 1, True), ("r3", 4, 1, True)]
    assert scheduler.num_waiting == 8


# ---------------------------------------------------------------- aborts free blocks in one step


@pytest.mark.parametrize("pp", [1, 2])
def test_an_abort_frees_blocks_at_the_latest_with_the_step_in_flight(pp: int) -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=8, num_stages=pp)
    scheduler.add(make_sequence("a", 12))  # two chunks
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.block_manager.num_used == 2
    assert scheduler.abort("a")  # inside its prompt and in flight
    assert scheduler.schedule() is None
    assert scheduler.block_manager.num_used == 2
    assert scheduler.update(batch, [None]) == []
    assert (scheduler.block_manager.num_used, scheduler.has_work) == (0, False)
    scheduler.check_integrity()
    scheduler.add(make_sequence("b", 12))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, [None])
    assert scheduler.abort("b")  # running, between two steps
    assert (scheduler.block_manager.num_used, scheduler.has_work) == (0, False)
    scheduler.check_integrity()
