"""Iteration-level continuous batching of many replicas, compiled. Pure.

The rules are those of `engine.scheduler.BatchScheduler` (order of service, chunked prefill, block
budget, preemption, micro-batches of a pipeline) and of `engine.router.pick`; tests hold both equal.
Traces tell no tokens, so prefix caching is a fraction of each prompt's blocks found at admission,
and every sequence holds blocks of its own.

At one instant steps end first, then requests arrive, then replicas start steps; a step that could
start at `until_s` is left to the next call, so that cutting a span of time into pieces changes
nothing.

When replicas share the processors of a host, all steps in flight slow down by one factor, which
grows with the processors that they keep busy together. Replicas therefore keep their times on one
work clock, which runs slower by it; without sharing it is the clock on the wall. What memory bounds
slows down besides, and ranks that wait for one another more than others, by how many are busy when
a step starts.

All compiled functions are in this one file, since numba's files of compiled code are renewed when
the file of a function changes, not when that of a function it calls does. Those that neither make
an array nor are given one by what they call do without numba's counting of references, which took
half of the time; their callers hold on to what they pass.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from envs.surrogate.layout import (
    FINISHED,
    HELD,
    IN_RUNNING,
    IN_WAITING,
    MAX_BLOCK_SIZE,
    MAX_GAPS,
    NONE,
    REJECTED,
    RUNNING,
    WAITING,
)

FAR = np.iinfo(np.int64).max

making = numba.njit(cache=True, nogil=True)
UNCOUNTED: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}
compiled = numba.njit(**UNCOUNTED)
inlined = numba.njit(inline="always")  # where a call would cost a fifth of the speed


@compiled
def _before(seqs: Any, a: int, b: int) -> Any:
    if seqs[a].arrival_s != seqs[b].arrival_s:
        return seqs[a].arrival_s < seqs[b].arrival_s
    return seqs[a].number < seqs[b].number


@compiled
def insert(seqs: Any, linked: Any, s: int, near: int) -> None:
    """Put slot `s` into the list record `linked` at its place in arrival order, which is looked
    for from slot `near` of the list on; NONE: from the head."""
    after = linked.tail
    if after != NONE and _before(seqs, s, after):
        after = near
        while after != NONE and _before(seqs, s, after):
            after = seqs[after].prev
        following = linked.head if after == NONE else seqs[after].next
        while following != NONE and _before(seqs, following, s):
            after = following
            following = seqs[following].next
    following = linked.head if after == NONE else seqs[after].next
    seqs[s].prev = after
    seqs[s].next = following
    if after == NONE:
        linked.head = s
    else:
        seqs[after].next = s
    if following == NONE:
        linked.tail = s
    else:
        seqs[following].prev = s
    linked.count += 1
    linked.prompt_tokens += seqs[s].prompt_tokens


@compiled
def remove(seqs: Any, linked: Any, s: int) -> None:
    """Take slot `s` out of the list it is in."""
    before, after = seqs[s].prev, seqs[s].next
    if before == NONE:
        linked.head = after
    else:
        seqs[before].next = after
    if after == NONE:
        linked.tail = before
    else:
        seqs[after].prev = before
    seqs[s].next = seqs[s].prev = NONE
    linked.count -= 1
    linked.prompt_tokens -= seqs[s].prompt_tokens


@making
def slots_of(seqs: Any, linked: Any) -> tuple[Any, Any]:
    """The slots of a list in order, and whether they are as many as it counts."""
    slots, num, s = np.empty(linked.count, np.int64), 0, linked.head
    while s != NONE and num < len(slots):
        slots[num] = s
        num, s = num + 1, seqs[s].next
    return slots[:num], num == linked.count and s == NONE


@compiled
def _blocks_needed(tokens: int, block_size: int) -> Any:
    return (tokens + block_size - 1) // block_size


@compiled
def _share(sequences: int, depth: int) -> Any:
    """Sequences of one micro-batch when every stage is to have one."""
    return (sequences + depth - 1) // depth


@compiled
def _let_go(replica: Any, seq: Any) -> None:
    """Free a sequence's blocks, but for those that are being copied: these stay in use."""
    replica.free_blocks += seq.blocks - seq.copied_blocks
    replica.copied_blocks += seq.copied_blocks
    seq.blocks = seq.copied_blocks = 0


@compiled
def preempt(seqs: Any, replica: Any, lists: Any, s: int) -> None:
    """Take a running sequence's blocks; it waits."""
    remove(seqs, lists[RUNNING], s)
    _let_go(replica, seqs[s])
    replica.preemptions_total += 1
    seqs[s].computed_tokens = 0
    seqs[s].num_preemptions += 1
    seqs[s].status = IN_WAITING
    insert(seqs, lists[WAITING], s, NONE)


@compiled
def _make_room(
    seqs: Any, replica: Any, lists: Any, s: int, tokens: int, block_size: int
) -> tuple[Any, Any]:
    """Grow the table of running `s` to hold `tokens`, preempting later ones.

    Returns (granted, anything preempted).
    """
    if tokens <= seqs[s].blocks * block_size:  # nearly always, and sooner known than divided
        return True, False
    preempted = False
    while True:
        missing = _blocks_needed(tokens, block_size) - seqs[s].blocks
        if missing <= replica.free_blocks:
            replica.free_blocks -= missing
            seqs[s].blocks += missing
            return True, preempted
        victim = lists[RUNNING].tail
        while seqs[victim].in_flight_tokens > 0:
            victim = seqs[victim].prev
        if victim == s and replica.num_batches > 0:
            return False, preempted  # steps in flight may give blocks back: wait for them
        preempt(seqs, replica, lists, victim)
        preempted = True
        if victim == s:
            return False, preempted


@compiled
def _cached_tokens(prompt_tokens: int, limits: Any) -> Any:
    """Tokens of a prompt whose keys and values a sequence finds in the cache when it is admitted:
    whole blocks, without the last token, which is computed in any case."""
    whole = (prompt_tokens - 1) // limits.block_size
    return limits.block_size * int(whole * limits.prefix_hit_rate)


