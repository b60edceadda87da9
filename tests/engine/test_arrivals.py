"""Sequences that arrive at a replica in a switch: a shared prefix is reserved and copied once."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from imitated_cache import BLOCK, ImitatedCache, make_scheduler, make_sequence, reference, run_all

from engine.messages import SequenceState
from engine.migration.arrivals import Arrivals, Departures, sequence_of, state_of
from engine.migration.kv import FilledBlocks
from engine.request import SamplingParams, Sequence
from engine.scheduler import BatchScheduler

PREFIX = list(range(20, 28))  # two blocks


def prefilled(
    names: str, num_blocks: int = 32, caching: bool = True
) -> tuple[BatchScheduler, ImitatedCache]:
    """A replica whose sequences, PREFIX and their own two tokens, have one output token each."""
    scheduler = make_scheduler(num_blocks, caching, max_num_seqs=8, max_num_batched_tokens=64)
    cache = ImitatedCache()
    for i, name in enumerate(names):
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        scheduler.add(Sequence(name, [*PREFIX, ord(name), i], params, float(i)))
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, cache.execute(batch.to_step_input()))
    return scheduler, cache


def states(scheduler: BatchScheduler) -> list[SequenceState]:
    return [state_of(seq) for seq in scheduler.sequences()]


def test_a_shared_prefix_is_reserved_and_copied_once() -> None:
    old, old_cache = prefilled("abc")
    new, new_cache = make_scheduler(32, max_num_seqs=8), ImitatedCache()
    arrivals = Arrivals(new)
    moving = states(old)
    tables, blocks_to_fill = arrivals.reserve(moving)
    assert [table[:2] for table in tables] == [tables[0][:2]] * 3
    assert sorted(blocks_to_fill) == sorted({b for t in tables for b in t})
    new.check_integrity(arrivals.tables())
    filled, num_copied = FilledBlocks(BLOCK), 0
    filled.expect(blocks_to_fill)
    for state, table in zip(moving, tables, strict=True):
        src_blocks, dst_blocks = filled.take_copies(state.block_table, table, 10)
        new_cache.copy_blocks(old_cache, src_blocks, dst_blocks)
        num_copied += len(src_blocks)
    assert num_copied == 2 + 3  # 9 without sharing
    arrivals.adopt()
    new.check_integrity()
    seqs = new.sequences()
    run_all(new, new_cache)
    for seq in seqs:
        assert seq.output_token_ids == reference(seq.prompt_token_ids, 6)
    hashes = seqs[0].block_hashes[:2]  # rebuilt here
    assert new.block_manager.match(hashes) == tables[0][:2]


def test_the_same_prefix_from_two_replicas_is_one() -> None:
    (first, _), (second, _) = prefilled("ab"), prefilled("cd")
    new = make_scheduler(32, max_num_seqs=8)
    arrivals = Arrivals(new)
    tables, blocks_to_fill = arrivals.reserve(states(first) + states(second))
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len(blocks_to_fill) == 2 + 4
    new.check_integrity(arrivals.tables())


def test_what_a_serving_replica_has_cached_does_not_come() -> None:
    old, _ = prefilled("abc")
    new, _ = prefilled("xy")  # kept: it serves on while others arrive
    used = new.block_manager.num_used
    arrivals = Arrivals(new)
    tables, blocks_to_fill = arrivals.reserve(states(old))
    (x, _) = new.sequences()
    assert [table[:2] for table in tables] == [x.block_table[:2]] * 3
    assert blocks_to_fill == [table[2] for table in tables]
    assert new.block_manager.num_used == used + 3
    new.check_integrity(arrivals.tables())
    for name in "xy":  # its own leave meanwhile: the prefix is held for those that come
        assert new.abort(name)
    new.check_integrity(arrivals.tables())
    assert new.block_manager.num_used == 5
    arrivals.give_back()
    new.check_integrity()
    assert new.block_manager.num_used == 0


def test_a_rollback_gives_references_back() -> None:
    old, _ = prefilled("abc")
    before = [list(seq.block_table) for seq in old.sequences()]
    new = make_scheduler(32)
    arrivals = Arrivals(new)
    arrivals.reserve(states(old))
    arrivals.give_back()
    new.check_integrity()
    assert new.block_manager.num_used == 0
    old.check_integrity()
    assert [seq.block_table for seq in old.sequences()] == before


def test_what_was_preempted_meanwhile_does_not_come() -> None:
    """Nothing of it is computed any more: it starts over where it goes, like any other."""
    old, _ = prefilled("ab")
    new = make_scheduler(32, max_num_seqs=8)
    arrivals = Arrivals(new)
    arrivals.reserve(states(old))
    old.start_over()
    moving = states(old)
    assert arrivals.reserve(moving) == ([[], []], [])
    arrivals.adopt()
    assert new.sequences() == []
    for state in moving:
        new.add(sequence_of(state))
    new.check_integrity()


def test_without_room_a_table_is_empty_and_nothing_is_taken() -> None:
    old, _ = prefilled("abc")
    new = make_scheduler(4)
    arrivals = Arrivals(new)
    tables, _ = arrivals.reserve(states(old))
    assert [len(table) for table in tables] == [3, 3, 0]  # 2 shared, 1, 1
    new.check_integrity(arrivals.tables())


def test_without_prefix_caching_every_block_is_copied() -> None:
    old, _ = prefilled("abc", caching=False)
    new = make_scheduler(32, caching=False)
    arrivals = Arrivals(new)
    tables, blocks_to_fill = arrivals.reserve(states(old))
    assert len(blocks_to_fill) == len({b for t in tables for b in t}) == 9


def test_counts_and_gathered_log_probabilities_travel() -> None:
    old = make_scheduler(max_num_batched_tokens=4)
    old.add(make_sequence("a", 9, prompt_logprobs=1))
    batch = old.schedule()
    assert batch is not None
    given = [(token, 0.0, []) for token in range(4)]
    old.update(batch, [None], {0: given})  # type: ignore[dict-item]
    (seq,) = old.sequences()
    seq.num_preemptions, seq.num_cached_tokens = 2, 4
    new = make_scheduler()
    arrivals = Arrivals(new)
    arrivals.reserve([state_of(seq)])
    arrivals.adopt()
    (there,) = new.sequences()
    assert (there.num_preemptions, there.num_cached_tokens, there.num_computed_tokens) == (2, 4, 4)
    assert there.pending_logprobs == given


@settings(max_examples=120, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 8), st.lists(st.integers(0, 1), min_size=1, max_size=6)),
        min_size=1,
        max_size=7,
    ),
    steps_between=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    num_old_blocks=st.integers(6, 16),
    num_blocks=st.integers(6, 16),
    serving=st.booleans(),
    leaver=st.integers(0, 12),
)
def test_copies_made_while_sequences_run_give_the_same_tokens(
    prompts: list[tuple[int, list[int]]],
    steps_between: list[int],
    num_old_blocks: int,
    num_blocks: int,
    serving: bool,
    leaver: int,
) -> None:
    """Two old replicas into one, which may be serving, in one or more rounds of copies with steps
    between. Sequences end, are preempted or leave meanwhile; what finds no room starts over."""
    caches = [ImitatedCache(), ImitatedCache()]
    olds = [make_scheduler(num_old_blocks, max_num_batched_tokens=9) for _ in caches]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    for i, (n, rest) in enumerate(prompts):
        olds[i % 2].add(Sequence(f"r{i}", [*PREFIX[:n], *rest], params, float(i)))
    new, new_cache = make_scheduler(num_blocks, max_num_batched_tokens=9), ImitatedCache()
    if serving:
        new.add(Sequence("own", [*PREFIX, 1], params, -1.0))

    def step(scheduler: BatchScheduler, cache: ImitatedCache) -> None:
        if (batch := scheduler.schedule()) is not None:
            scheduler.update(batch, cache.execute(batch.to_step_input()))

    departures, arrivals = [Departures(old) for old in olds], Arrivals(new)
    filled = FilledBlocks(BLOCK)
    recompute: list[SequenceState] = []
    for number, num_steps in enumerate(steps_between):
        for _ in range(num_steps):
            for old, cache in zip(olds, caches, strict=True):
                step(old, cache)
            step(new, new_cache)
        if number == 1:
            for old in olds:
                old.abort(f"r{leaver}")
        moving = [(i, state) for i, d in enumerate(departures) for state in d.take()]
        started = [(i, s) for i, s in moving if s.num_computed_tokens]
        tables, fresh = arrivals.reserve([s for _, s in started])
        assert len(set(fresh)) == len(fresh)
        filled.expect(fresh)
        recompute = [s for _, s in moving if not s.num_computed_tokens]
        for (i, state), table in zip(started, tables, strict=True):
            if table:
                computed = state.num_computed_tokens
                copies = filled.take_copies(state.block_table, table, computed)
                new_cache.copy_blocks(caches[i], *copies)
            else:
                recompute.append(state)
        for old, departing in zip(olds, departures, strict=True):
            old.check_integrity(departing.tables())
        new.check_integrity(arrivals.tables())
    step(new, new_cache)  # between reserve and adopt
    arrivals.adopt()
    for state in recompute:
        outputs = list(state.output_token_ids)
        fresh_seq = Sequence(state.request_id, state.prompt_token_ids, params, state.arrival_s)
        new.add(replace(fresh_seq, output_token_ids=outputs))
    new.check_integrity()
    seqs = new.sequences()
    assert {s.request_id for s in seqs} >= {s.request_id for old in olds for s in old.sequences()}
    run_all(new, new_cache)
    for seq in seqs:
        assert seq.output_token_ids == reference(seq.prompt_token_ids, 5)
    for old, departing in zip(olds, departures, strict=True):
        departing.let_go()
        old.check_integrity()
