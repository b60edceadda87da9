"""Prefix caching: by hand, and in long random runs against the imitated KV cache, where a block
that was shared, evicted or matched wrongly shows as a wrong token."""

from collections import Counter, deque
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from imitated_cache import (
    BLOCK,
    ImitatedCache,
    make_scheduler,
    make_sequence,
    reference,
    run_all,
    shape,
)

from engine.batch import ScheduledBatch
from engine.messages import TokenUpdate
from engine.request import SamplingParams, Sequence, TokenLogprobs
from engine.scheduler import BatchScheduler


def sequence(name: str, prompt: list[int], max_tokens: int = 4, **params: object) -> Sequence:
    fields = {"max_tokens": max_tokens, "ignore_eos": True} | params
    return Sequence(name, prompt, SamplingParams(**fields), 0.0)  # type: ignore[arg-type]


def serve(scheduler: BatchScheduler, seq: Sequence, cache: ImitatedCache) -> Sequence:
    scheduler.add(seq)
    run_all(scheduler, cache)
    return seq


def test_a_prompt_seen_before_is_computed_from_its_last_token_on() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    prompt = list(range(9))
    serve(scheduler, sequence("a", prompt, 1), cache)
    scheduler.add(sequence("b", prompt, 1))
    assert shape(scheduler.schedule()) == [("b", 8, 1, True)]


def test_a_prompt_cached_whole_computes_its_last_block_again() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    prompt = list(range(8))
    serve(scheduler, sequence("a", prompt, 1), cache)
    scheduler.add(sequence("b", prompt, 1))
    batch = scheduler.schedule()
    assert shape(batch) == [("b", 4, 4, True)]  # no logits without a token, no writing where shared
    (b,) = scheduler.sequences()
    assert b.block_table[0] == 0
    assert b.block_table[1] != 1


def test_blocks_in_flight_are_not_matched() -> None:
    scheduler, prompt = make_scheduler(num_stages=2), list(range(8))
    scheduler.add(sequence("a", prompt))
    scheduler.add(sequence("b", prompt))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (shape(first), shape(second)) == ([("a", 0, 8, True)], [("b", 0, 8, True)])
    assert first is not None
    assert second is not None
    scheduler.update(first, [1])
    scheduler.check_integrity()
    scheduler.update(second, [1])  # the same content again: the first copy stays the one found
    scheduler.check_integrity()
    scheduler.add(sequence("c", prompt))
    batch = scheduler.schedule()
    assert batch is not None
    c = next(item for item in batch.items if item.seq.request_id == "c")
    assert (c.start, c.seq.block_table[0]) == (4, 0)


def test_an_answer_is_found_by_the_next_turn() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    first = serve(scheduler, sequence("a", list(range(6)), 7), cache)
    asked = [*first.prompt_token_ids, *first.output_token_ids, 5, 6]
    second = sequence("b", asked, 1)
    scheduler.add(second)
    assert shape(scheduler.schedule()) == [("b", 12, 3, True)]  # 12 of 13 tokens were computed
    assert second.num_cached_tokens == 12


def test_what_one_prompt_shares_stays_when_another_ends() -> None:
    scheduler, cache = make_scheduler(num_blocks=6), ImitatedCache()
    serve(scheduler, sequence("a", list(range(9)), 1), cache)
    b, c = sequence("b", list(range(9)), 8), sequence("c", [*range(8), 30, 31], 2)
    scheduler.add(b)
    scheduler.add(c)
    batch = scheduler.schedule()
    assert batch is not None
    assert b.block_table[:2] == c.block_table[:2]
    assert scheduler.block_manager.num_used == 4
    scheduler.update(batch, cache.execute(batch.to_step_input()))
    assert scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.block_manager.num_used == 3
    run_all(scheduler, cache)
    assert c.output_token_ids == reference(c.prompt_token_ids, 2)


def test_recompute_after_preemption_finds_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=5)
    for i, name in enumerate("ab"):
        scheduler.add(make_sequence(name, 8, max_tokens=8, arrival_s=float(i)))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, [1, 2])
    batch = scheduler.schedule()  # a takes the fifth block, b gives way
    assert shape(batch) == [("a", 8, 1, True)]
    assert batch is not None
    scheduler.update(batch, [3])
    b = scheduler.sequences()[1]
    assert (b.num_preemptions, b.block_table) == (1, [])
    assert scheduler.abort("a")
    assert shape(scheduler.schedule()) == [("b", 8, 1, True)]  # its whole prompt is still there
    assert (b.num_cached_tokens, scheduler.block_manager.prefix_cache_hits) == (0, 0)