@compiled
def _begin_cruise(cruise: Any, block_size: int, now_s: float) -> None:
    """With no sequence in it: those that complete a step join."""
    cruise.is_on, cruise.step, cruise.num_seqs, cruise.context = 1, 0, 0, 0
    cruise.next_end_at, cruise.num_gaps, cruise.last_end_s = FAR, 0, now_s
    for i in range(block_size):
        cruise.num_need[i] = 0


@compiled
def _try_join(seqs: Any, cruise: Any, limits: Any, s: int) -> None:
    """Sequence `s`, which has made a token, makes one in every step from now on. If another that
    does not comes before it, it stays out."""
    seq, before = seqs[s], seqs[s].prev
    if before != NONE and seqs[before].ends_at == 0:
        return
    if seq.blocks != _blocks_needed(seq.computed_tokens, limits.block_size):
        return
    left = min(seq.target_tokens, limits.max_model_len - seq.prompt_tokens) - seq.output_tokens
    seq.settled_at, seq.ends_at = cruise.step, cruise.step + left
    cruise.next_end_at = min(cruise.next_end_at, seq.ends_at)
    cruise.num_seqs += 1
    cruise.context += seq.computed_tokens
    cruise.num_need[(cruise.step - seq.computed_tokens) % limits.block_size] += 1


@compiled
def _settle(seqs: Any, cruise: Any, block_size: int, in_flight: int, s: int) -> None:
    """Give a sequence of the cruise the tokens and blocks of the steps since it was settled."""
    seq = seqs[s]
    steps = cruise.step - seq.settled_at
    if steps > 0:
        i = 0
        while cruise.gap_step[i] <= seq.settled_at:
            i += 1
        seq.longest_gap_s = max(seq.longest_gap_s, cruise.gap_s[i])
        seq.last_token_s = cruise.last_end_s
        seq.computed_tokens += steps
        seq.output_tokens += steps
        seq.settled_at = cruise.step
    seq.in_flight_tokens = in_flight
    seq.blocks = max(seq.blocks, _blocks_needed(seq.computed_tokens + in_flight, block_size))


@compiled
def _note_gap(seqs: Any, cruise: Any, lists: Any, block_size: int, gap_s: float) -> None:
    """A step of the cruise ended so long after the one before."""
    num = cruise.num_gaps
    while num > 0 and cruise.gap_s[num - 1] <= gap_s:
        num -= 1
    cruise.gap_step[num], cruise.gap_s[num] = cruise.step, gap_s
    cruise.num_gaps = num + 1
    if cruise.num_gaps == MAX_GAPS:
        s = lists[RUNNING].head
        for _ in range(cruise.num_seqs):
            _settle(seqs, cruise, block_size, 0, s)
            s = seqs[s].next
        cruise.num_gaps = 0


@compiled
def _end_cruise(seqs: Any, replica: Any, lists: Any, batch: Any, limits: Any) -> None:
    """Settle all; the batch in flight has all its sequences again."""
    cruise = replica.cruise
    cruise.is_on = 0
    in_flight = replica.num_batches
    s, left, last, others = lists[RUNNING].head, cruise.num_seqs, NONE, batch.head
    while left > 0:
        if seqs[s].ends_at > 0:
            _settle(seqs, cruise, limits.block_size, in_flight, s)
            seqs[s].ends_at = 0
            left -= 1
            if in_flight:
                last = _append_item(seqs, batch, last, s, 1)
        s = seqs[s].next
    if last != NONE:
        seqs[last].next_in_batch = others


@compiled
def _first_other(seqs: Any, cruise: Any, lists: Any) -> Any:
    """The first running sequence that is not in the cruise; those that are come before."""
    num_others = lists[RUNNING].count - cruise.num_seqs
    if num_others == 0:
        return NONE
    s = lists[RUNNING].tail
    for _ in range(num_others - 1):
        s = seqs[s].prev
    return s


@compiled
def _can_cruise_on(seqs: Any, replica: Any, lists: Any, limits: Any) -> Any:
    """Whether budget and blocks are enough for the next step of all that run, so that those in the
    cruise need no look at."""
    cruise, block_size = replica.cruise, limits.block_size
    missing = cruise.num_need[cruise.step % block_size]
    budget = limits.max_num_batched_tokens - cruise.num_seqs
    if budget < 0:
        return False
    s = _first_other(seqs, cruise, lists)
    while s != NONE and budget > 0:
        start = seqs[s].computed_tokens
        tokens = min(seqs[s].prompt_tokens + seqs[s].output_tokens - start, budget)
        missing += max(0, _blocks_needed(start + tokens, block_size) - seqs[s].blocks)
        budget -= tokens
        s = seqs[s].next
    return missing == 0 or missing <= replica.free_blocks


