"""What guards an engine's ports: TLS, tokens over gRPC, keys over HTTP. No worker is started."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from controller.control_channel import ClientAccess
from controller.remote import RemoteCluster
from engine.app import build_ports, http_server
from engine.build import build_runtime
from engine.config import EngineConfig
from engine.errors import (
    InvalidRequestError,
    PermissionDeniedError,
    TidewrightError,
    UnauthenticatedError,
    UnavailableError,
)
from engine.http_server import bind_http
from engine.server import start_grpc
from engine.tokenizer import Tokenizer
from engine.tokens import READ, READING, TokenFile, TokenInterceptor, write_token
from protos import engine_pb2

TOKEN, OTHER, KEY = "c" * 32, "d" * 32, "k" * 32


def write(path: Path, *parts: bytes | str, mode: int = 0o600) -> Path:
    path.write_bytes(b"".join(p.encode() if isinstance(p, str) else p for p in parts))
    path.chmod(mode)
    return path


class Files:
    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.ca = write(folder / "ca.pem", self._ca.cert_pem.bytes())
        self.cert, self.key = folder / "server.pem", folder / "server.key"
        self.renew()
        self.control = write(folder / "control", f"# of controllers\n{TOKEN}\n")
        self.keys = write(folder / "keys", KEY)
        mine = self._ca.issue_cert("controller@example.org", common_name="controller")
        self.own_cert = write(folder / "own.pem", *(p.bytes() for p in mine.cert_chain_pems))
        self.own_key = write(folder / "own.key", mine.private_key_pem.bytes())
        other = trustme.CA().issue_cert("controller@example.org", common_name="controller")
        self.other_cert = write(folder / "o.pem", *(p.bytes() for p in other.cert_chain_pems))
        self.other_key = write(folder / "o.key", other.private_key_pem.bytes())
        self.mine = write(folder / "mine", TOKEN)
        self.wrong = write(folder / "wrong", OTHER)

    def renew(self) -> None:
        found = self._ca.issue_cert("127.0.0.1")
        write(self.cert, *(part.bytes() for part in found.cert_chain_pems))
        write(self.key, found.private_key_pem.bytes())


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


Asked = Callable[[str, str], Any]


def with_engine(tiny_model_dir: Path, ask: Asked, **options: Any) -> Any:
    """`ask(HTTP address, gRPC target)` in a thread, beside an engine that has not started yet."""
    config = EngineConfig(model=str(tiny_model_dir), max_model_len=256, **options)
    runtime, tokenizer = build_runtime(config), Tokenizer(tiny_model_dir)
    ports = build_ports(config)

    async def run() -> Any:
        sock = bind_http("127.0.0.1", 0)
        certificates, tokens = ports.control_certificates, ports.control_tokens
        async with http_server(runtime, tokenizer, "tiny", sock, ports):
            server, port = await start_grpc(
                *(runtime, tokenizer, "tiny", "127.0.0.1", 0),
                None if certificates is None else certificates.credentials(),
                () if tokens is None else (TokenInterceptor(tokens),),
            )
            scheme = "http" if certificates is None else "https"
            url = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
            try:
                return await asyncio.to_thread(ask, url, f"127.0.0.1:{port}")
            finally:
                await server.stop(0)

    try:
        return asyncio.run(run())
    finally:
        asyncio.run(runtime.close())


def described(target: str, **access: Path) -> str | type[TidewrightError]:
    try:
        with RemoteCluster(target, 5.0, ClientAccess(**access)) as cluster:
            return cluster.served_model_name
    except TidewrightError as error:
        return type(error)


def test_controllers_need_tls_and_a_token(tiny_model_dir: Path, files: Files) -> None:
    def ask(url: str, target: str) -> Any:
        tls = {"tls_ca": files.ca}
        found = [
            described(target, **tls, token_file=files.mine),
            described(target, **tls, token_file=files.wrong),
            described(target, **tls),
            described(target, token_file=files.mine),
        ]
        write(files.control, f"{OTHER}\n")
        files.renew()
        return [*found, described(target, **tls, token_file=files.wrong)]

    guards = {"tls_cert": files.cert, "tls_key": files.key, "control_tokens": files.control}
    assert with_engine(tiny_model_dir, ask, **guards) == [
        *("tiny", UnauthenticatedError, UnauthenticatedError, UnavailableError),
        "tiny",
    ]


def test_controllers_may_need_a_certificate_and_prompts_do_not(
    tiny_model_dir: Path, files: Files
) -> None:
    def ask(url: str, target: str) -> Any:
        tls = {"tls_ca": files.ca}
        context = ssl.create_default_context(cafile=str(files.ca))
        return [
            described(target, **tls, tls_cert=files.own_cert, tls_key=files.own_key),
            described(target, **tls, tls_cert=files.other_cert, tls_key=files.other_key),
            described(target, **tls),
            httpx.get(f"{url}/v1/models", verify=context, trust_env=False).status_code,
        ]

    guards = {"tls_cert": files.cert, "tls_key": files.key, "control_client_ca": files.ca}
    assert with_engine(tiny_model_dir, ask, **guards) == [
        *("tiny", UnavailableError, UnavailableError, 200)
    ]


def test_a_token_to_read_with_changes_nothing(tiny_model_dir: Path, files: Files) -> None:
    """One client, several calls: what may be read is not what opens the rest."""

    def tried(call: Callable[[], Any]) -> str:
        try:
            call()
        except TidewrightError as error:
            return type(error).__name__
        return "done"

    def ask(url: str, target: str) -> Any:
        write(files.control, f"{TOKEN}\n{OTHER} {READ}\n")
        access = ClientAccess(tls_ca=files.ca, token_file=files.wrong)
        with RemoteCluster(target, 5.0, access) as cluster:
            routing = cluster.snapshot().routing
            return [
                tried(lambda: cluster.events(0)),
                tried(lambda: cluster.set_routing(routing)),
                tried(lambda: cluster.cancel("switch-0000")),
                tried(lambda: cluster.ticket("switch-0000")),
            ]

    guards = {"tls_cert": files.cert, "tls_key": files.key, "control_tokens": files.control}
    denied = PermissionDeniedError.__name__
    assert with_engine(tiny_model_dir, ask, **guards) == ["done", denied, denied, "NotFoundError"]


def test_every_method_reads_or_acts() -> None:
    service = engine_pb2.DESCRIPTOR.services_by_name["EngineService"]
    of_service = {f"/{service.full_name}/{method.name}" for method in service.methods}
    acting = {name.rpartition("/")[2] for name in of_service - READING}
    assert acting == {"Generate", "ApplySwitch", "CancelSwitch", "SetRouting"}
    assert {name.rpartition("/")[2] for name in READING - of_service} == {"ServerReflectionInfo"}


def test_marks_are_for_the_file_that_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens", f"{TOKEN} {READ}\n{OTHER}\n{KEY} {READ}\n{KEY}\n")
    tokens = TokenFile(path, "--control-tokens", (READ,))
    marks = [tokens.check(f"Bearer {token}") for token in (TOKEN, OTHER, KEY)]
    assert marks == [READ, "", ""]  # of a token that stands there twice, the wider right
    with pytest.raises(InvalidRequestError, match="without spaces"):
        TokenFile(path, "--api-keys")


def test_an_authority_of_clients_needs_a_certificate(tiny_model_dir: Path, files: Files) -> None:
    with pytest.raises(InvalidRequestError, match="an authority of clients goes with them"):
        build_ports(EngineConfig(model=str(tiny_model_dir), control_client_ca=files.ca))


def test_a_token_that_is_written_is_one_that_is_taken(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    TokenFile(tmp_path / "token", "--control-tokens").check(f"Bearer {token}")
    access = ClientAccess(token_file=tmp_path / "token")
    assert access.metadata("127.0.0.1:1") == (("authorization", f"Bearer {token}"),)
    assert write_token(tmp_path / "token") != token


def test_prompts_need_tls_and_a_key(tiny_model_dir: Path, files: Files) -> None:
    def ask(url: str, target: str) -> list[httpx.Response]:
        context = ssl.create_default_context(cafile=str(files.ca))
        with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=20) as client:
            body = {"prompt": "x"}
            return [
                client.get("/health"),
                client.get("/metrics"),
                client.get("/v1/models"),
                client.post("/v1/completions", content=b"{no JSON"),
                client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"}),
                client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}),
                client.post(
                    "/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
                ),
            ]

    guards = {"tls_cert": files.cert, "tls_key": files.key, "api_keys": files.keys}
    found = with_engine(tiny_model_dir, ask, **guards)
    assert [r.status_code for r in found] == [200, 200, 401, 401, 401, 200, 503]  # is starting
    assert found[2].json()["error"]["code"] == "invalid_api_key"
    assert found[2].headers["www-authenticate"] == "Bearer"
    assert "--api-keys" in found[2].json()["error"]["message"]


def test_without_options_nothing_is_asked_for(tiny_model_dir: Path) -> None:
    def ask(url: str, target: str) -> Any:
        return described(target), httpx.get(f"{url}/v1/models", trust_env=False).status_code

    assert with_engine(tiny_model_dir, ask) == ("tiny", 200)


def test_a_token_is_not_sent_in_plain_text_to_another_machine(files: Files) -> None:
    access = ClientAccess(token_file=files.mine, prefix="engine-")
    with pytest.raises(InvalidRequestError, match="unencrypted; give --engine-tls-ca"):
        RemoteCluster("engine.example:50051", access=access)


@pytest.mark.parametrize(
    ("authorization", "passes"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (f"Bearer {TOKEN} ", True),
        (f"Bearer {TOKEN}x", False),
        (f"Basic {TOKEN}", False),
        ("Bearer # of controllers", False),
        ("Bearer ", False),
        ("Bearer \udcff", False),
        ("", False),
        (None, False),
    ],
)
def test_tokens(files: Files, authorization: str | None, passes: bool) -> None:
    tokens = TokenFile(files.control, "--control-tokens")
    if passes:
        tokens.check(authorization)
    else:
        with pytest.raises(UnauthenticatedError, match="--control-tokens"):
            tokens.check(authorization)


def test_tokens_are_exchanged_while_running(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    tokens = TokenFile(files.control, "--control-tokens")
    write(files.control, f"{TOKEN}\n{OTHER}\n")
    tokens.check(f"Bearer {TOKEN}")
    tokens.check(f"Bearer {OTHER}")
    with caplog.at_level(logging.ERROR):
        write(files.control, "short")
        tokens.check(f"Bearer {OTHER}")  # those read before stay
    assert "stay in force" in caplog.text
    files.control.unlink()
    with pytest.raises(UnauthenticatedError):
        tokens.check(f"Bearer {OTHER}")


@pytest.mark.parametrize(
    ("text", "mode", "part"),
    [
        ("short", 0o600, "of 16 characters or more"),
        ("", 0o600, "must have a token on each line"),
        (f"{TOKEN} {OTHER}", 0o600, "without spaces"),
        (f"{TOKEN} write", 0o600, "or `read` behind it"),
        (TOKEN, 0o644, "chmod 600"),
    ],
)
def test_files_of_no_use_are_refused(tmp_path: Path, text: str, mode: int, part: str) -> None:
    path = write(tmp_path / "tokens", text, mode=mode)
    with pytest.raises(InvalidRequestError, match=part):
        build_ports(EngineConfig(control_tokens=path))


def test_half_of_tls_is_no_tls(files: Files) -> None:
    with pytest.raises(InvalidRequestError, match="both --tls-cert and --tls-key"):
        build_ports(EngineConfig(tls_cert=files.cert))
