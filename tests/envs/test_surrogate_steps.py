"""One description, two implementations: the kernel equals the batch scheduler step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import Request, Routing, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from tests.envs.plain_cluster import PlainCluster, steps_of, with_budgets

KEYS = ("1xtp1pp1", "1xtp1pp2", "1xtp1pp3+1xtp1pp1", "1xtp1pp4", "1xtp2pp1+2xtp1pp1", "2xtp1pp2")


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(KEYS),
    spare_blocks=st.integers(0, 12),
    seqs=st.integers(1, 16),
    tokens=st.one_of(st.integers(1, 12), st.integers(13, 64)),
    grid_s=st.sampled_from([0.0, 0.05, 0.4]),
    number=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.floats(0, 2), max_size=4),
    limits=st.lists(st.tuples(st.floats(0.001, 2), st.integers(0, 28)), max_size=4),
)
def test_every_step_equals_the_batch_scheduler(
    small_cluster: ProfiledCluster,
    key: str,
    spare_blocks: int,
    seqs: int,
    tokens: int,
    grid_s: float,
    number: int,
    seed: int,
    cuts: list[float],
    limits: list[tuple[float, int]],
) -> None:
    """Items, positions, token counts, times, free blocks and preemptions of all steps, with other
    limits to the blocks of the first replica now and then."""
    deployment = dense_deployment(parse_deployment_key(key))
    cluster = with_budgets(small_cluster, deployment.configs, 16 + spare_blocks, seqs, tokens)
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(0.01, number))
    if grid_s:
        arrival_s = np.floor(arrival_s / grid_s) * grid_s  # many at one instant
    requests = [
        Request(f"r{i}", at_s, int(rng.integers(1, 200)), int(rng.integers(1, 60)))
        for i, at_s in enumerate(arrival_s.tolist())
    ]
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    plain = PlainCluster(cluster, deployment, routing)
    limited = [*sorted(limits), (3.0, None)]
    plain.run(requests, limited)
    surrogate = SurrogateCluster(cluster, deployment, trace_items=500_000)
    for request in requests:
        surrogate.submit(request)
    row, steps_s = surrogate.rows.of(deployment.replicas[0]), [(c, False, None) for c in cuts]
    for until_s, is_limit, blocks in sorted(
        [*steps_s, *((at_s, True, blocks) for at_s, blocks in limited), (1e6, False, None)],
        key=lambda step: step[:2],
    ):
        surrogate.advance(until_s)
        if is_limit:
            surrogate.state.limit_blocks(row, blocks)
            surrogate.state.wake(row, until_s)
        surrogate.check_integrity()
    names = [r.request_id for r in requests]
    for replica in deployment.replicas:
        found = steps_of(surrogate, surrogate.rows.of(replica), names)
        assert found == plain.replicas[replica.replica_id].steps_made


def test_trace_says_when_it_is_too_short(small_cluster: ProfiledCluster) -> None:
    surrogate = SurrogateCluster(
        small_cluster, dense_deployment(parse_deployment_key("1xtp1pp1")), trace_items=3
    )
    surrogate.submit(Request("a", 0.0, 10, 3))
    surrogate.advance(5.0)
    assert surrogate.trace()["tokens"].tolist() == [10, 1, 1]
    surrogate.submit(Request("b", 6.0, 10, 1))
    surrogate.advance(9.0)
    with pytest.raises(AssertionError, match="trace_items=3"):
        surrogate.trace()
