"""Prefix caching as a hit rate, against the batch scheduler with its real prefix cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.block_manager import BlockManager
from engine.cluster import Request, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from engine.request import SamplingParams, Sequence
from engine.scheduler import BatchScheduler
from envs.surrogate.cluster import SurrogateCluster
from tests.envs.plain_cluster import PlainReplica

ONE = dense_deployment(parse_deployment_key("1xtp1pp1"))
BLOCK, PROMPT, SHARED = 16, 161, 80  # half of the ten blocks before the last token


@pytest.mark.parametrize("tokens", [20, 64, 512])
def test_equals_the_prefix_cache(small_cluster: ProfiledCluster, tokens: int) -> None:
    """After a first request has filled the cache, prompts share half of their blocks with it."""
    spec = replace(
        small_cluster.spec, max_num_batched_tokens=tokens, device_memory_bytes=60_000_000
    )
    cluster = replace(small_cluster, spec=spec)
    arrivals = [(100.0 + 0.01 * i, 1 + i % 7) for i in range(25)]
    surrogate = SurrogateCluster(cluster, ONE, prefix_hit_rate=SHARED / (PROMPT - 1))
    for i, (at_s, output) in enumerate(arrivals):
        surrogate.submit(Request(f"r{i}", at_s, PROMPT, output))
    surrogate.advance(1e4)
    surrogate.check_integrity()
    model, blocks = cluster.profile.step_model(ONE.configs[0]), BlockManager(5000, BLOCK, True)
    scheduler = BatchScheduler(
        blocks, spec.max_num_seqs, tokens, spec.model.max_model_len, None, num_stages=1
    )
    plain = PlainReplica(scheduler, model)

    def add(name: str, at_s: float, prompt: list[int], output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        plain.run(at_s)
        plain.scheduler.add(Sequence(name, prompt, params, at_s))
        plain.token_times[name] = []
        plain.wake_s, plain.may_start = max(plain.wake_s, at_s), True

    shared = list(range(SHARED))
    add("first", 0.0, [*shared, *range(1000, 1000 + PROMPT - SHARED)], 1)
    for i, (at_s, output) in enumerate(arrivals):
        own = range(2000 * (i + 1), 2000 * (i + 1) + PROMPT - SHARED)
        add(f"r{i}", at_s, [*shared, *own], output)
    plain.run(1e9)
    assert blocks.prefix_cache_hits == SHARED * len(arrivals)
    ends = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    assert len(ends) == len(arrivals)
    for outcome in ends:
        times = plain.token_times[outcome.request_id]
        assert outcome.first_token_s == pytest.approx(times[0], abs=1e-9)
        assert outcome.finish_s == pytest.approx(times[-1], abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "rate", "computed"), [(33, 1.0, 1), (32, 1.0, 16), (16, 1.0, 16), (33, 0.5, 17)]
)
def test_first_step_by_hand(
    small_cluster: ProfiledCluster, prompt: int, rate: float, computed: int
) -> None:
    surrogate = SurrogateCluster(small_cluster, ONE, prefix_hit_rate=rate, trace_items=10)
    surrogate.submit(Request("a", 0.0, prompt, 1))
    surrogate.advance(5.0)
    (item,) = surrogate.trace()
    assert (item["start"], item["tokens"]) == (prompt - computed, computed)


def test_no_rate_beyond_one(small_cluster: ProfiledCluster) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        SurrogateCluster(small_cluster, ONE, prefix_hit_rate=1.5)
