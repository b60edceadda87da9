"""The request table by itself: ids, routing counts, stale tokens, ends, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.cluster import (
    LABEL_CHARS,
    Arrival,
    ClusterSpec,
    Deployment,
    RequestStatus,
    Routing,
    dense_deployment,
    parse_deployment_key,
)
from engine.counters import Histogram
from engine.errors import InvalidRequestError, OverloadedError, UnavailableError
from engine.events import EventLog
from engine.live_request import EndedRequest, RequestStream
from engine.messages import Abort, LeaderStats, Submit, Tokens, TokenUpdate
from engine.request import SamplingParams
from engine.request_table import MAX_LOSSES, RequestTable

PARAMS = SamplingParams(max_tokens=8)


@dataclass
class Engine:
    """A table's surroundings: a deployment, a clock that tests set, and what was sent."""

    spec: ClusterSpec
    deployment: Deployment = field(
        default_factory=lambda: dense_deployment(parse_deployment_key("2xtp1pp1"))
    )
    routing: Routing = field(default_factory=lambda: Routing((0, 1)))
    on_hold: set[int] = field(default_factory=set)
    not_ready: str = ""
    clock_s: float = 0.0
    sent: list[tuple[int, Any]] = field(default_factory=list)
    ended: list[EndedRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = EventLog()
        self.table = RequestTable(self, 4, self.log)
        self.table.on_end.append(self.ended.append)

    def now_s(self) -> float:
        return self.clock_s

    def send(self, replica_id: int, message: Any) -> None:
        self.sent.append((replica_id, message))

    def add(self, name: str, prompt: int = 3, params: SamplingParams = PARAMS) -> RequestStream:
        arrival = Arrival(name, self.clock_s, prompt)
        return self.table.add(arrival, [1] * prompt, params, {}, None)

    def key_of_last(self) -> str:
        message = self.sent[-1][1]
        return message.sequence.request_id if isinstance(message, Submit) else message.request_id

    def tokens(self, replica_id: int, *updates: TokenUpdate) -> None:
        self.table.take_tokens(Tokens(replica_id, list(updates), LeaderStats()), self.clock_s)


@pytest.fixture
def engine(tiny_spec: ClusterSpec) -> Engine:
    return Engine(tiny_spec)


def test_requests_go_where_fewest_are_and_the_count_follows_them(engine: Engine) -> None:
    streams = [engine.add(f"r{i}") for i in range(3)]
    assert [replica for replica, _ in engine.sent] == [0, 1, 0]
    assert [engine.table.num_outstanding(i) for i in (0, 1)] == [2, 1]
    streams[0].cancel()
    assert isinstance(engine.sent[-1][1], Abort)
    assert [engine.table.num_outstanding(i) for i in (0, 1)] == [1, 1]
    engine.table.move({engine.sent[1][1].sequence.request_id: 0})
    assert [engine.table.num_outstanding(i) for i in (0, 1)] == [2, 0]


def test_an_id_may_be_used_again_and_old_tokens_are_not_taken_for_new(engine: Engine) -> None:
    first = engine.add("same")
    old = engine.key_of_last()
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add("same")
    first.cancel()
    second = engine.add("same")
    new = engine.key_of_last()
    replica = engine.sent[-1][0]
    assert old != new
    engine.tokens(replica, TokenUpdate(old, 0, 65))
    assert second.take() is None
    engine.tokens(replica, TokenUpdate(new, 0, 66))
    chunk = second.take()
    assert chunk is not None
    assert chunk.token_ids == [66]


def test_endless_names_are_refused_and_leave_no_trace(engine: Engine) -> None:
    for labels in (("x" * (LABEL_CHARS + 1), ""), ("", "x" * 10**6)):
        arrival = Arrival("a", 0.0, 3, *labels)
        with pytest.raises(InvalidRequestError, match=f"at most {LABEL_CHARS} characters"):
            engine.table.add(arrival, [1] * 3, PARAMS, {}, None)
    assert engine.log.since(0).events == ()
    engine.table.add(Arrival("a", 0.0, 3, "x" * LABEL_CHARS), [1] * 3, PARAMS, {}, None)


def test_stale_and_foreign_tokens_are_dropped(engine: Engine) -> None:
    stream = engine.add("r")
    key = engine.key_of_last()
    engine.tokens(1, TokenUpdate(key, 0, 65))  # another replica's
    engine.tokens(0, TokenUpdate(key, 1, 65))  # not the next
    assert stream.take() is None
    assert engine.table.counters.generation_tokens == 0


def test_a_finished_request_tells_everything(engine: Engine) -> None:
    stream = engine.add("r")
    key = engine.key_of_last()
    for at_s, update in (
        (1.0, TokenUpdate(key, 0, 65, queue_s=0.25)),
        (1.5, TokenUpdate(key, 1, 66)),
        (3.5, TokenUpdate(key, 2, 67, "length", num_preemptions=2, num_cached_tokens=3)),
    ):
        engine.clock_s = at_s
        engine.tokens(0, update)
    (ended,) = engine.ended
    outcome = ended.outcome
    assert (outcome.status, ended.finish_reason) == (RequestStatus.FINISHED, "length")
    assert (outcome.ttft_s, outcome.tpot_s, outcome.longest_gap_s) == (1.0, 1.25, 2.0)
    assert (outcome.num_preemptions, ended.num_cached_tokens) == (2, 3)
    counters = engine.table.counters
    assert (counters.prompt_tokens, counters.generation_tokens) == (3, 3)
    assert (counters.inter_token_s.sum, sum(counters.inter_token_s.counts)) == (2.5, 2)
    assert (counters.queue_s.sum, counters.prefill_s.sum) == (0.25, 0.75)
    assert engine.table.counts["finished"] == 1
    stream.cancel()  # a no-op
    assert len(engine.ended) == 1
    assert not any(isinstance(m, Abort) for _, m in engine.sent)


def test_finishing_from_this_side_counts_as_finished(engine: Engine) -> None:
    stream = engine.add("r")
    engine.clock_s = 2.0
    engine.tokens(0, TokenUpdate(engine.key_of_last(), 0, 65))
    engine.clock_s = 9.0
    stream.finish("stop")
    (ended,) = engine.ended
    assert (ended.outcome.status, ended.finish_reason) == (RequestStatus.FINISHED, "stop")
    assert ended.outcome.finish_s == 2.0  # of its last token
    assert isinstance(engine.sent[-1][1], Abort)
    assert len(engine.table) == 0


def test_refusals_are_counted_and_take_no_place(engine: Engine) -> None:
    for i in range(4):
        engine.add(f"r{i}")
    with pytest.raises(OverloadedError, match="max_queue is 4"):
        engine.add("one more")
    with pytest.raises(InvalidRequestError, match="300 tokens") as error:
        engine.add("long", prompt=300)
    assert error.value.code == "context_length_exceeded"
    engine.not_ready = "the engine is draining"
    with pytest.raises(UnavailableError, match="draining; retry"):
        engine.add("late")
    assert engine.table.counts == {"arrived": 7, "finished": 0, "rejected": 3}
    assert [e.finish_reason for e in engine.ended] == ["rejected"] * 3
    assert len(engine.table) == 4


def test_held_requests_wait_for_a_replica_and_can_leave(engine: Engine) -> None:
    engine.on_hold = {0, 1}
    streams = [engine.add(f"r{i}") for i in range(2)]
    assert (engine.table.num_held, engine.sent) == (2, [])
    streams[0].cancel()
    assert engine.table.num_held == 1
    engine.on_hold = set()
    engine.table.dispatch_held()
    assert (engine.table.num_held, len(engine.sent)) == (0, 1)


def test_requests_of_a_lost_replica_go_on_from_their_tokens(engine: Engine) -> None:
    engine.add("r")
    key = engine.key_of_last()
    engine.tokens(0, TokenUpdate(key, 0, 65))
    engine.deployment = Deployment(engine.deployment.replicas[1:])
    engine.table.keep_only((1,))
    engine.table.requeue(0)
    replica, message = engine.sent[-1]
    assert (replica, message.sequence.output_token_ids) == (1, [65])
    assert [engine.table.num_outstanding(i) for i in (0, 1)] == [0, 1]
    engine.deployment = Deployment(())
    engine.table.requeue(1)
    assert (engine.table.num_held, engine.ended) == (1, [])  # waits for a replica
    engine.table.fail_held()
    assert [e.outcome.status for e in engine.ended] == [RequestStatus.FAILED]
    assert engine.table.num_held == 0
    assert engine.ended[0].outcome.num_moves == 2


def test_a_request_under_which_replicas_break_again_and_again_fails(engine: Engine) -> None:
    engine.add("poison")
    for _ in range(MAX_LOSSES):
        engine.table.requeue(engine.sent[-1][0])
    assert (len(engine.sent), engine.ended) == (1 + MAX_LOSSES, [])
    engine.table.requeue(engine.sent[-1][0])
    assert [e.outcome.status for e in engine.ended] == [RequestStatus.FAILED]
    assert len(engine.sent) == 1 + MAX_LOSSES


def test_totals_survive_the_replica_that_counted_them(engine: Engine) -> None:
    counters = engine.table.counters
    counters.add_growth(0, LeaderStats(num_preemptions_total=2, prefix_cache_queries=10))
    counters.add_growth(0, LeaderStats(num_preemptions_total=5, prefix_cache_queries=30))
    counters.keep_only((1,))
    counters.add_growth(1, LeaderStats(num_preemptions_total=1, prefix_cache_hits=4))
    assert (counters.num_preemptions, counters.prefix_cache_queries) == (6, 30)
    assert counters.prefix_cache_hits == 4


def test_a_histogram_counts_by_inclusive_upper_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 12.0
