"""Switches of the surrogate by hand: a step takes 1/8 s, whatever is in it, and all times are exact
in binary. A token's KV has 256 bytes, a block 4 tokens; the model has 4 layers of 1024 bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.cluster import (
    ClusterSpec,
    Deployment,
    KvCostParams,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    Request,
    RequestOutcome,
    RequestStatus,
    SwitchMode,
    SwitchPhase,
    SwitchPlan,
    SwitchTicket,
    TensorSpec,
    Transfer,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from envs.scenarios import DeviceFailure
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.latency import linear_profile

STEP_S = 0.125
TENSORS = tuple(TensorSpec(f"layers.{i}", (8, 32), "layer", i, 0) for i in range(4))
MODEL = ModelSpec("toy", 4, 4, 4, 2, 8, 16, 128, 4, TENSORS)
SPEC = ClusterSpec(4, 4, 400_000, 4096.0, 4, MODEL, 8, 128)
ONE, TWO = ParallelConfig(1, 1), ParallelConfig(2, 1)
MIGRATE = KvCostParams(1e15, 1.0, STEP_S)  # moving is free, computing dear
DRAIN = KvCostParams(1.0, 1.0, STEP_S)  # both are dear


def toy(
    link_bytes_per_s: float = 4096.0, overhead_s: float = 0.5, pause_s: float = 0.5, **spec: object
) -> ProfiledCluster:
    profile = linear_profile([ONE, TWO], STEP_S, 0.0, link_bytes_per_s=link_bytes_per_s)
    profile = replace(profile, switch_overhead_s=overhead_s, pause_overhead_s=pause_s)
    spec = {"link_bytes_per_s": link_bytes_per_s} | spec
    return ProfiledCluster(replace(SPEC, **spec), profile)  # type: ignore[arg-type]


def replicas(first_id: int, *placements: tuple[int, ...]) -> Deployment:
    """tp1 or tp2 replicas on these devices."""
    return Deployment(
        tuple(
            Replica(first_id + i, ParallelConfig(len(devices), 1), Placement(devices))
            for i, devices in enumerate(placements)
        )
    )


def by_hand(
    target: Deployment, kv: KvCostParams = MIGRATE, weight_bytes: int = 0, epoch: int = 0
) -> SwitchPlan:
    """A live plan that sends so many bytes of weights from device 0 to device 1."""
    weights = (Transfer("w", None, 0, 1, 0, 1, weight_bytes),) if weight_bytes else ()
    return SwitchPlan(target, epoch, weights, kv, weight_bytes, 0, 0.0, 0.0)


def build(
    cluster: ProfiledCluster, current: Deployment, *lengths: tuple[int, int]
) -> SurrogateCluster:
    """Requests "0", "1", ... of (prompt, output) tokens arrive at 0."""
    surrogate = SurrogateCluster(cluster, current, trace_items=10_000)
    for i, (prompt, output) in enumerate(lengths):
        surrogate.submit(Request(str(i), 0.0, prompt, output))
    return surrogate


def outcomes(surrogate: SurrogateCluster) -> dict[str, RequestOutcome]:
    ends = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    return {outcome.request_id: outcome for outcome in ends}


def run(surrogate: SurrogateCluster, until_s: float = 100.0) -> SwitchTicket:
    """Look at the books every 1/16 s and in between."""
    now_s = surrogate.snapshot().now_s
    while now_s < min(until_s, 20.0):
        now_s += 0.0625
        surrogate.advance(min(now_s, until_s))
        surrogate.check_integrity()
    surrogate.advance(until_s)
    ticket = surrogate.snapshot().switch
    assert ticket is not None
    return ticket


# ---------------------------------------------------------------- KV in rounds


def test_rounds_that_grow_as_fast_as_they_are_copied_end() -> None:
    """A block takes 1/4 s, so that two steps are made meanwhile. Weights are there at 1.5 s, when
    12 steps have been made and 32 + 11 tokens computed: 11 blocks until 4.25 s. By then there are
    22 tokens more, 65: blocks 10 to 16 are sent, 7 of them, until 6 s. That is longer than half of
    the first round, so the replica stops; its 48th step ends just then, with 79 tokens. Blocks 16
    to 19 take 1 s and the stop half a second more."""
    surrogate = build(toy(), replicas(0, (0,)), (32, 90))
    surrogate.apply(by_hand(replicas(1, (1,)), weight_bytes=4096))
    done = run(surrogate)
    assert (done.phase, done.updated_s, done.pause_s) == (SwitchPhase.DONE, 7.5, 1.5)
    assert (done.num_kv_rounds, done.kv_bytes) == (3, (11 + 7 + 4) * 1024)
    assert done.moved_bytes == 4096 + done.kv_bytes
    assert (done.num_migrated, done.num_recomputed, done.num_drained) == (1, 0, 0)
    (outcome,) = outcomes(surrogate).values()
    assert (outcome.longest_gap_s, outcome.num_moves) == (1.625, 1)
    assert outcome.finish_s == 6.0 + 1.5 + (90 - 48) * STEP_S
    told = [e.ticket for e in surrogate.events(0).events if e.ticket is not None]
    rounds = {t.num_kv_rounds: t for t in reversed(told)}  # the first of each
    assert [rounds[n].updated_s for n in (1, 2, 3)] == [4.25, 6.0, 7.5]
    assert [rounds[n].kv_bytes // 1024 for n in (1, 2, 3)] == [11, 18, 22]


def test_a_round_as_short_as_a_step_is_the_last() -> None:
    """A block takes 1/32 s. From 1.5 s 11 blocks take 11/32 s; two steps have ended by then, and
    45 tokens are 2 blocks more, 1/16 s, less than a step. At 1.90625 s the 16th step is in flight;
    it ends at 2 s with 47 tokens, of which 45 are there: 1 block, and half a second."""
    surrogate = build(toy(32768.0), replicas(0, (0,)), (32, 60))
    surrogate.apply(by_hand(replicas(1, (1,)), weight_bytes=32768))
    done = run(surrogate)
    assert (done.updated_s, done.pause_s) == (2.53125, 0.625)
    assert (done.num_kv_rounds, done.kv_bytes) == (3, (11 + 2 + 1) * 1024)
    (outcome,) = outcomes(surrogate).values()
    assert outcome.longest_gap_s == 2.53125 + STEP_S - 2.0


@pytest.mark.parametrize(
    ("old", "new", "blocks", "first_round_s"),
    [
        (((0,),), ((0, 1),), (5, 5), 10 * 0.5 * 0.25),  # half of the heads stay on device 0
        (((0,),), ((2, 3),), (10, 10), 10 * 0.5 * 0.25 * 2),  # one port sends both halves
        (((0,), (1,)), ((2,), (3,)), (10, 10), 5 * 0.25),  # side by side
        (((0,), (1,)), ((2,),), (10, 10), 10 * 0.25),  # one port receives all
    ],
)
def test_ports_work_side_by_side(
    old: tuple[tuple[int, ...], ...],
    new: tuple[tuple[int, ...], ...],
    blocks: tuple[int, int],
    first_round_s: float,
) -> None:
    """Two sequences of 17 tokens after the step in the middle of which weights are there."""
    surrogate = build(toy(overhead_s=0.1875), replicas(0, *old), (17, 50), (17, 50))
    surrogate.apply(by_hand(replicas(9, *new)))
    run(surrogate)
    told = [e.ticket for e in surrogate.events(0).events if e.ticket is not None]
    first = next(t for t in told if t.num_kv_rounds == 1)
    assert first.updated_s == 0.1875 + first_round_s
    assert first.kv_bytes == blocks[0] * 1024


def test_who_comes_and_goes_in_a_round() -> None:
    """A block takes 1/8 s. "0" ends in the first round, and the blocks kept for it are given back;
    "late" comes in it, runs where it was sent, on the old replica, and moves with the second.

    Round 1 from 1.5 s: 11 blocks each until 4.25 s. Round 2: of "1" tokens 43 to 65, blocks 10 to
    16; of "late" 10 tokens and 17 more, 7 blocks; until 6 s. In the stop: of "1" blocks 16 to 19,
    of "late" tokens 27 to 41, blocks 6 to 10; 9/8 s and half a second."""
    surrogate = build(toy(8192.0), replicas(0, (0,)), (32, 14), (32, 90))
    surrogate.submit(Request("late", 2.0, 10, 90))
    surrogate.apply(by_hand(replicas(1, (1,)), weight_bytes=8192))
    surrogate.advance(4.0)
    assert surrogate.state.used_blocks(surrogate.rows.of(replicas(1, (1,)).replicas[0])) == 22
    surrogate.advance(4.3)
    assert surrogate.state.used_blocks(surrogate.rows.of(replicas(1, (1,)).replicas[0])) == 17 + 7
    done = run(surrogate)
    assert (done.num_migrated, done.num_recomputed) == (2, 0)
    assert (done.updated_s, done.kv_bytes) == (7.625, (22 + 7 + 7 + 4 + 5) * 1024)
    ends = outcomes(surrogate)
    assert ends["0"].finish_s == 14 * STEP_S
    assert {name: o.num_moves for name, o in ends.items()} == {"0": 0, "1": 1, "late": 1}
    assert ends["late"].first_token_s == 2.0 + STEP_S


def test_a_sequence_that_does_not_fit_is_computed_again() -> None:
    """Each has 16 blocks, of the 36 of the replica that stays."""
    cluster = toy(65536.0, device_memory_bytes=4096 + 36 * 1024)
    current = replicas(0, (0,), (1,), (2,))
    surrogate = build(cluster, current, (60, 40), (60, 40), (60, 40))
    surrogate.apply(by_hand(Deployment(current.replicas[:1])))
    done = run(surrogate)
    assert (done.num_migrated, done.num_recomputed) == (1, 1)
    assert done.kv_bytes >= 16 * 1024
    assert sum(o.num_moves for o in outcomes(surrogate).values()) == 2
    assert {o.status for o in outcomes(surrogate).values()} == {RequestStatus.FINISHED}


@pytest.mark.parametrize("at_s", [0.25, 1.25, 1.5625, 3.0, 4.25, 5.5, 6.0, 6.75, 7.4])
def test_a_fork_in_a_round_goes_on_as_the_original(at_s: float) -> None:
    surrogate = build(toy(), replicas(0, (0,)), (32, 14), (32, 90))
    surrogate.submit(Request("late", 2.0, 10, 90))
    surrogate.apply(by_hand(replicas(1, (1,)), weight_bytes=4096))
    surrogate.advance(at_s)
    fork = surrogate.fork()
    cancelled = surrogate.fork()
    cancelled.cancel(cancelled.snapshot().switch.ticket_id)  # type: ignore[union-attr]
    cancelled.check_integrity()
    assert run(cancelled).phase is SwitchPhase.CANCELLED
    assert run(fork) == run(surrogate)
    assert fork.events(0) == surrogate.events(0)
    assert fork.trace().tobytes() == surrogate.trace().tobytes()


# ---------------------------------------------------------------- drain


def test_an_end_that_is_near_is_waited_for() -> None:
    """At 1/4 s the sequence has 34 tokens, and room for 10 more: 1.25 s at most, less than moving
    33 tokens or computing them again. It ends with its 5th token at 5/8 s; nothing moves."""
    cluster = toy(overhead_s=0.25, model=replace(MODEL, max_model_len=44))
    surrogate = build(cluster, replicas(0, (0,)), (32, 5))
    surrogate.apply(by_hand(replicas(1, (1,)), DRAIN))
    done = run(surrogate)
    assert (done.num_drained, done.num_migrated, done.num_recomputed) == (1, 0, 0)
    assert (done.updated_s, done.pause_s, done.kv_bytes) == (0.625 + 0.5, 0.5, 0)
    assert done.num_kv_rounds == 3  # one before, one after and one in the stop
    outcome = outcomes(surrogate)["0"]
    assert (outcome.finish_s, outcome.num_moves, outcome.longest_gap_s) == (0.625, 0, STEP_S)


def test_an_end_is_not_waited_for_beyond_the_deadline() -> None:
    """A step is said to take 1/32 s, so that 10 tokens are due in 5/16 s, and half as much again
    is waited for: to 0.71875 s. The 6th step ends at 3/4 s; the rest is computed again."""
    cluster = toy(overhead_s=0.25, model=replace(MODEL, max_model_len=44))
    surrogate = build(cluster, replicas(0, (0,)), (32, 10))
    surrogate.apply(by_hand(replicas(1, (1,)), replace(DRAIN, decode_step_s=0.03125)))
    done = run(surrogate)
    assert (done.num_drained, done.num_migrated, done.num_recomputed) == (0, 0, 1)
    assert (done.updated_s, done.pause_s) == (1.25, 0.53125)
    outcome = outcomes(surrogate)["0"]
    assert (outcome.finish_s, outcome.num_moves) == (1.25 + 4 * STEP_S, 1)


def test_output_lengths_decide_nothing() -> None:
    """Whether an end is near is judged from the room in the context alone."""
    for output in (6, 60):
        cluster = toy(overhead_s=0.25)
        surrogate = build(cluster, replicas(0, (0,)), (32, output))
        surrogate.apply(by_hand(replicas(1, (1,)), replace(DRAIN, prefill_tokens_per_s=10.0)))
        done = run(surrogate)
        assert (done.num_drained, done.num_recomputed) == (0, 1)


# ---------------------------------------------------------------- KV limits

TIGHT = {
    "device_memory_bytes": 40_000,
    "switch_headroom_bytes": 0,
    "model": replace(MODEL, max_model_len=64),
}
# 4096 + 2048 bytes of weights and 2500 of staging leave 31356: half of it is 15 blocks for the old


@pytest.mark.parametrize("cancels", [False, True])
def test_old_replicas_have_fewer_blocks_from_prepare_on(cancels: bool) -> None:
    """Two sequences of 28 tokens have 7 blocks each; at their second step both want an 8th, and the
    later is preempted. It waits for the switch to end, then it is computed again."""
    surrogate = build(toy(65536.0, **TIGHT), replicas(0, (0,)), *[(28, 20)] * 2)  # type: ignore[arg-type]
    surrogate.advance(STEP_S)
    ticket_id = surrogate.apply(by_hand(replicas(1, (0, 1)), weight_bytes=65536)).ticket_id
    surrogate.advance(1.0)
    surrogate.check_integrity()
    (stats,) = surrogate.snapshot().replicas
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions_total) == (1, 1, 1)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (9, 35)  # 35 tokens
    if cancels:
        surrogate.cancel(ticket_id)
        surrogate.check_integrity()
    done = run(surrogate)
    ends = outcomes(surrogate)
    assert [ends[n].num_preemptions for n in "01"] == [0, 1]
    if cancels:  # at 1 s a step begins
        assert ends["1"].longest_gap_s == 1.0
        assert [ends[n].num_moves for n in "01"] == [0, 0]
    else:
        assert (done.num_migrated, done.num_recomputed) == (1, 1)
        assert ends["1"].longest_gap_s == done.updated_s
        assert [ends[n].num_moves for n in "01"] == [1, 1]


def test_new_replicas_keep_within_what_is_left() -> None:
    """Used are 24 blocks, so 6780 bytes are left for the new: 13 blocks of 512, for 48 tokens of
    the longest sequence. Of three sequences of 32 tokens and some one fits there."""
    spec = TIGHT | {"model": replace(MODEL, max_model_len=48)}
    surrogate = build(toy(65536.0, **spec), replicas(0, (0,)), *[(32, 12)] * 3)  # type: ignore[arg-type]
    surrogate.advance(STEP_S)
    surrogate.apply(by_hand(replicas(1, (0, 1))))
    done = run(surrogate)
    assert done.phase is SwitchPhase.DONE
    assert (done.num_migrated, done.num_recomputed) == (1, 2)
    (stats,) = surrogate.snapshot().replicas
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (0, (40_000 - 2048) // 512)


def test_without_room_for_both_generations_a_live_switch_is_rolled_back() -> None:
    """28 blocks are used, 2684 bytes left: 5 blocks of 512."""
    surrogate = build(toy(**TIGHT), replicas(0, (0,)), *[(28, 4)] * 4)  # type: ignore[arg-type]
    surrogate.advance(STEP_S)
    ticket = surrogate.apply(by_hand(replicas(1, (0, 1))))
    assert ticket.phase is SwitchPhase.PREPARE
    done = run(surrogate)
    assert (done.phase, done.updated_s) == (SwitchPhase.ROLLED_BACK, STEP_S)
    assert "device 0 has 2684 bytes left for the KV cache of replica 1" in done.reason
    assert [o.finish_s for o in outcomes(surrogate).values()] == [4 * STEP_S] * 4


# ---------------------------------------------------------------- in place


def in_place(surrogate: SurrogateCluster, key: str) -> SwitchPlan:
    """Layer by layer. To tp2 each step brings half a layer to device 1; from it to two replicas,
    half a layer to either."""
    seen, target = surrogate.snapshot(), parse_deployment_key(key)
    plan = plan_switch(surrogate.spec, seen.deployment, seen.epoch, target, MIGRATE)
    return replace(plan, mode=SwitchMode.IN_PLACE, mode_reason="a test wants it")


def test_in_place_replicas_stand_still_until_the_commit() -> None:
    """512 bytes at 1024 bytes/s in each of four steps, from half a second on, and half a second."""
    surrogate = build(toy(1024.0), replicas(0, (0,)), (32, 20), (32, 3))
    surrogate.submit(Request("late", 1.0, 10, 3))
    surrogate.apply(in_place(surrogate, "1xtp2pp1"))
    surrogate.advance(2.0)
    assert surrogate.snapshot().num_queued_unrouted == 1
    done = run(surrogate)
    assert (done.phase, done.updated_s, done.pause_s) == (SwitchPhase.DONE, 3.0, 2.5)
    assert (done.num_migrated, done.num_recomputed, done.num_kv_rounds) == (0, 1, 0)
    assert (done.mode, done.kv_bytes, done.moved_bytes) == (SwitchMode.IN_PLACE, 0, 2048)
    ends = outcomes(surrogate)
    assert ends["1"].finish_s == 3 * STEP_S  # before the stop
    assert (ends["0"].longest_gap_s, ends["0"].num_moves) == (2.5 + STEP_S, 1)
    assert ends["0"].num_preemptions == 0
    assert ends["late"].first_token_s == 3.0 + STEP_S
    assert ends["0"].finish_s == 3.0 + (20 - 4) * STEP_S


@pytest.mark.parametrize(("at_s", "goes_back"), [(0.25, True), (0.75, True), (1.25, False)])
def test_in_place_can_be_cancelled_while_the_old_weights_are_whole(
    at_s: float, goes_back: bool
) -> None:
    """The first layer has arrived at 1 s, and its old shard is dropped. A switch that goes back
    once its replicas stood still computes their sequences again."""
    surrogate = build(toy(1024.0), replicas(0, (0,)), (32, 20))
    ticket_id = surrogate.apply(in_place(surrogate, "1xtp2pp1")).ticket_id
    surrogate.advance(at_s)
    surrogate.cancel(ticket_id)
    surrogate.check_integrity()
    done = run(surrogate)
    outcome = outcomes(surrogate)["0"]
    if goes_back:
        stood_still = at_s > 0.5
        assert (done.phase, done.updated_s) == (SwitchPhase.CANCELLED, at_s)
        assert done.pause_s == (at_s - 0.5 if stood_still else 0.0)
        assert (outcome.num_preemptions, outcome.num_moves) == (int(stood_still), 0)
        assert outcome.longest_gap_s == (at_s - 0.5 if stood_still else 0.0) + STEP_S
    else:
        assert (done.phase, done.updated_s) == (SwitchPhase.DONE, 3.0)
        assert done.reason == "cannot be cancelled: old weights are gone, it rolls forward"


def test_in_place_rolls_forward_to_what_can_be_completed() -> None:
    """From 1xtp2 to two replicas, of which the one on device 1 is lost at 1.25 s: the other reads
    its 4096 bytes from disk, in 4 s."""
    surrogate = build(toy(1024.0), replicas(0, (0, 1)), (32, 20))
    surrogate.schedule_failures([DeviceFailure(1.25, 1, 50.0)])
    surrogate.apply(in_place(surrogate, "2xtp1pp1"))
    done = run(surrogate)
    assert (done.phase, done.updated_s) == (SwitchPhase.DONE, 1.25 + 4.0 + 0.5)
    assert done.to_key == "1xtp1pp1"
    assert done.reason == (
        "rolled forward after: worker 1 is lost; left out tp1pp1: it lacks a device"
    )
    assert surrogate.snapshot().deployment.key == "1xtp1pp1"
    outcome = outcomes(surrogate)["0"]
    assert (outcome.status, outcome.num_moves) == (RequestStatus.FINISHED, 1)


def test_in_place_with_nothing_to_complete_leaves_no_replica() -> None:
    """What was on the old ones waits until the old deployment is loaded again."""
    surrogate = build(toy(1024.0), replicas(0, (0,)), (32, 20))
    surrogate.schedule_failures([DeviceFailure(1.25, 1, 5.0)])
    surrogate.apply(in_place(surrogate, "1xtp2pp1"))
    surrogate.advance(2.0)
    surrogate.check_integrity()
    seen = surrogate.snapshot()
    assert seen.switch is not None
    assert (seen.switch.phase, seen.switch.updated_s) == (SwitchPhase.ROLLED_BACK, 1.25)
    assert (seen.num_queued_unrouted, seen.deployment.key) == (1, "")
    done = run(surrogate)
    assert done == seen.switch
    assert surrogate.snapshot().deployment == dense_deployment([ONE])
    assert outcomes(surrogate)["0"].status is RequestStatus.FINISHED
