"""A lease as an object of Kubernetes, against a small server of the API's semantics. What every
lease must do is in tests/controller/test_lease.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from controller.config import ControllerConfig
from controller.leadership import build_lease
from controller.lease import Lease
from controller.lease_kubernetes import KubernetesLease, server_url
from engine.errors import InvalidRequestError, StaleEpochError, UnavailableError
from tests.controller.small_kubernetes import SmallKubernetes, serve

TTL_S = 2.0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SmallKubernetes]:
    with serve(tmp_path) as found:
        yield found


def store(api: SmallKubernetes, holder: str, clock: Clock, name: str = "pool") -> KubernetesLease:
    return KubernetesLease(api.url, api.account, "serving", name, holder, TTL_S, clock)


def spec_of(api: SmallKubernetes) -> dict[str, Any]:
    return dict(api.objects["serving", "pool"]["spec"])


def test_the_object_is_as_kubernetes_documents_it(api: SmallKubernetes) -> None:
    first = store(api, "first", Clock())
    assert first.where == "kubernetes://serving/pool"
    assert first.acquire(0) == 1
    told = spec_of(api)
    assert (told["holderIdentity"], told["leaseDurationSeconds"]) == ("first", 2)
    assert told["leaseTransitions"] == 1
    assert told["acquireTime"] == told["renewTime"]
    assert first.renew()
    assert spec_of(api)["renewTime"] > told["renewTime"]
    assert spec_of(api)["acquireTime"] == told["acquireTime"]
    first.release()
    assert "holderIdentity" not in spec_of(api)
    assert spec_of(api)["leaseTransitions"] == 1, "the epoch outlives its holder"


def test_who_takes_over_waits_a_whole_lease_on_its_own_clock(api: SmallKubernetes) -> None:
    own, others = Clock(), Clock()
    first, second = store(api, "first", own), store(api, "second", others)
    assert first.acquire(0) == 1
    own.now_s += 1e6  # clocks that do not agree
    assert second.acquire(0) == 0
    others.now_s += 0.9 * TTL_S
    assert second.acquire(0) == 0
    assert first.renew()
    others.now_s += 0.9 * TTL_S  # longer than a lease since it was seen first, but it was renewed
    assert second.acquire(0) == 0
    others.now_s += TTL_S
    assert second.acquire(0) == 2
    assert not first.renew(), "it is another's"
    first.release()
    assert (second.holder(), second.renew()) == ("second", True), "who lost it lets it alone"


def test_of_two_controllers_one_acts_and_the_one_that_lost_it_does_not(
    api: SmallKubernetes,
) -> None:
    clock = Clock()
    first, second = (
        Lease(store(api, name, clock), clock, renews=False) for name in ("first", "second")
    )
    assert first.acquire()
    assert not second.acquire()
    first.check()
    clock.now_s += TTL_S  # it hung
    assert second.acquire()
    second.check()
    assert (first.term, second.term) == (1, 2)
    with pytest.raises(StaleEpochError, match="does not hold the lease"):
        first.check()
    first.renew()
    assert first.lost.is_set()
    first.release()
    assert second.is_held
    second.renew()
    assert not second.lost.is_set()


def test_a_holder_whose_object_is_another_s_by_now_has_lost_it(api: SmallKubernetes) -> None:
    clock = Clock()
    lease = Lease(store(api, "first", clock), clock, renews=False)
    assert lease.acquire()
    found = api.objects["serving", "pool"]
    taken = {"holderIdentity": "second", "leaseTransitions": 2}
    api.put(("serving", "pool"), found | {"spec": found["spec"] | taken})
    assert lease.is_held, "it cannot know yet"
    lease.renew()
    assert lease.lost.is_set()


def test_an_object_that_was_deleted_is_lost_and_begins_above_what_the_engine_knows(
    api: SmallKubernetes,
) -> None:
    first = store(api, "first", Clock())
    assert first.acquire(0) == 1
    del api.objects["serving", "pool"]
    assert not first.renew()
    assert store(api, "second", Clock()).acquire(7) == 8


def test_a_label_of_somebody_else_does_not_cost_the_lease(api: SmallKubernetes) -> None:
    first = store(api, "first", Clock())
    assert first.acquire(0) == 1
    api.label("serving", "pool")
    assert first.renew()
    assert api.objects["serving", "pool"]["metadata"]["labels"] == {"team": "a"}


def test_of_two_writes_of_one_version_one_is_refused(api: SmallKubernetes) -> None:
    clock = Clock()
    first, second = store(api, "first", clock), store(api, "second", clock)
    assert first.acquire(0) == 1
    first.release()
    seen = second._read()
    assert first.acquire(0) == 2
    assert not second._write(seen, seen["spec"] | {"holderIdentity": "second"})
    assert first.holder() == "first"


def test_an_answer_that_was_lost_leaves_it_to_who_asked(api: SmallKubernetes) -> None:
    """The write that took it went through, and its caller does not know."""
    first = store(api, "first", Clock())
    assert first.acquire(0) == 1
    again = store(api, "first", Clock())  # of the same process, which got no answer
    assert again.acquire(0) == 2, "at once, with an epoch of its own"


def test_a_token_that_is_renewed_is_read_again(api: SmallKubernetes) -> None:
    first = store(api, "first", Clock())
    assert first.acquire(0) == 1
    api.renew_token("second")
    assert first.renew()
    (api.account / "token").write_text("first\n")
    with pytest.raises(UnavailableError, match="401 Unauthorized"):
        first.renew()


def test_a_server_of_another_authority_gets_no_token(api: SmallKubernetes) -> None:
    trustme.CA().cert_pem.write_to_path(api.account / "ca.crt")
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        store(api, "first", Clock()).acquire(0)


def test_what_the_account_may_not_do_is_told(api: SmallKubernetes) -> None:
    wrong = KubernetesLease(api.url, api.account, "a/b", "pool", "first", TTL_S)
    with pytest.raises(UnavailableError, match=r"403 forbidden.*get, create and update on leases"):
        wrong.acquire(0)


def test_the_server_is_that_of_the_pod() -> None:
    there = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert server_url(there) == "https://10.0.0.1:6443"
    assert server_url({"KUBERNETES_SERVICE_HOST": "fd00::1"}) == "https://[fd00::1]:443"
    with pytest.raises(InvalidRequestError, match="KUBERNETES_SERVICE_HOST is not set"):
        server_url({})


@pytest.mark.parametrize("told", ["kubernetes://", "kubernetes://a", "kubernetes://A/b"])
def test_a_lease_that_names_no_object_is_one_sentence(told: str) -> None:
    with pytest.raises(InvalidRequestError, match="kubernetes://NAMESPACE/NAME"):
        build_lease(ControllerConfig(lease=told))


def test_the_command_s_lease_is_such_an_object(
    api: SmallKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, port = api.url.removeprefix("https://").partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    config = ControllerConfig(
        lease="kubernetes://serving/pool", lease_account=api.account, lease_s=3600.0
    )
    lease = build_lease(config)
    assert lease is not None
    assert lease.acquire(lambda: 4)
    assert (lease.term, spec_of(api)["leaseTransitions"]) == (5, 5)
    lease.release()
