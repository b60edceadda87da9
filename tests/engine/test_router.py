"""The router by hand: balance, shares, posterior, what fits."""

from __future__ import annotations

import pytest

from engine.cluster import Routing
from engine.errors import InvalidRequestError
from engine.router import ReplicaLoad, check_routing, pick, shares


def load(replica_id: int, outstanding: int = 0, devices: int = 1, tokens: int = 100) -> ReplicaLoad:
    return ReplicaLoad(replica_id, devices, outstanding, tokens)


def test_without_weights_load_is_balanced_by_devices() -> None:
    replicas = [load(0, 3, devices=1), load(1, 5, devices=2)]
    assert pick(Routing((0, 1)), replicas, 10, 10) == 1  # 4/1 against 6/2
    assert pick(Routing((0, 1)), [load(0), load(1)], 10, 10) == 0  # a tie goes to the first


def test_share_is_the_posterior_mean_of_the_rows() -> None:
    routing = Routing((0, 1), ((0.75, 0.25), (0.0, 1.0)), (50,), ((1.0, 0.0), (0.5, 0.5)))
    assert shares(routing, [load(0), load(1)], 50) == pytest.approx([0.75, 0.25])
    assert shares(routing, [load(0), load(1)], 51) == pytest.approx([0.375, 0.625])


def test_outstanding_requests_settle_in_proportion_to_the_shares() -> None:
    routing = Routing((0, 1), ((0.75, 0.25),), (), ((1.0,),))
    counts = [0, 0]
    for _ in range(400):
        counts[pick(routing, [load(0, counts[0]), load(1, counts[1])], 10, 10) or 0] += 1
    assert counts == [300, 100]


def test_a_replica_without_share_serves_only_when_no_other_fits() -> None:
    routing = Routing((0, 1), ((1.0, 0.0),), (), ((1.0,),))
    assert pick(routing, [load(0, 99), load(1)], 10, 10) == 0
    assert pick(routing, [load(0, 99, tokens=5), load(1)], 10, 10) == 1
    assert pick(routing, [load(0, tokens=5), load(1, tokens=5)], 10, 10) is None


def test_routing_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        Routing((0, 1), ((1.0,),), (), ((1.0,),))
    with pytest.raises(ValueError, match="2 buckets"):
        Routing((0,), ((1.0,),), (10,), ((1.0,),))
    for row in ((1.5, -0.5), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="finite shares"):
            Routing((1, 2), (row,), (), ((1.0,),))


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (Routing((1, 1)), "names a replica twice"),
        (Routing((1, 2), ((0.5, 0.6),), (), ((1.0,),)), "weights row 0"),
        (Routing((1,), ((1.0,),), (), ((0.5,),)), "posterior row 0"),
        (Routing((1,), ((1.0,),), (), ((),)), "needs 1 entries"),
        (Routing((1,), ((1.0,),), (9, 9), ((1.0,),) * 3), "must rise"),
    ],
)
def test_a_routing_that_cannot_be_followed_is_refused(routing: Routing, expected: str) -> None:
    check_routing(Routing((1, 2), ((0.3, 0.7),), (9,), ((1.0,),) * 2))
    with pytest.raises(InvalidRequestError, match=expected):
        check_routing(routing)
