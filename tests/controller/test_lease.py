"""Of several who want a lease one has it, with an epoch that only rises; and knows when it is over.

The etcd lease runs against a small server of etcd's semantics, and against etcd where there is one;
that of Kubernetes against a small server of its API's.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.lease import Lease, LeaseStore
from controller.lease_etcd import EtcdLease
from controller.lease_file import FileLease
from controller.lease_kubernetes import KubernetesLease
from engine.errors import InvalidRequestError, StaleEpochError, UnavailableError
from tests.controller import small_kubernetes
from tests.controller.small_etcd import serve
from tests.controller.small_kubernetes import SmallKubernetes

ROOT = Path(__file__).parents[2]
TTL_S = 2.0
WAIT_S = 20.0
MakeStore = Callable[[str], LeaseStore]


@pytest.fixture(scope="module")
def small_etcd() -> Iterator[str]:
    with serve() as url:
        yield url


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallKubernetes]:
    with small_kubernetes.serve(tmp_path_factory.mktemp("account")) as api:
        yield api


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def real_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary = shutil.which("etcd")
    if binary is None:
        pytest.skip("etcd is not installed (on Debian: etcd-server)")
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    folder = tmp_path_factory.mktemp("etcd")
    urls = ("--listen-client-urls", client, "--advertise-client-urls", client)
    peers = ("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer)
    named = ("--name", "one", "--initial-cluster", f"one={peer}")
    command = [binary, "--data-dir", str(folder / "data"), *urls, *peers, *named]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: answers(client), "etcd does not answer")
        yield client
    finally:
        process.terminate()
        process.wait(15)


def answers(url: str) -> bool:
    try:
        EtcdLease(url, "hello", "test", TTL_S).holder()
    except UnavailableError:
        return False
    return True


def until(condition: Callable[[], object], problem: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, problem
        time.sleep(0.02)


@pytest.fixture(params=["file", "kubernetes", "small_etcd", "real_etcd"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    if request.param == "file":
        return lambda holder: FileLease(tmp_path / "new" / "lease", holder, TTL_S)
    if request.param == "kubernetes":
        api, name = request.getfixturevalue("kubernetes"), tmp_path.name.replace("_", "-")
        where = (api.url, api.account, "tests", name)
        return lambda holder: KubernetesLease(*where, holder, TTL_S)
    url = request.getfixturevalue(request.param)
    return lambda holder: EtcdLease(url, f"tests/{tmp_path.name}", holder, TTL_S)


def test_one_has_it_until_it_lets_go_and_epochs_rise(make_store: MakeStore) -> None:
    first, second = make_store("first"), make_store("second")
    assert first.holder() == ""
    assert first.acquire(0) == 1
    assert second.acquire(0) == 0
    assert (first.holder(), second.holder()) == ("first", "first")
    assert first.renew()
    first.release()
    assert second.acquire(0) == 2
    assert not first.renew(), "it was given up, and somebody else has it"
    second.release()
    assert first.acquire(40) == 41, "the engine knew of epoch 40"
    assert second.acquire(0) == 0
    first.release()


def test_who_does_not_renew_is_succeeded_when_the_lease_is_over(make_store: MakeStore) -> None:
    first, second = make_store("first"), make_store("second")
    began_s = time.monotonic()
    assert first.acquire(0) == 1
    until(lambda: second.acquire(0), "nobody could take over")
    took_s = time.monotonic() - began_s
    assert TTL_S <= took_s < TTL_S + 3.0  # etcd looks for leases that are over twice a second
    assert not first.renew()
    assert second.renew()
    second.release()


def test_many_at_once_and_one_gets_it(make_store: MakeStore) -> None:
    stores, got = [make_store(str(i)) for i in range(8)], []
    begin = threading.Barrier(len(stores))

    def run(store: LeaseStore) -> None:
        begin.wait()
        got.append(store.acquire(0))

    threads = [threading.Thread(target=run, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(got) == [0] * 7 + [1]


HOLDER = """
import sys, time
from pathlib import Path
from controller.lease_file import FileLease
print(FileLease(Path(sys.argv[1]), "killed", 3600.0).acquire(0), flush=True)
time.sleep(3600)
"""


def test_a_file_is_free_at_once_when_its_holder_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    store = FileLease(path, "next", 3600.0)
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        assert (store.acquire(0), store.holder()) == (0, "killed")
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    assert store.acquire(0) == 2
    store.release()
    assert not list(tmp_path.glob("lease.1")), "files of earlier epochs are taken away"


def test_a_file_that_makes_no_sense_is_a_free_lease(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text("{")
    assert FileLease(tmp_path / "lease", "a", TTL_S).acquire(3) == 4


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"cannot be written: .*--lease"):
        FileLease(tmp_path / "file" / "lease", "a", TTL_S)


# ------------------------------------------------------------------------ one's own side


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_holder_that_was_stopped_does_not_believe_in_its_lease(tmp_path: Path) -> None:
    clock = Clock()
    lease = Lease(FileLease(tmp_path / "lease", "a", TTL_S), clock, renews=False)
    with pytest.raises(StaleEpochError, match="does not hold the lease"):
        lease.check()
    assert lease.acquire(lambda: 6)
    assert (lease.term, lease.is_held) == (7, True)
    lease.check()
    clock.now_s += 0.8 * TTL_S
    lease.renew()
    clock.now_s += 0.8 * TTL_S
    assert lease.is_held
    clock.now_s += 0.2 * TTL_S  # in all a whole lease since it was asked for last
    assert not lease.is_held
    lease.renew()  # the file would allow it; but somebody may have had it in between
    assert lease.lost.is_set()
    with pytest.raises(StaleEpochError):
        lease.check()


def test_a_store_that_does_not_answer_costs_the_lease_only_when_it_is_over() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    store, clock = EtcdLease(url, "k", "a", TTL_S), Clock()
    lease = Lease(store, clock, renews=False)
    with pytest.raises(UnavailableError, match=r"etcd at .* does not answer"):
        lease.acquire()
    lease.lost.clear()
    lease._valid_until_s = clock.now_s + 1.0
    lease.renew()
    assert lease.is_held
    clock.now_s += 1.0
    lease.renew()
    assert lease.lost.is_set()


def test_it_renews_by_itself_until_it_is_lost(make_store: MakeStore) -> None:
    lease, other = Lease(make_store("a")), make_store("b")
    assert lease.acquire()
    deadline_s = time.monotonic() + 1.5 * TTL_S
    while time.monotonic() < deadline_s:
        assert other.acquire(0) == 0
        time.sleep(0.1)
    assert lease.is_held
    lease.release()
    assert other.acquire(0) == lease.term + 1
    other.release()