@compiled
def _schedule(
    seqs: Any,
    replica: Any,
    lists: Any,
    limits: Any,
    now_s: float,
    batch: Any,
    memory: float,
    stretch: float,
) -> Any:
    """Fill `batch` and start it at `now_s`, with memory so many times as slow and then all of it
    `stretch` times; False when no sequence can make a step.

    The number of tokens of each item is kept in its sequence until the step ends.
    """
    budget = limits.max_num_batched_tokens
    num_items, context, pairs, last, preempted = 0, 0, 0.0, NONE, False
    share_of_running = _share(lists[RUNNING].count, replica.depth)
    live = lists[RUNNING].count + lists[WAITING].count
    share_of_all = _share(min(live, limits.max_num_seqs), replica.depth)
    cruise, is_in_order, s = replica.cruise, True, lists[RUNNING].head
    if cruise.is_on and not _can_cruise_on(seqs, replica, lists, limits):
        _end_cruise(seqs, replica, lists, batch, limits)
    if cruise.is_on:
        num_items, budget = cruise.num_seqs, budget - cruise.num_seqs
        context = cruise.context + cruise.num_seqs
        pairs = float(context)
        replica.free_blocks -= cruise.num_need[cruise.step % limits.block_size]
        s = _first_other(seqs, cruise, lists)
    batch.head = NONE
    while s != NONE and budget > 0 and num_items < share_of_running:
        if seqs[s].in_flight_tokens == 0:
            start = seqs[s].computed_tokens
            wanted = seqs[s].prompt_tokens + seqs[s].output_tokens - start
            tokens = min(wanted, budget)
            granted, evicted = _make_room(
                seqs, replica, lists, s, start + tokens, limits.block_size
            )
            preempted = preempted or evicted
            if seqs[s].status != IN_RUNNING:
                break  # all behind it are in flight
            if granted:
                last = _append_item(seqs, batch, last, s, tokens)
                num_items, budget = num_items + 1, budget - tokens
                context, pairs = context + start + tokens, pairs + _pairs(start, tokens)
        s = seqs[s].next
    while (
        not preempted
        and budget > 0
        and num_items < share_of_all
        and lists[WAITING].head != NONE
        and lists[RUNNING].count < limits.max_num_seqs
    ):
        s = lists[WAITING].head
        cached = _cached_tokens(seqs[s].prompt_tokens, limits)
        tokens = min(seqs[s].prompt_tokens + seqs[s].output_tokens - cached, budget)
        blocks = _blocks_needed(cached + tokens, limits.block_size)
        if blocks > replica.free_blocks:
            break
        replica.free_blocks -= blocks
        seqs[s].blocks, seqs[s].computed_tokens = blocks, cached
        remove(seqs, lists[WAITING], s)
        seqs[s].status = IN_RUNNING
        insert(seqs, lists[RUNNING], s, NONE)
        following = seqs[s].next
        is_in_order = is_in_order and (following == NONE or seqs[following].ends_at == 0)
        last = _append_item(seqs, batch, last, s, tokens)
        num_items, budget = num_items + 1, budget - tokens
        context, pairs = context + cached + tokens, pairs + _pairs(cached, tokens)
    if num_items == 0:
        replica.may_start = 1 if preempted and replica.num_batches == 0 else 0
        return False
    num_tokens = limits.max_num_batched_tokens - budget
    batch.num_items, batch.num_tokens, batch.context = num_items, num_tokens, context
    step_s = step_seconds(replica.step, num_tokens, num_items, context, pairs, memory)
    _start(replica, batch, now_s, stretch * step_s)
    if not is_in_order:
        _end_cruise(seqs, replica, lists, batch, limits)
    return True


@compiled
def _append_item(seqs: Any, batch: Any, last: int, s: int, tokens: int) -> Any:
    seqs[s].in_flight_tokens = tokens
    seqs[s].next_in_batch = NONE
    if last == NONE:
        batch.head = s
    else:
        seqs[last].next_in_batch = s
    return s


@compiled
def _pairs(start: int, tokens: int) -> Any:
    """`engine.profile.attention_pairs`."""
    return tokens * (start + 0.5 * (tokens + 1))


@compiled
def _token_seconds(step: Any, tokens: int) -> Any:
    """`engine.profile.StepTimeModel.token_term_s`."""
    last = step.num_knots - 1
    if last < 0:
        return step.per_token_s * tokens
    if tokens >= step.token_knots[last]:
        return step.token_s[last] + step.per_token_s * (tokens - step.token_knots[last])
    if tokens <= step.token_knots[0]:
        return step.token_s[0]
    i = 1
    while tokens > step.token_knots[i]:
        i += 1
    rise_s = step.token_s[i] - step.token_s[i - 1]
    slope = rise_s / (step.token_knots[i] - step.token_knots[i - 1])
    return slope * (tokens - step.token_knots[i - 1]) + step.token_s[i - 1]


@compiled
def step_seconds(
    step: Any, tokens: int, sequences: int, context_tokens: int, pairs: float, memory: float
) -> Any:
    """`engine.profile.StepTimeModel.step_s` of a record `STEP`, added up in the same order."""
    fixed_s, tokens_s = _fixed_seconds(step, sequences), _token_seconds(step, tokens)
    slopes = step.per_context_token_s, step.per_pair_s
    return _added_up(fixed_s, tokens_s, slopes, context_tokens, pairs, memory)


@inlined
def _fixed_seconds(step: Any, sequences: int) -> Any:
    return step.base_s + step.per_seq_s * sequences


@inlined
def _added_up(
    fixed_s: float, tokens_s: float, slopes: Any, context_tokens: int, pairs: float, memory: float
) -> Any:
    """Of `step_seconds`, what changes from step to step while the sequences stay."""
    per_context_token_s, per_pair_s = slopes
    bound_by_memory_s = fixed_s + per_context_token_s * context_tokens
    arithmetic_s = tokens_s + per_pair_s * pairs
    return memory * bound_by_memory_s + arithmetic_s


@inlined
def _ends(step: Any, now_s: float, step_s: float, last_end_s: float) -> tuple[Any, Any]:
    """When a step that starts now ends, and when its first stage does. With pp > 1 it also waits
    for the last stage to end the one before."""
    stage_s = step.stage_share * step_s
    return max(now_s + step_s, last_end_s + stage_s), now_s + stage_s


@compiled
def _start(replica: Any, batch: Any, now_s: float, step_s: float) -> None:
    batch.end_s, replica.ready_s = _ends(replica.step, now_s, step_s, replica.last_end_s)
    replica.last_end_s = batch.end_s
    replica.num_batches += 1


@compiled
def _trace_step(
    seqs: Any, replica: Any, batch: Any, row: int, now_s: float, counts: Any, trace: Any
) -> None:
    """Write the items of a step that starts, as far as `trace` has room."""
    batch.item, s = counts.traced, batch.head
    while s != NONE:
        if counts.traced < len(trace):
            item = trace[counts.traced]
            item.row, item.start_s, item.end_s = row, now_s, np.nan
            item.index, item.start = seqs[s].index, seqs[s].computed_tokens
            item.tokens = seqs[s].in_flight_tokens
            item.free_blocks = max(replica.free_blocks, 0)
            item.preemptions = replica.preemptions_total
        counts.traced += 1
        s = seqs[s].next_in_batch