def test_counts_for_metrics_and_in_the_first_and_last_update() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    serve(scheduler, sequence("a", list(range(9)), 1), cache)
    scheduler.add(sequence("b", [*range(8), 40, 41], 2))
    updates: list[TokenUpdate] = []
    while (batch := scheduler.schedule()) is not None:
        updates += scheduler.update(batch, cache.execute(batch.to_step_input()))
    assert [(u.finish_reason, u.num_cached_tokens) for u in updates] == [("", 8), ("length", 8)]
    blocks = scheduler.block_manager
    assert (blocks.prefix_cache_queries, blocks.prefix_cache_hits) == (9 + 10, 8)


def test_log_probabilities_of_a_prompt_need_all_of_it() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    prompt = list(range(9))
    serve(scheduler, sequence("a", prompt, 1), cache)
    scheduler.add(sequence("b", prompt, 1, prompt_logprobs=0))
    assert shape(scheduler.schedule()) == [("b", 0, 9, True)]
    assert scheduler.block_manager.prefix_cache_queries == 9


def test_switched_off_nothing_is_kept() -> None:
    scheduler, cache = make_scheduler(caching=False), ImitatedCache()
    prompt = list(range(9))
    serve(scheduler, sequence("a", prompt, 1), cache)
    scheduler.add(sequence("b", prompt, 1))
    assert shape(scheduler.schedule()) == [("b", 0, 9, True)]
    blocks = scheduler.block_manager
    assert (blocks.prefix_cache_queries, blocks.prefix_cache_hits) == (0, 0)


# ---------------------------------------------------------------- random runs

STEMS = ([7] * 12, [*range(10)], [7] * 8 + [*range(10, 18)])  # prompts begin with one of these
requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # stem
        st.integers(1, 16),  # tokens of it
        st.lists(st.integers(0, 2), max_size=5),  # tokens after it
        st.integers(1, 9),  # tokens to generate
        st.integers(0, 30),  # step at which it arrives
        st.none() | st.integers(0, 12),  # steps after which it is aborted
    ),
    min_size=1,
    max_size=9,
)


def run_random(
    drawn: list[tuple[int, int, list[int], int, int, int | None]],
    scheduler: BatchScheduler,
    pp: int,
) -> dict[str, list[int]]:
    """Tokens of each request that was not aborted. Checks integrity at every step, and that an
    aborted request is gone after one."""
    cache, step = ImitatedCache(), 0
    waiting: deque[tuple[ScheduledBatch, list[int | None]]] = deque()
    seqs = {
        f"r{i}": replace(sequence(f"r{i}", [*STEMS[stem][:n], *rest] or [1], m), arrival_s=float(i))
        for i, (stem, n, rest, m, _, _) in enumerate(drawn)
    }
    aborted: set[str] = set()
    last = max(at + (after or 0) for *_, at, after in drawn)
    while step <= last or scheduler.has_work:
        for name, (*_, at, after) in zip(seqs, drawn, strict=True):
            if at == step:
                scheduler.add(seqs[name])
            if after is not None and at + after == step and scheduler.abort(name):
                aborted.add(name)
        while len(waiting) < pp and (batch := scheduler.schedule()) is not None:
            waiting.append((batch, cache.execute(batch.to_step_input())))
            scheduler.check_integrity()
        if waiting:
            batch, tokens = waiting.popleft()
            updates = scheduler.update(batch, tokens)
            assert not aborted & {u.request_id for u in updates}
            assert not any(
                seqs[i.seq.request_id].block_table
                for i in batch.items
                if i.seq.request_id in aborted
            )
        scheduler.check_integrity()
        step += 1
        assert step < 2000, "no progress"
    assert scheduler.block_manager.num_used == 0
    return {name: seq.output_token_ids for name, seq in seqs.items() if name not in aborted}


@settings(max_examples=150, deadline=None)
@given(
    drawn=requests,
    num_blocks=st.integers(8, 14),
    budget=st.integers(1, 24),
    max_num_seqs=st.integers(1, 6),
    pp=st.integers(1, 4),
)
def test_caching_changes_no_token(
    drawn: list[tuple[int, int, list[int], int, int, int | None]],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    pp: int,
) -> None:
    for caching in (True, False):
        scheduler = make_scheduler(
            num_blocks,
            caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            num_stages=pp,
        )
        for name, tokens in run_random(drawn, scheduler, pp).items():
            stem, n, rest, max_tokens, _, _ = drawn[int(name[1:])]
            assert tokens == reference([*STEMS[stem][:n], *rest] or [1], max_tokens)


