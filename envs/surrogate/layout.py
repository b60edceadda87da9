"""Layout of the surrogate's state: records of sequences, replicas, steps and counts.

State is arrays of these, indexed by slot (a live sequence) and row (a replica). A sequence is in
one doubly linked list, running or waiting of its row, ordered by (arrival, number).
"""

from __future__ import annotations

import numpy as np

SEQUENCE = np.dtype(  # what a step looks at first, in one cache line
    [
        ("next", "i8"),
        ("ends_at", "i8"),  # step of the cruise after which it ends, in one call; else 0
        ("in_flight_tokens", "i8"),  # of its step in flight, else 0
        ("computed_tokens", "i8"),  # whose keys and values are in the cache
        ("prompt_tokens", "i8"),
        ("output_tokens", "i8"),  # generated so far
        ("blocks", "i8"),  # KV blocks held
        ("status", "i8"),
        ("next_in_batch", "i8"),
        ("target_tokens", "i8"),  # output tokens at which it ends
        ("last_token_s", "f8"),
        ("longest_gap_s", "f8"),
        ("first_token_s", "f8"),
        ("arrival_s", "f8"),
        ("number", "i8"),  # order among equal arrival times
        ("prev", "i8"),
        ("index", "i8"),  # by arrival, from 0; the kernel leaves it alone
        ("copied_blocks", "i8"),  # of those held, that are being copied elsewhere
        ("num_preemptions", "i8"),
        ("num_moves", "i8"),
        ("row", "i8"),  # replica it was routed to, else NONE
        ("settled_at", "i8"),  # step of the cruise that its figures are of, if `ends_at` is set
    ]
)
MAX_KNOTS = 16
STEP = np.dtype(  # `engine.profile.StepTimeModel`; see envs/surrogate/latency.py
    [
        ("base_s", "f8"),
        ("per_token_s", "f8"),
        ("per_seq_s", "f8"),
        ("per_context_token_s", "f8"),
        ("per_pair_s", "f8"),
        ("stage_share", "f8"),
        ("busy_cores", "f8"),
        ("crowding_exponent", "f8"),
        ("leader_computes", "i8"),
        ("num_knots", "i8"),
        ("token_knots", "f8", (MAX_KNOTS,)),
        ("token_s", "f8", (MAX_KNOTS,)),
    ]
)
MAX_BLOCK_SIZE, MAX_GAPS = 64, 32
CRUISE = np.dtype(  # sequences that make one token in every step; see `kernel._run_alone`
    [
        ("is_on", "i8"),
        ("step", "i8"),  # steps ended so far
        ("num_seqs", "i8"),
        ("context", "i8"),  # tokens computed of all of them
        ("next_end_at", "i8"),  # the least `ends_at`
        ("last_end_s", "f8"),  # of the last step ended
        ("num_gaps", "i8"),  # between ends of steps: each that no later one was as long as
        ("gap_step", "i8", (MAX_GAPS,)),
        ("gap_s", "f8", (MAX_GAPS,)),
        ("num_need", "i8", (MAX_BLOCK_SIZE,)),  # sequences that need a block, by step modulo size
    ]
)
REPLICA = np.dtype(  # times are on the work clock, see `kernel.work_time`; those of BATCH too
    [
        ("step", STEP),
        ("wake_s", "f8"),  # something to schedule appeared then
        ("ready_s", "f8"),  # the first stage is free from then on
        ("last_end_s", "f8"),  # end of the last step started
        ("due_s", "f8"),  # within one call: it has nothing to do before then
        ("depth", "i8"),  # steps that may be in flight: pp
        ("num_devices", "i8"),
        ("num_blocks", "i8"),
        ("free_blocks", "i8"),  # that may be taken; below 0 when more are in use than may be
        ("copied_blocks", "i8"),  # still being copied, of sequences that have let go of them
        ("withheld_blocks", "i8"),  # not to be used while others need their memory
        ("num_outstanding", "i8"),
        ("first_batch", "i8"),
        ("num_batches", "i8"),
        ("generated_total", "i8"),
        ("preemptions_total", "i8"),
        ("is_open", "i8"),  # takes new requests
        ("is_paused", "i8"),  # starts no step
        ("may_start", "i8"),  # something changed since a schedule came out empty
        ("cruise", CRUISE),  # off between calls
    ]
)
BATCH = np.dtype(
    [
        ("end_s", "f8"),
        ("head", "i8"),
        ("item", "i8"),  # of its first item traced
        ("num_items", "i8"),
        ("num_tokens", "i8"),
        ("context", "i8"),  # tokens of context in it
        ("coasted", "i8"),  # steps ended since, that its sequences do not show yet
        ("first_s", "f8"),  # the first and the last of their ends
        ("last_s", "f8"),
        ("longest_gap_s", "f8"),  # between two of them
    ]
)
ITEM = np.dtype(  # of the trace: one sequence's part in one step
    [
        ("row", "i8"),
        ("start_s", "f8"),
        ("end_s", "f8"),  # nan while in flight
        ("index", "i8"),  # of the sequence
        ("start", "i8"),  # position of its first token computed
        ("tokens", "i8"),
        ("free_blocks", "i8"),  # of the replica once the step is scheduled
        ("preemptions", "i8"),  # of the replica until then
    ]
)
LIST = np.dtype(
    [
        ("head", "i8"),
        ("tail", "i8"),
        ("count", "i8"),
        ("prompt_tokens", "i8"),  # of all in it
    ]
)
LIMITS = np.dtype(
    [
        ("block_size", "i8"),
        ("max_num_seqs", "i8"),
        ("max_num_batched_tokens", "i8"),
        ("max_model_len", "i8"),
        ("max_queue", "i8"),
        ("prefix_hit_rate", "f8"),
    ]
)
COUNTS = np.dtype(
    [
        ("arrived", "i8"),
        ("finished", "i8"),
        ("rejected", "i8"),
        ("failed", "i8"),
        ("live", "i8"),
        ("numbered", "i8"),
        ("ended", "i8"),  # entries of `ended` filled by the present call
        ("traced", "i8"),  # items so far that the trace had or would have had room for
    ]
)
CLOCK = np.dtype(
    [
        ("num_knots", "i8"),  # of `engine.profile.Crowding.processors`; 0: nothing is shared
        ("busy", "f8", (MAX_KNOTS,)),
        ("slowdown", "f8", (MAX_KNOTS,)),
        ("num_memory_knots", "i8"),  # of `Crowding.memory`
        ("memory_busy", "f8", (MAX_KNOTS,)),
        ("memory_slowdown", "f8", (MAX_KNOTS,)),
        ("mover_cores", "f8"),  # kept busy by what a switch moves
        ("wall_s", "f8"),  # since then, when the work clock showed `work_s`, that runs at `rate`
        ("work_s", "f8"),
        ("rate", "f8"),
    ]
)
NONE = -1
RUNNING, WAITING = 0, 1  # columns of `lists`
PENDING, HELD, IN_WAITING, IN_RUNNING, FINISHED, REJECTED, FAILED = 0, 1, 2, 3, 4, 5, 6