@compiled
def _finish(seqs: Any, replica: Any, lists: Any, counts: Any, ended: Any, s: int) -> None:
    """A running sequence is complete and leaves."""
    remove(seqs, lists[RUNNING], s)
    _let_go(replica, seqs[s])
    replica.num_outstanding -= 1
    seqs[s].status = FINISHED
    ended[counts.ended] = s
    counts.ended += 1
    counts.live -= 1
    counts.finished += 1


@compiled
def _end_step_of_cruise(
    seqs: Any, replica: Any, lists: Any, limits: Any, counts: Any, ended: Any, now_s: float
) -> None:
    """A step has ended at `now_s`: the same as `_finish_step`, for the sequences of the cruise."""
    cruise = replica.cruise
    cruise.step += 1
    gap_s = now_s - cruise.last_end_s
    cruise.last_end_s = now_s
    if cruise.num_seqs == 0:
        return
    cruise.context += cruise.num_seqs
    replica.generated_total += cruise.num_seqs
    _note_gap(seqs, cruise, lists, limits.block_size, gap_s)
    if cruise.step < cruise.next_end_at:
        return
    next_end_at, s = FAR, lists[RUNNING].head
    for _ in range(cruise.num_seqs):
        following = seqs[s].next
        if seqs[s].ends_at > cruise.step:
            next_end_at = min(next_end_at, seqs[s].ends_at)
        else:
            _settle(seqs, cruise, limits.block_size, 0, s)
            seqs[s].ends_at = 0
            computed = seqs[s].computed_tokens
            cruise.num_seqs -= 1
            cruise.context -= computed
            cruise.num_need[(cruise.step - computed) % limits.block_size] -= 1
            _finish(seqs, replica, lists, counts, ended, s)
        s = following
    cruise.next_end_at = next_end_at


@compiled
def _finish_step(
    seqs: Any,
    replica: Any,
    lists: Any,
    batch: Any,
    limits: Any,
    counts: Any,
    ended: Any,
    trace: Any,
    now_s: float,
) -> None:
    """Take the tokens of a step that has ended at `now_s`; sequences that are complete leave."""
    cruise = replica.cruise
    if cruise.is_on:
        _end_step_of_cruise(seqs, replica, lists, limits, counts, ended, now_s)
    s, item = batch.head, batch.item
    while s != NONE:
        if item < len(trace):
            trace[item].end_s = now_s
        item += 1
        following = seqs[s].next_in_batch
        seqs[s].computed_tokens += seqs[s].in_flight_tokens
        seqs[s].in_flight_tokens = 0
        num_tokens = seqs[s].prompt_tokens + seqs[s].output_tokens
        if seqs[s].computed_tokens == num_tokens:
            if seqs[s].output_tokens == 0:
                seqs[s].first_token_s = now_s
            else:
                gap_s = now_s - seqs[s].last_token_s
                seqs[s].longest_gap_s = max(seqs[s].longest_gap_s, gap_s)
            seqs[s].last_token_s = now_s
            seqs[s].output_tokens += 1
            replica.generated_total += 1
            if (
                seqs[s].output_tokens >= seqs[s].target_tokens
                or num_tokens + 1 >= limits.max_model_len
            ):
                _finish(seqs, replica, lists, counts, ended, s)
            elif cruise.is_on:
                _try_join(seqs, cruise, limits, s)
        s = following
    replica.first_batch = (replica.first_batch + 1) % replica.depth
    replica.num_batches -= 1
    replica.wake_s = batch.end_s
    replica.may_start = 1


@inlined
def _end_seen(step: Any, end_s: float, ready_s: float) -> Any:
    """When the end of a step in flight is seen."""
    return max(end_s, ready_s) if step.leader_computes else end_s


@inlined
def _next_end(replica: Any, batches: Any) -> Any:
    """`_end_seen` of the oldest step in flight; inf without one."""
    if replica.num_batches == 0:
        return np.inf
    return _end_seen(replica.step, batches[replica.first_batch].end_s, replica.ready_s)


@inlined
def _next_event(replica: Any, batches: Any) -> tuple[Any, Any]:
    """(when on the work clock, whether a step ends then; else one may start)."""
    end_s, start_s = _next_end(replica, batches), np.inf
    if replica.may_start and not replica.is_paused and replica.num_batches < replica.depth:
        start_s = max(replica.ready_s, replica.wake_s)
    return min(end_s, start_s), end_s <= start_s


@inlined
def _try_start(
    seqs: Any,
    replica: Any,
    lists: Any,
    batches: Any,
    limits: Any,
    counts: Any,
    trace: Any,
    row: int,
    work_s: float,
    now_s: float,
    memory: float,
    stretch: float,
) -> None:
    """Start a step at `now_s` (`work_s` on the work clock) if any sequence can make one."""
    index = (replica.first_batch + replica.num_batches) % replica.depth
    if _schedule(seqs, replica, lists, limits, work_s, batches[index], memory, stretch):
        replica.wake_s = work_s
        if len(trace) > 0:
            _trace_step(seqs, replica, batches[index], row, now_s, counts, trace)


