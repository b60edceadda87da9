"""TLS and client certificates, exchanged while running; addresses that it is unsafe to serve at."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from served import Served
from watched import Watched

from controller import cli
from controller.__main__ import main
from controller.access import AccessFile, issue_token
from controller.config import ControllerConfig
from controller.control_channel import ClientAccess, is_loopback
from controller.remote_control import RemoteControl
from controller.roles import Role
from controller.security import build_security
from engine.certificates import Certificates, TlsFiles
from engine.errors import InvalidRequestError, TidewrightError, UnavailableError
from engine.profile import ProfiledCluster


def write(path: Path, *blobs: Any, mode: int = 0o600) -> Path:
    path.write_bytes(b"".join(blob.bytes() for blob in blobs))
    path.chmod(mode)
    return path


class Authority:
    """A certificate authority, what it gave the server, and its clients' files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ca = folder, trustme.CA()
        self.ca = write(folder / "ca.pem", self._ca.cert_pem)
        self.cert, self.key = folder / "server.pem", folder / "server.key"
        self.renew()

    def renew(self) -> bytes:
        """A new certificate for the server; returns it as DER."""
        found = self._ca.issue_cert("127.0.0.1", "localhost")
        write(self.cert, *found.cert_chain_pems)
        write(self.key, found.private_key_pem)
        return ssl.PEM_cert_to_DER_cert(found.cert_chain_pems[0].bytes().decode())

    def client(self, name: str) -> tuple[Path, Path]:
        found = self._ca.issue_cert(f"{name}@example.org", common_name=name)
        cert = write(self._folder / f"{name}.pem", *found.cert_chain_pems)
        return cert, write(self._folder / f"{name}.key", found.private_key_pem)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def served_with(cluster: ProfiledCluster, **config: Any) -> Iterator[tuple[Served, str]]:
    security = build_security(ControllerConfig(**config))
    found = Served(cluster, security=security)
    try:
        yield found, f"127.0.0.1:{found.port}"
    finally:
        found.close()
        security.close()


def state(target: str, **access: Path) -> str:
    with RemoteControl(target, 5.0, access=ClientAccess(**access)) as control:
        return str(control.state()["mode"])