# ---------------------------------------------------------------- log probabilities


def answer(batch: ScheduledBatch) -> dict[int, list[TokenLogprobs]]:
    """What ranks would say: log probability -token for every token that is asked for."""
    step, given = batch.to_step_input(), {}
    for index, spec in enumerate(step.samples):
        targets = step.prompt_targets.get(index)
        wanted = list(targets.token_ids) if targets else []
        wanted += [50] if spec is not None and spec.logprobs is not None else []
        if wanted:
            given[index] = [TokenLogprobs(token, -float(token), []) for token in wanted]
    return given


def step_on(scheduler: BatchScheduler) -> list[TokenUpdate]:
    batch = scheduler.schedule()
    assert batch is not None
    sampled = [50 if item.samples else None for item in batch.items]
    return scheduler.update(batch, sampled, answer(batch))


def test_prompt_log_probabilities_come_with_the_first_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    prompt = [10, 11, 12, 13, 14, 15, 16, 17, 18]  # chunks of 4, 4 and 1
    scheduler.add(sequence("a", prompt, 3, prompt_logprobs=2, logprobs=0))
    batch = scheduler.schedule()
    assert batch is not None
    (targets,) = batch.to_step_input().prompt_targets.values()
    assert (targets.num_top, targets.token_ids) == (2, [11, 12, 13, 14])
    assert scheduler.update(batch, [None], answer(batch)) == []
    assert step_on(scheduler) == []
    (first,) = step_on(scheduler)
    assert [entry.token_id for entry in first.logprobs] == [*prompt[1:], 50]
    (second,) = step_on(scheduler)
    assert [entry.token_id for entry in second.logprobs] == [50]


def test_a_chunk_that_ends_the_prompt_has_one_target_less() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence("a", [10, 11, 12], 1, prompt_logprobs=0))
    scheduler.add(sequence("b", [10], 1, prompt_logprobs=0))  # no token follows another
    batch = scheduler.schedule()
    assert batch is not None
    targets = batch.to_step_input().prompt_targets
    assert {index: t.token_ids for index, t in targets.items()} == {0: [11, 12]}


def test_preemption_inside_the_prompt_asks_again_after_it_does_not() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=8)
    a, b = make_sequence("a", 6, 9), sequence("b", [20, *range(21, 30)], 4, prompt_logprobs=0)
    b = replace(b, arrival_s=1.0)
    scheduler.add(a)
    scheduler.add(b)
    seen: list[list[int]] = []
    while scheduler.has_work:
        for update in step_on(scheduler):
            if update.request_id == "b":
                seen.append([entry.token_id for entry in update.logprobs])
        scheduler.check_integrity()
    assert b.num_preemptions > 0
    assert seen == [[*range(21, 30)], [], [], []]


def test_only_what_is_asked_for_goes_to_the_sampler() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence("greedy", [1, 2], temperature=0.0, top_p=0.5, seed=3))
    scheduler.add(sequence("min-p", [3, 4], temperature=0.7, min_p=0.1, logprobs=5))
    scheduler.add(sequence("penalised", [5, 6], temperature=0.0, presence_penalty=1.5))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, [7, 8, 9])
    batch = scheduler.schedule()
    assert batch is not None
    greedy, min_p, penalised = batch.to_step_input().samples
    assert greedy is not None
    assert (greedy.temperature, greedy.penalties, greedy.logprobs) == (0.0, None, None)
    assert min_p is not None
    assert (min_p.min_p, min_p.logprobs, min_p.position, min_p.penalties) == (0.1, 5, 1, None)
    assert penalised is not None
    assert penalised.penalties is not None
    assert penalised.penalties.presence == 1.5
    assert penalised.penalties.prompt_token_ids == [5, 6]
    assert penalised.penalties.output_token_ids == [9]


def test_blocks_of_a_table_are_distinct_however_prompts_repeat() -> None:
    scheduler, cache = make_scheduler(), ImitatedCache()
    seq = serve(scheduler, sequence("a", [7] * 12, 1), cache)
    again = sequence("b", [7] * 12, 1)
    scheduler.add(again)
    scheduler.schedule()
    assert max(Counter(again.block_table).values()) == 1
    assert len(again.block_table) == 12 // BLOCK
    assert seq.output_token_ids == reference([7] * 12, 1)