@compiled
def _num_to_coast(seqs: Any, replica: Any, lists: Any, batches: Any, limits: Any) -> Any:
    """How often each batch in flight can at least be started anew just as it is: every sequence is
    in one and makes one token a step, none waits, none ends, and there are blocks enough.

    Then the steps are known without a look at the sequences; `_settle_coasted` does that after.
    """
    if lists[WAITING].count > 0 or replica.is_paused or replica.num_batches == 0:
        return 0
    num_items = 0
    for i in range(replica.num_batches):
        batch = batches[(replica.first_batch + i) % replica.depth]
        if batch.num_tokens != batch.num_items:
            return 0
        if batch.num_items > _share(lists[RUNNING].count, replica.depth):
            return 0
        num_items += batch.num_items
    if num_items != lists[RUNNING].count:
        return 0
    least, s = limits.max_model_len, lists[RUNNING].head
    while s != NONE:
        left = min(seqs[s].target_tokens, limits.max_model_len - seqs[s].prompt_tokens)
        least = min(least, left - 1 - seqs[s].output_tokens)
        if seqs[s].output_tokens == 0 or least <= 0:
            return 0
        s = seqs[s].next
    blocks, s = 0, lists[RUNNING].head
    while s != NONE:
        needed = seqs[s].computed_tokens + 1 + least
        if needed > seqs[s].blocks * limits.block_size:
            blocks += _blocks_needed(needed, limits.block_size) - seqs[s].blocks
        s = seqs[s].next
    return least if blocks <= replica.free_blocks else 0


@compiled
def _coast(replica: Any, batches: Any, most: int, until_s: float) -> Any:
    """End and start again the batches in flight, as `_run_replica` would, each at most `most`
    times. Returns how many times more each could be by the count of its sequences' tokens."""
    depth = replica.depth
    for i in range(replica.num_batches):
        batches[(replica.first_batch + i) % depth].coasted = 0
    while True:
        batch = batches[replica.first_batch]
        end_s = _next_end(replica, batches)
        start_s = max(replica.ready_s, end_s)
        if batch.coasted == most or end_s > until_s or start_s >= until_s:
            break
        if replica.num_batches > 1:
            following_s = batches[(replica.first_batch + 1) % depth].end_s
            if replica.step.leader_computes:
                following_s = max(following_s, replica.ready_s)
            if following_s <= start_s:
                break
        if batch.coasted == 0:
            batch.first_s, batch.longest_gap_s = end_s, 0.0
        else:
            batch.longest_gap_s = max(batch.longest_gap_s, end_s - batch.last_s)
        batch.last_s = end_s
        batch.coasted += 1
        batch.context += batch.num_items
        index = (replica.first_batch + replica.num_batches) % depth
        replica.first_batch = (replica.first_batch + 1) % depth
        replica.num_batches -= 1
        if replica.num_batches + 1 < depth:
            batches[index] = batch
        batch = batches[index]
        context = batch.context
        step_s = step_seconds(
            replica.step, batch.num_items, batch.num_items, context, float(context), 1.0
        )
        _start(replica, batch, start_s, step_s)
        replica.wake_s, replica.may_start = start_s, 1
    coasted = 0
    for i in range(replica.num_batches):
        coasted = max(coasted, batches[(replica.first_batch + i) % depth].coasted)
    return most - coasted


@compiled
def _least_seconds(step: Any) -> Any:
    """That any step takes."""
    if min(step.per_token_s, step.per_seq_s, step.per_context_token_s, step.per_pair_s) < 0.0:
        return 0.0
    least_s = step.per_token_s if step.num_knots == 0 else step.token_s[0]
    for i in range(1, step.num_knots):
        least_s = min(least_s, step.token_s[i])
    return max(0.0, (step.base_s + least_s) * (1.0 - 1e-9))


@compiled
def _settle_coasted(seqs: Any, replica: Any, batches: Any, limits: Any) -> None:
    """Give the sequences in flight the tokens and blocks of the steps coasted."""
    for i in range(replica.num_batches):
        batch = batches[(replica.first_batch + i) % replica.depth]
        steps, s = batch.coasted, batch.head
        while steps > 0 and s != NONE:
            gap_s = max(batch.longest_gap_s, batch.first_s - seqs[s].last_token_s)
            seqs[s].longest_gap_s = max(seqs[s].longest_gap_s, gap_s)
            seqs[s].last_token_s = batch.last_s
            seqs[s].computed_tokens += steps
            seqs[s].output_tokens += steps
            needed = seqs[s].computed_tokens + 1
            if needed > seqs[s].blocks * limits.block_size:
                missing = _blocks_needed(needed, limits.block_size) - seqs[s].blocks
                seqs[s].blocks += missing
                replica.free_blocks -= missing
            s = seqs[s].next_in_batch
        replica.generated_total += steps * batch.num_items


@compiled
def _cruise(seqs: Any, replica: Any, lists: Any, batch: Any, limits: Any, until_s: float) -> None:
    """End and start steps of nothing but the cruise, as `_run_alone` would, as long as no sequence
    ends, blocks are enough and the next start is before `until_s`. Nearly all steps are these, so
    that what changes with each is kept out of memory."""
    cruise, of_step = replica.cruise, replica.step
    num, block_size = cruise.num_seqs, limits.block_size
    step, context, ended_s = cruise.step, cruise.context, cruise.last_end_s
    end_s, ready_s, last_end_s = batch.end_s, replica.ready_s, replica.last_end_s
    wake_s, free_blocks, place = replica.wake_s, replica.free_blocks, (step + 1) % block_size
    fixed_s, tokens_s = _fixed_seconds(of_step, num), _token_seconds(of_step, num)
    slopes = of_step.per_context_token_s, of_step.per_pair_s
    last_s, before_s = _last_gaps(cruise)
    while step + 1 < cruise.next_end_at:
        seen_s = _end_seen(of_step, end_s, ready_s)
        start_s = max(ready_s, seen_s)
        missing = cruise.num_need[place]
        if start_s >= until_s or seen_s > until_s or (missing > 0 and missing > free_blocks):
            break
        step, context, gap_s, ended_s = step + 1, context + num, seen_s - ended_s, seen_s
        if last_s <= gap_s < before_s:  # takes the place of the last one
            cruise.gap_step[cruise.num_gaps - 1] = step
            cruise.gap_s[cruise.num_gaps - 1] = last_s = gap_s
        else:
            cruise.step, cruise.last_end_s = step, seen_s
            _note_gap(seqs, cruise, lists, block_size, gap_s)
            last_s, before_s = _last_gaps(cruise)
        free_blocks -= missing
        place = place + 1 if place + 1 < block_size else 0
        of_all = context + num
        step_s = _added_up(fixed_s, tokens_s, slopes, of_all, float(of_all), 1.0)
        end_s, ready_s = _ends(of_step, start_s, step_s, last_end_s)
        last_end_s, wake_s = end_s, start_s
    if context == cruise.context:
        return
    replica.generated_total += context - cruise.context
    cruise.step, cruise.context, cruise.last_end_s = step, context, ended_s
    batch.head, batch.num_items, batch.num_tokens = NONE, num, num
    batch.context, batch.end_s = context + num, end_s
    replica.ready_s, replica.last_end_s = ready_s, last_end_s
    replica.wake_s, replica.may_start, replica.free_blocks = wake_s, 1, free_blocks