def certificate_of(port: int, ca: Path) -> bytes:
    """What a new connection is shown."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        found = secure.getpeercert(binary_form=True)
    assert found is not None
    return found


# ---------------------------------------------------------------- TLS


def test_with_tls_only_those_who_speak_it_and_know_the_authority_get_through(
    synthetic_cluster: ProfiledCluster, authority: Authority, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.pem", trustme.CA().cert_pem)
    tls = {"tls_cert": authority.cert, "tls_key": authority.key}
    with served_with(synthetic_cluster, **tls) as (_, target):
        assert state(target, tls_ca=authority.ca) == "MODE_ACTIVE"
        with pytest.raises(UnavailableError):
            state(target)
        with pytest.raises(UnavailableError):
            state(target, tls_ca=other)


def test_a_certificate_is_exchanged_without_a_restart(
    synthetic_cluster: ProfiledCluster, authority: Authority
) -> None:
    first = authority.renew()
    tls = {"tls_cert": authority.cert, "tls_key": authority.key}
    with (
        served_with(synthetic_cluster, **tls) as (served, target),
        RemoteControl(target, 5.0, access=ClientAccess(tls_ca=authority.ca)) as open_before,
    ):
        open_before.state()
        assert certificate_of(served.port, authority.ca) == first
        second = authority.renew()
        assert certificate_of(served.port, authority.ca) == second
        open_before.state()  # connections that were there go on
        authority.key.write_text("half written")
        assert certificate_of(served.port, authority.ca) == second
        authority.key.chmod(0o644)
        assert certificate_of(served.port, authority.ca) == second
        third = authority.renew()
        assert certificate_of(served.port, authority.ca) == third
        assert state(target, tls_ca=authority.ca) == "MODE_ACTIVE"


def test_the_dashboards_certificate_is_exchanged_with_it(
    synthetic_cluster: ProfiledCluster, authority: Authority
) -> None:
    first = authority.renew()
    certificates = Certificates(TlsFiles(authority.cert, authority.key))
    found = Watched(synthetic_cluster, certificates=certificates)
    try:
        assert certificate_of(found.port, authority.ca) == first
        open_before = open_to(found.port, authority.ca)
        second = authority.renew()
        assert certificate_of(found.port, authority.ca) == second
        open_before.sendall(b"GET /api/state HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert open_before.recv(100).startswith(b"HTTP/1.1 200")
        open_before.close()
        authority.key.write_text("half written")
        assert certificate_of(found.port, authority.ca) == second
        third = authority.renew()
        assert certificate_of(found.port, authority.ca) == third
        found.stop_front()
        authority.renew()
        found.start_front()  # as after the lease came back
        assert certificate_of(found.port, authority.ca) != third
    finally:
        found.close()


def test_the_dashboards_clients_are_checked_by_the_authority_as_it_is(
    synthetic_cluster: ProfiledCluster, authority: Authority, tmp_path: Path
) -> None:
    mine = authority.client("alice")
    other = trustme.CA()
    issued = other.issue_cert("mallory@example.org", common_name="mallory")
    theirs = (
        write(tmp_path / "theirs.pem", *issued.cert_chain_pems),
        write(tmp_path / "theirs.key", issued.private_key_pem),
    )
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(authority.ca.read_bytes())
    certificates = Certificates(TlsFiles(authority.cert, authority.key, trusted))
    found = Watched(synthetic_cluster, certificates=certificates)
    try:
        assert answered(found.port, authority.ca, mine)
        assert not answered(found.port, authority.ca, theirs)
        assert not answered(found.port, authority.ca, None)
        write(trusted, other.cert_pem)
        assert answered(found.port, authority.ca, theirs)
        assert not answered(found.port, authority.ca, mine)
    finally:
        found.close()


def open_to(port: int, ca: Path, client: tuple[Path, Path] | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(ca))
    if client is not None:
        context.load_cert_chain(*client)
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def answered(port: int, ca: Path, client: tuple[Path, Path] | None) -> bool:
    try:
        with open_to(port, ca, client) as secure:
            secure.sendall(b"GET /api/session HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return secure.recv(100).startswith(b"HTTP/1.1 200")
    except (ssl.SSLError, ConnectionError):
        return False


def test_clients_need_a_certificate_where_the_controller_asks_for_one(
    synthetic_cluster: ProfiledCluster, authority: Authority, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    stranger = Authority(elsewhere)
    cert, key = authority.client("grafana")
    bad_cert, bad_key = stranger.client("grafana")
    access = tmp_path / "access"
    token = issue_token(access, "alice", "operate")
    access.write_text(access.read_text() + "dashboards read certificate:grafana\n")
    config = {
        "tls_cert": authority.cert,
        "tls_key": authority.key,
        "tls_client_ca": authority.ca,
        "access": access,
    }
    with served_with(synthetic_cluster, **config) as (_, target):
        mine = ClientAccess(tls_ca=authority.ca, tls_cert=cert, tls_key=key)
        with RemoteControl(target, 5.0, access=mine) as control:
            control.state()
            with pytest.raises(TidewrightError, match="dashboards has read"):
                control.resume()
        with pytest.raises(UnavailableError):
            state(target, tls_ca=authority.ca)
        with pytest.raises(UnavailableError):
            state(target, tls_ca=authority.ca, tls_cert=bad_cert, tls_key=bad_key)
        given = tmp_path / "token"
        given.touch(0o600)
        given.write_text(f"{token}\n")
        by_token = ClientAccess(authority.ca, cert, key, given)
        with RemoteControl(target, 5.0, access=by_token) as control:
            control.resume()


def test_the_commands_take_the_same_files(
    synthetic_cluster: ProfiledCluster,
    authority: Authority,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    access, token = tmp_path / "access", tmp_path / "token"
    token.touch(0o600)
    token.write_text(issue_token(access, "alice", "read"))
    config = {"tls_cert": authority.cert, "tls_key": authority.key, "access": access}
    with served_with(synthetic_cluster, **config) as (_, target):
        given = ["--control", target, "--tls-ca", str(authority.ca), "--token-file", str(token)]
        assert cli.main(["state", "--json", *given]) == 0
        assert '"mode": "MODE_ACTIVE"' in capsys.readouterr().out
        with pytest.raises(TidewrightError, match="alice has read"):
            cli.main(["resume", *given])
        with pytest.raises(TidewrightError, match="no token that is known here"):
            cli.main(["state", *given[:4]])


def test_a_token_is_printed_once_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = tmp_path / "access"
    assert main(["token", "alice", "admin", "--access", str(access)]) == 0
    out, err = capsys.readouterr()
    right = AccessFile(access).find(out.strip(), ())
    assert right is not None
    assert (right.name, right.role, err) == ("alice", Role.ADMIN, "")


# ---------------------------------------------------------------- what is refused


def test_files_that_are_no_pair_are_refused_at_the_start(
    authority: Authority, tmp_path: Path
) -> None:
    _, other_key = authority.client("other")
    for key in (other_key, authority.cert, tmp_path / "none.key"):
        with pytest.raises(InvalidRequestError, match=r"no certificate with its key|cannot be"):
            build_security(ControllerConfig(tls_cert=authority.cert, tls_key=key))
    authority.key.chmod(0o640)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        build_security(ControllerConfig(tls_cert=authority.cert, tls_key=authority.key))


@pytest.mark.parametrize("given", ["tls_cert", "tls_key", "tls_client_ca"])
def test_half_of_tls_is_refused(authority: Authority, given: str) -> None:
    with pytest.raises(InvalidRequestError, match="both --tls-cert and --tls-key"):
        build_security(ControllerConfig(**{given: authority.cert}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "controller.example", ""])
def test_beyond_loopback_it_takes_tls_and_rights_or_a_word(
    host: str, authority: Authority, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    issue_token(access, "alice", "read")
    tls = {"tls_cert": authority.cert, "tls_key": authority.key}
    with pytest.raises(InvalidRequestError, match="without TLS"):
        build_security(ControllerConfig(host=host, access=access))
    with pytest.raises(InvalidRequestError, match="--access"):
        build_security(ControllerConfig(host=host, **tls))
    build_security(ControllerConfig(host=host, **tls, access=access)).close()
    build_security(ControllerConfig(host=host, **tls, tls_client_ca=authority.ca)).close()
    build_security(ControllerConfig(host=host, insecure=True)).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    build_security(ControllerConfig(host=host)).close()


def test_a_token_does_not_cross_a_network_in_plain_text(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("secret-word")
    with pytest.raises(InvalidRequestError, match="unencrypted") as error:
        RemoteControl("192.0.2.7:50052", access=ClientAccess(token_file=token))
    assert "secret-word" not in str(error.value)
    token.chmod(0o644)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        RemoteControl("127.0.0.1:50052", access=ClientAccess(token_file=token))