@inlined
def _last_gaps(cruise: Any) -> tuple[Any, Any]:
    """The last gap noted and the one before it; inf for what there is not."""
    num = cruise.num_gaps
    last_s = cruise.gap_s[num - 1] if num > 0 else np.inf
    return last_s, cruise.gap_s[num - 2] if num > 1 else np.inf


@compiled
def _run_alone(
    seqs: Any,
    replica: Any,
    lists: Any,
    batch: Any,
    limits: Any,
    counts: Any,
    ended: Any,
    trace: Any,
    until_s: float,
) -> None:
    """`_run_replica` where one step is in flight at a time and none is traced.

    Nearly all that run make one token in every step. From the first step that ends on these are in
    a *cruise*: what steps do to them is known from a few counts, and they are looked at when one of
    them ends, or with the last of the cruise (see `_can_cruise_on`).
    """
    cruise = replica.cruise
    while True:
        if replica.num_batches > 0:
            is_quiet = cruise.num_seqs > 0 and lists[RUNNING].count == cruise.num_seqs
            is_quiet = is_quiet and lists[WAITING].count == 0
            if cruise.is_on and is_quiet and not replica.is_paused:
                _cruise(seqs, replica, lists, batch, limits, until_s)
            end_s = _end_seen(replica.step, batch.end_s, replica.ready_s)
            if end_s > until_s:
                replica.due_s = end_s
                if cruise.is_on and is_quiet:
                    more = cruise.next_end_at - cruise.step - 1
                    replica.due_s += more * _least_seconds(replica.step)
                return
            batch.end_s = end_s
            if not cruise.is_on:
                _begin_cruise(cruise, limits.block_size, end_s)
            _finish_step(seqs, replica, lists, batch, limits, counts, ended, trace, end_s)
        else:
            start_s = np.inf
            if replica.may_start and not replica.is_paused:
                start_s = max(replica.ready_s, replica.wake_s)
            if start_s >= until_s:
                replica.due_s = start_s
                return
            if _schedule(seqs, replica, lists, limits, start_s, batch, 1.0, 1.0):
                replica.wake_s = start_s


@compiled
def _run_replica(
    seqs: Any,
    replica: Any,
    lists: Any,
    batches: Any,
    limits: Any,
    counts: Any,
    ended: Any,
    trace: Any,
    row: int,
    until_s: float,
) -> None:
    """Steps that end by `until_s`; steps that start before it. `due_s` is when the next one is, or
    a later time before which no sequence ends: so long the router needs to know of none."""
    if replica.depth == 1 and len(trace) == 0 and limits.block_size <= MAX_BLOCK_SIZE:
        _run_alone(seqs, replica, lists, batches[0], limits, counts, ended, trace, until_s)
        return
    while True:
        most = 0
        if len(trace) == 0 and _next_end(replica, batches) <= until_s:
            most = _num_to_coast(seqs, replica, lists, batches, limits)
        if most > 0:
            most = _coast(replica, batches, most, until_s)
            _settle_coasted(seqs, replica, batches, limits)
        end_s, start_s = _next_end(replica, batches), np.inf
        if replica.may_start and not replica.is_paused and replica.num_batches < replica.depth:
            start_s = max(replica.ready_s, replica.wake_s)
        if end_s <= start_s:
            if end_s > until_s or end_s == np.inf:
                replica.due_s = end_s
                if most > 0:
                    replica.due_s += most * _least_seconds(replica.step)
                return
            batch = batches[replica.first_batch]
            batch.end_s = end_s
            _finish_step(seqs, replica, lists, batch, limits, counts, ended, trace, end_s)
        else:
            if start_s >= until_s:
                replica.due_s = start_s
                return
            index = (replica.first_batch + replica.num_batches) % replica.depth
            if _schedule(seqs, replica, lists, limits, start_s, batches[index], 1.0, 1.0):
                replica.wake_s = start_s
                if len(trace) > 0:
                    _trace_step(seqs, replica, batches[index], row, start_s, counts, trace)


@compiled
def work_time(clock: Any, now_s: float) -> Any:
    """What the work clock shows at `now_s`, when something happens."""
    if clock.num_knots == 0:
        return now_s
    clock.work_s += (now_s - clock.wall_s) * clock.rate
    clock.wall_s = now_s
    return clock.work_s


@compiled
def _between(knots: Any, values: Any, count: int, busy: float) -> Any:
    """Linear between knots, constant before and beyond; 1 without any."""
    if count == 0:
        return 1.0
    if busy <= knots[0]:
        return values[0]
    if busy >= knots[count - 1]:
        return values[count - 1]
    i = 1
    while busy > knots[i]:
        i += 1
    share = (busy - knots[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


@compiled
def _in_flight(replica: Any, more: int) -> Any:
    """Steps at work with so many more than there are: of those of a pipeline only as many as its
    slowest stage lets through."""
    return min(float(replica.num_batches + more), 1.0 / replica.step.stage_share)


@compiled
def _busy(replicas: Any, rows: Any, clock: Any, starting: int) -> Any:
    """Processors that steps at work keep busy, with one more of row `starting`."""
    busy = clock.mover_cores
    for j in range(len(rows)):
        replica, more = replicas[rows[j]], 1 if rows[j] == starting else 0
        if replica.num_batches + more > 0:
            busy += _in_flight(replica, more) * replica.step.busy_cores
    return busy


@compiled
def _slowdown(clock: Any, busy: float) -> Any:
    """`engine.profile.Crowding.slowdown`."""
    slowdown = _between(clock.busy, clock.slowdown, clock.num_knots, busy)
    return slowdown * max(1.0, busy / clock.busy[clock.num_knots - 1])


@compiled
def _stretches(replicas: Any, rows: Any, clock: Any, row: int) -> tuple[Any, Any]:
    """How many times as long a step that starts in a row takes: memory, by
    `Crowding.memory_slowdown`; and all of it besides, by `StepTimeModel.crowding_exponent`."""
    busy = _busy(replicas, rows, clock, row)
    memory = _between(clock.memory_busy, clock.memory_slowdown, clock.num_memory_knots, busy)
    exponent = replicas[row].step.crowding_exponent
    if exponent == 1.0:
        return memory, 1.0
    own = _in_flight(replicas[row], 1) * replicas[row].step.busy_cores
    return memory, (_slowdown(clock, busy) / _slowdown(clock, own)) ** (exponent - 1.0)


@compiled
def _set_rate(replicas: Any, rows: Any, clock: Any, now_s: float, work_s: float) -> None:
    """The rate at which steps in flight go on from now on."""
    rate = 1.0 / _slowdown(clock, _busy(replicas, rows, clock, NONE))
    if rate != clock.rate:
        clock.wall_s, clock.work_s, clock.rate = now_s, work_s, rate


@compiled
def move_with(replicas: Any, rows: Any, clock: Any, mover_cores: float, now_s: float) -> None:
    """From `now_s` on whoever moves weights or KV keeps so many cores busy."""
    if clock.num_knots > 0:
        clock.mover_cores = mover_cores
        _set_rate(replicas, rows, clock, now_s, work_time(clock, now_s))


@compiled
def _run_sharing(
    seqs: Any,
    replicas: Any,
    lists: Any,
    batches: Any,
    rows: Any,
    limits: Any,
    counts: Any,
    ended: Any,
    trace: Any,
    clock: Any,
    until_s: float,
) -> None:
    """The same event by event over all replicas, since they share the host's cores."""
    while True:
        row, work_s, is_end = NONE, np.inf, False
        for j in range(len(rows)):
            at_s, ends = _next_event(replicas[rows[j]], batches[rows[j]])
            if at_s < work_s or (at_s == work_s and ends and not is_end):
                row, work_s, is_end = rows[j], at_s, ends
        if work_s == np.inf:
            return
        now_s = clock.wall_s + (work_s - clock.work_s) / clock.rate
        if now_s > until_s or (now_s == until_s and not is_end):
            return
        replica, mine = replicas[row], batches[row]
        if is_end:
            batch = mine[replica.first_batch]
            batch.end_s = work_s
            _finish_step(seqs, replica, lists[row], batch, limits, counts, ended, trace, now_s)
        else:
            memory, stretch = _stretches(replicas, rows, clock, row)
            _try_start(
                seqs,
                replica,
                lists[row],
                mine,
                limits,
                counts,
                trace,
                row,
                work_s,
                now_s,
                memory,
                stretch,
            )
        _set_rate(replicas, rows, clock, now_s, work_s)


@inlined
def _run_all(
    seqs: Any,
    replicas: Any,
    lists: Any,
    batches: Any,
    rows: Any,
    limits: Any,
    counts: Any,
    ended: Any,
    trace: Any,
    until_s: float,
) -> None:
    """Everything up to `until_s` that an arrival then has to know of, replica by replica, since
    they share nothing."""
    for j in range(len(rows)):
        r = rows[j]
        if replicas[r].due_s <= until_s:
            _run_replica(
                seqs, replicas[r], lists[r], batches[r], limits, counts, ended, trace, r, until_s
            )


@compiled
def pick_row(
    replicas: Any, rows: Any, shares: Any, block_size: int, bucket: int, needed_tokens: int
) -> Any:
    """`engine.router.pick` over the open replicas: a row, or NONE."""
    weighted = False
    for i in range(len(rows)):
        replica = replicas[rows[i]]
        fits = replica.num_blocks * block_size >= needed_tokens
        weighted = weighted or (replica.is_open and fits and shares[bucket, i] > 0)
    best, best_score = NONE, np.inf
    for i in range(len(rows)):
        replica = replicas[rows[i]]
        if not replica.is_open or replica.num_blocks * block_size < needed_tokens:
            continue
        share = shares[bucket, i] if weighted else float(replica.num_devices)
        score = (replica.num_outstanding + 1) / share if share > 0 else np.inf
        if best == NONE or score < best_score:
            best, best_score = rows[i], score
    return best


@making
def spread(seqs: Any, replicas: Any, rows: Any, block_size: int, slots: Any, chosen: Any) -> None:
    """Pick a row for each slot in turn, by load and device counts alone, into `chosen`."""
    shares = np.zeros((1, len(rows)))
    for i in range(len(slots)):
        needed = seqs[slots[i]].prompt_tokens + seqs[slots[i]].output_tokens
        chosen[i] = pick_row(replicas, rows, shares, block_size, 0, needed)
        replicas[chosen[i]].num_outstanding += 1


@compiled
def enqueue(
    seqs: Any, replicas: Any, lists: Any, counts: Any, s: int, row: int, work_s: float, near: int
) -> None:
    """Add a sequence that holds no blocks to the waiting list of a row; `near` as in `insert`."""
    seqs[s].number = counts.numbered
    counts.numbered += 1
    seqs[s].row = row
    seqs[s].computed_tokens = 0
    seqs[s].status = IN_WAITING
    insert(seqs, lists[row, WAITING], s, near)
    replicas[row].num_outstanding += 1
    wake(replicas[row], work_s)


@making
def enqueue_all(
    seqs: Any, replicas: Any, lists: Any, counts: Any, slots: Any, rows: Any, work_s: float
) -> None:
    """`enqueue` slots[i] to rows[i], one after the other."""
    near = np.full(len(replicas), NONE)
    for i in range(len(slots)):
        s, row = slots[i], rows[i]
        enqueue(seqs, replicas, lists, counts, s, row, work_s, near[row])
        near[row] = s


@compiled
def adopt(
    seqs: Any, replicas: Any, lists: Any, counts: Any, s: int, row: int, work_s: float
) -> None:
    """Add a sequence whose blocks were taken from the row before (see `reserve`)."""
    seqs[s].number = counts.numbered
    counts.numbered += 1
    seqs[s].row = row
    seqs[s].status = IN_RUNNING
    insert(seqs, lists[row, RUNNING], s, NONE)
    replicas[row].num_outstanding += 1
    wake(replicas[row], work_s)


@compiled
def wake(replica: Any, work_s: float) -> None:
    """Let a replica look at its lists again, not before `work_s` on the work
    clock (see `work_time`)."""
    replica.may_start = 1
    replica.wake_s = max(replica.wake_s, work_s)
    replica.due_s = -np.inf


@compiled
def _row_for(
    seqs: Any, replicas: Any, rows: Any, shares: Any, edges: Any, limits: Any, s: int
) -> Any:
    """That the router picks for a sequence, or NONE."""
    prompt = seqs[s].prompt_tokens
    bucket = np.searchsorted(edges, prompt)
    needed = prompt + seqs[s].output_tokens
    return pick_row(replicas, rows, shares, limits.block_size, bucket, needed)


@making
def route(
    seqs: Any,
    replicas: Any,
    lists: Any,
    rows: Any,
    shares: Any,
    edges: Any,
    limits: Any,
    counts: Any,
    slots: Any,
    work_s: float,
) -> None:
    """Send sequences one after the other to the replica the router picks, or hold them while none
    is open."""
    near = np.full(len(lists), NONE)
    for i in range(len(slots)):
        s = slots[i]
        row = _row_for(seqs, replicas, rows, shares, edges, limits, s)
        send(seqs, replicas, lists, counts, s, row, work_s, near[row])
        near[row] = s


@compiled
def send(
    seqs: Any, replicas: Any, lists: Any, counts: Any, s: int, row: int, work_s: float, near: int
) -> None:
    """Enqueue a sequence there, or hold it if there is none; `near` as in `insert`.

    The last row of `lists` is the list of held sequences.
    """
    if row != NONE:
        enqueue(seqs, replicas, lists, counts, s, row, work_s, near)
        return
    seqs[s].number = counts.numbered
    counts.numbered += 1
    seqs[s].row = NONE
    seqs[s].status = HELD
    insert(seqs, lists[len(lists) - 1, WAITING], s, near)


@inlined
def _admit(seqs: Any, rows: Any, limits: Any, counts: Any, ended: Any, s: int) -> Any:
    """Whether a request that arrives is to be routed; else it is rejected."""
    counts.arrived += 1
    if (
        seqs[s].prompt_tokens >= limits.max_model_len
        or counts.live >= limits.max_queue
        or len(rows) == 0
    ):
        seqs[s].status = REJECTED
        ended[counts.ended] = s
        counts.ended += 1
        counts.rejected += 1
        return False
    counts.live += 1
    return True


@compiled
def advance(
    seqs: Any,
    replicas: Any,
    lists: Any,
    batches: Any,
    rows: Any,
    shares: Any,
    edges: Any,
    limits: Any,
    counts: Any,
    arriving: Any,
    ended: Any,
    trace: Any,
    clock: Any,
    until_s: float,
) -> None:
    """Simulate up to `until_s`. `arriving` are slots by arrival time, none after `until_s`.

    `shares[b, i]` is the wanted share of replica rows[i] for prompts of bucket b (`edges`).
    Slots that end go to `ended`, their number to `counts.ended`. Without rows all are rejected.
    """
    counts.ended = 0
    for j in range(len(rows)):
        replicas[rows[j]].due_s = -np.inf  # whatever was changed since the last call
    for i in range(len(arriving)):
        s = arriving[i]
        now_s = seqs[s].arrival_s
        _run_all(seqs, replicas, lists, batches, rows, limits, counts, ended, trace, now_s)
        if _admit(seqs, rows, limits, counts, ended, s):
            r = _row_for(seqs, replicas, rows, shares, edges, limits, s)
            if r != NONE and _next_event(replicas[r], batches[r])[0] <= now_s:
                _run_replica(
                    seqs, replicas[r], lists[r], batches[r], limits, counts, ended, trace, r, now_s
                )
            send(seqs, replicas, lists, counts, s, r, now_s, NONE)
    for j in range(len(rows)):
        replicas[rows[j]].due_s = -np.inf  # none is left behind
    _run_all(seqs, replicas, lists, batches, rows, limits, counts, ended, trace, until_s)
    for j in range(len(rows)):
        r = rows[j]
        if replicas[r].cruise.is_on:
            _end_cruise(seqs, replicas[r], lists[r], batches[r, 0], limits)


@compiled
def advance_sharing(
    seqs: Any,
    replicas: Any,
    lists: Any,
    batches: Any,
    rows: Any,
    shares: Any,
    edges: Any,
    limits: Any,
    counts: Any,
    arriving: Any,
    ended: Any,
    trace: Any,
    clock: Any,
    until_s: float,
) -> None:
    """The same where processors are shared. A function of its own, so that the compiler can
    make one straight piece of each."""
    counts.ended = 0
    for i in range(len(arriving)):
        s = arriving[i]
        now_s = seqs[s].arrival_s
        _run_sharing(
            seqs, replicas, lists, batches, rows, limits, counts, ended, trace, clock, now_s
        )
        work_s = work_time(clock, now_s)
        if _admit(seqs, rows, limits, counts, ended, s):
            r = _row_for(seqs, replicas, rows, shares, edges, limits, s)
            send(seqs, replicas, lists, counts, s, r, work_s, NONE)
    _run_sharing(seqs, replicas, lists, batches, rows, limits, counts, ended, trace, clock, until_s)
