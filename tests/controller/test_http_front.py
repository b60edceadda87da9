"""The HTTP front without a browser: who may ask, what is answered, and events that go on."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watched import START_S, Watched

from controller.access import AccessFile, issue_token
from controller.app import Steering, _dashboard
from controller.audit import AuditLog
from controller.config import ControllerConfig
from controller.gate import Gate
from controller.history import engine_view, plain
from controller.http_front import KINDS, PAGES, READS, WRITES, start_http
from controller.http_guard import HEADERS, name_of
from controller.live_feed import MAX_WATCHERS
from controller.records import Mode
from controller.security import Security
from engine.errors import UnavailableError
from engine.profile import ProfiledCluster

ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def watched(synthetic_cluster: ProfiledCluster) -> Iterator[Watched]:
    found = Watched(synthetic_cluster, names=("tidewright.example",))
    try:
        found.step()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def client(watched: Watched) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=watched.base, timeout=20, trust_env=False) as found:
        yield found


@pytest.fixture(scope="module")
def changing(client: httpx.Client) -> dict[str, str]:
    """The headers of a change that is let through."""
    return JSON | {"x-tidewright-token": client.get("/api/session").json()["page_token"]}


def events(watched: Watched, number: int, last_id: str = "") -> list[tuple[str, str, Any]]:
    """The first so many events but pings and looks at the engine: (name, id, data)."""
    headers = {"last-event-id": last_id} if last_id else {}
    found: list[tuple[str, str, Any]] = []
    url = f"{watched.base}/api/events"
    with httpx.stream("GET", url, headers=headers, timeout=20, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = event_id = ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                event_id = value
            elif field == "data" and name not in ("ping", "engine"):
                found.append((name, event_id, json.loads(value)))
                if len(found) == number:
                    break
    return found


# ---------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("[::1]:80", 200),
        ("tidewright.example", 200),
        ("attacker.example", 421),
        ("127.0.0.1.attacker.example:80", 421),
        ("", 421),
    ],
)
def test_only_known_host_names_are_answered(
    client: httpx.Client, changing: dict[str, str], host: str, status: int
) -> None:
    for path in ("/", "/app.js", "/api/session", "/api/state"):
        assert client.get(path, headers={"host": host}).status_code == status
    told = client.post("/api/resume", json={}, headers=changing | {"host": host})
    assert told.status_code == status


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"x-tidewright-token": ""}, 403),
        ({"x-tidewright-token": "guessed"}, 403),
        ({"origin": "http://attacker.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_another_web_page_changes_nothing(
    watched: Watched,
    client: httpx.Client,
    changing: dict[str, str],
    wrong: dict[str, str],
    status: int,
) -> None:
    body = b'{"mode": "MODE_OFF"}'
    for path in WRITES:
        told = client.post(path, content=body, headers=changing | wrong)
        assert told.status_code == status
        assert told.json()["error"]["message"]
    assert watched.loop.mode is Mode.ACTIVE
    right = changing | {"origin": watched.base, "sec-fetch-site": "same-origin"}
    assert client.post("/api/mode", content=body, headers=right).status_code == 200
    assert watched.loop.mode is Mode.OFF
    client.post("/api/mode", json={"mode": "MODE_ACTIVE"}, headers=changing)


def test_every_answer_has_the_strict_headers(client: httpx.Client) -> None:
    for path in ("/", "/style.css", "/api/state", "/nothing", "/api/explain?seq=999"):
        answer = client.get(path)
        assert {n: answer.headers[n] for n in HEADERS} == HEADERS
    assert client.get("/", headers={"host": "attacker.example"}).headers["x-frame-options"]
    assert "unsafe" not in HEADERS["content-security-policy"]
    assert "access-control-allow-origin" not in client.get("/api/state").headers


def test_roles_decide_what_is_answered_and_changes_are_audited(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    access, audit = tmp_path / "access", tmp_path / "audit.jsonl"
    tokens = {name: issue_token(access, name, name).strip() for name in ("read", "operate")}
    gate = Gate(AccessFile(access), audit=AuditLog(audit))
    found = Watched(synthetic_cluster, gate=gate)
    try:
        with httpx.Client(base_url=found.base, timeout=20, trust_env=False) as client:
            page = {"x-tidewright-token": client.get("/api/session").json()["page_token"]}
            for name, read, write in (("", 401, 401), ("read", 200, 403), ("operate", 200, 200)):
                bearer = {"authorization": f"Bearer {tokens[name]}"} if name else {}
                assert client.get("/api/state", headers=bearer).status_code == read
                told = client.post("/api/resume", json={}, headers=bearer | page)
                assert told.status_code == write
                may = client.get("/api/session", headers=bearer).json()["may"]
                assert may == {"read": read == 200, "operate": write == 200, "admin": False}
                told = client.post("/api/load", json={"name": "keep"}, headers=bearer | page)
                assert told.status_code == (403 if name else 401)
            refused = client.get("/api/events")
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            for path in READS:
                assert client.get(path).status_code == 401
            wrong = {"authorization": "Bearer unknown"}
            assert client.get("/api/state", headers=wrong).status_code == 401
    finally:
        found.close()
        gate.audit.close()
    text = audit.read_text()
    assert text.count("ControlService/Resume") == 3
    assert not any(token in text for token in tokens.values())


def test_a_stream_ends_with_the_right_to_it(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    token = issue_token(access, "alice", "read").strip()
    found = Watched(synthetic_cluster, gate=Gate(AccessFile(access)))
    try:
        headers = {"authorization": f"Bearer {token}"}
        url = f"{found.base}/api/events"
        with httpx.stream("GET", url, headers=headers, timeout=20, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            access.write_text("")
            found.step()
            for _ in lines:  # to its end
                pass
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 401
    finally:
        found.close()


def test_host_headers_are_split() -> None:
    given = {"a.example:80": "a.example", "[::1]:80": "::1", "[::1]": "::1", "h": "h", "": ""}
    assert {host: name_of(host) for host in given} == given


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/api/mode", b"{", 400, "is no JSON"),
        ("/api/mode", b"[1]", 400, "send a JSON object"),
        ("/api/mode", b"\xff\xfe", 400, "is no JSON"),
        ("/api/mode", b"[" * 50_000, 400, "is no JSON"),
        ("/api/mode", b'{"mode": "MODE_LOUD"}', 400, "expected mode, idempotency_key"),
        ("/api/mode", b'{"mode": "MODE_UNSPECIFIED"}', 400, "MODE_ACTIVE"),
        ("/api/mode", b'{"volume": 11}', 400, "expected mode"),
        ("/api/hold", b'{"duration_s": "long"}', 400, "duration_s"),
        ("/api/hold", b'{"duration_s": 0}', 400, "expected more than 0"),
        ("/api/hold", b'{"duration_s": NaN}', 400, "expected"),
        ("/api/hold", b'{"duration_s": 1e9}', 400, "at most"),
        ("/api/cancel", b"{}", 400, "idempotency_key is empty"),
        ("/api/cancel", b'{"idempotency_key": "a"}', 404, "no switch is in flight"),
        ("/api/rollback", b"{}", 404, "no policy was loaded"),
        ("/api/hold", b'{"reason": "' + b"x" * 70_000 + b'"}', 413, "bytes"),
        ("/api/nothing", b"{}", 404, "there is no POST /api/nothing"),
        ("/api/state", b"{}", 405, "is not allowed; use"),
    ],
)
def test_bad_input_gets_a_clear_error(
    client: httpx.Client,
    changing: dict[str, str],
    path: str,
    body: bytes,
    status: int,
    part: str,
) -> None:
    answer = client.post(path, content=body, headers=changing)
    assert answer.status_code == status, answer.text
    assert part in answer.json()["error"]["message"]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    st.sampled_from(sorted(WRITES)),
    st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["mode", "duration_s", "reason", "ticket_id", "x"]), inner
                )
            ),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_whatever_is_sent_is_answered_as_json(
    client: httpx.Client, changing: dict[str, str], path: str, body: bytes
) -> None:
    answer = client.post(path, content=body, headers=changing)
    assert answer.status_code in (200, 400, 404), (answer.text, body)
    assert isinstance(answer.json(), dict)


def test_queries_are_checked(client: httpx.Client) -> None:
    assert client.get("/api/explain?seq=1").json()["record"]["seq"] == 1
    for query, status in (("seq=one", 400), ("depth=1", 400), ("seq=999", 404)):
        told = client.get(f"/api/explain?{query}")
        assert told.status_code == status
        assert told.json()["error"]["message"]
    missing = client.get("/api/explain?seq=1&candidate_key=9xtp9pp9")
    assert "was no candidate at tick 1" in missing.json()["error"]["message"]
    for path in ("/..%2fapp.py", "/../app.py", "/http_front.py", "/dashboard"):
        assert client.get(path).status_code == 404


def test_a_change_is_done_once_per_key(
    watched: Watched, client: httpx.Client, changing: dict[str, str]
) -> None:
    body = {"duration_s": 60.0, "reason": "first", "idempotency_key": "hold-1"}
    first = client.post("/api/hold", json=body, headers=changing).json()
    watched.operations.resume()
    again = client.post("/api/hold", json=body, headers=changing).json()
    assert again["hold"]["reason"] == first["hold"]["reason"] == "first"
    assert not watched.loop.oversight.holds(watched.loop.clock())
    other = client.post("/api/hold", json=body | {"duration_s": 61.0}, headers=changing)
    assert "was used for another request" in other.json()["error"]["message"]


def test_forecast_and_policies_are_those_of_the_service(
    watched: Watched, client: httpx.Client
) -> None:
    told = client.get("/api/forecast").json()
    at_s, (first, *_) = watched.operations.forecasts()
    assert told["at_s"] == at_s
    means = [t["mean_per_s"] for t in told["horizons"][0]["types"]]
    assert means == pytest.approx(list(first.mean))
    missing = client.get("/api/policies")  # this one has no folder of policies
    assert missing.status_code == 404
    state = client.get("/api/state").json()
    assert state["deployment_key"] == "4xtp1pp1"
    assert all("bindings" not in ticket for ticket in state["switches"])


# ---------------------------------------------------------------- events


def test_events_go_on_where_they_were_left(watched: Watched) -> None:
    (hello, first_id, facts), (state, _, told) = events(watched, 2)
    assert (hello, state) == ("hello", "state")
    assert told["mode"] == f"MODE_{watched.loop.mode.name}"
    assert [t["name"] for t in facts["types"]] == ["short", "long"]
    last = facts["samples"][-1]
    assert last["wall_s"] == START_S + last["at_s"]
    assert facts["deployments"][str(last["deployment"])]["key"] == "4xtp1pp1"
    watched.step()
    watched.step()
    tick, tick_id, missed = events(watched, 1, first_id)[0]
    assert tick == "tick"
    assert [s["seq"] for s in missed["samples"]] == [last["seq"] + 1, last["seq"] + 2]
    assert missed["samples"][-1]["num_ended"] > 0
    again = events(watched, 1, tick_id)[0]
    assert again[0] == "state"  # nothing was missed


@pytest.mark.parametrize("last_id", ["other-life:3", "nonsense", ":", "x:99999999999999999999"])
def test_an_id_of_another_run_begins_anew(watched: Watched, last_id: str) -> None:
    name, event_id, facts = events(watched, 1, last_id)[0]
    assert name == "hello"
    assert event_id == f"{watched.loop.log.life}:{facts['samples'][-1]['seq']}"


def test_too_many_watchers_are_refused_and_make_room_when_they_go(
    watched: Watched, client: httpx.Client
) -> None:
    assert watched.front is not None
    feed = watched.front._front._feed

    async def fill() -> int:
        taken = [feed.events("") for _ in range(MAX_WATCHERS)]
        for one in taken:
            await anext(one)
        answer = await asyncio.to_thread(client.get, "/api/events")
        for one in taken:
            await one.aclose()
        return int(answer.status_code)

    assert watched._run(fill()) == 429
    assert events(watched, 1)[0][0] == "hello"


# ---------------------------------------------------------------- values


def test_what_is_no_number_is_told_as_unknown(watched: Watched) -> None:
    given = {"a": float("nan"), "b": (1, float("inf")), "c": {"d": -0.5}}
    assert plain(given) == {"a": None, "b": [1, None], "c": {"d": -0.5}}
    snapshot = watched.cluster.snapshot()
    first = replace(snapshot.replicas[0], num_running=float("nan"), kv_blocks_total=0)
    view = engine_view(replace(snapshot, replicas=(first,)), 1.0)
    assert view["replicas"][0]["num_running"] is None
    assert view["replicas"][0]["kv_usage"] is None
    json.dumps(view, allow_nan=False)


def test_history_names_deployments_once(synthetic_cluster: ProfiledCluster) -> None:
    found = Watched(synthetic_cluster)
    try:
        for _ in range(3):
            found.step()
        found.operations.propose("2xtp2pp1", dry_run=False)
        for _ in range(2):
            found.step()
        found.cluster.is_gone = True
        found.step()
        told = found.history.since(1)
        keys = [d["key"] for d in told["deployments"].values()]
        assert keys == ["4xtp1pp1", "2xtp2pp1"]
        assert [s["deployment"] for s in told["samples"]] == [0, 0, 0, 1, 1, None]
        assert [s["seq"] for s in found.history.since(5)["samples"]] == [5, 6]
        assert told["samples"][-1]["summary"].startswith("nothing was decided (unavailable)")
    finally:
        found.close()


def test_attainment_counts_what_ended_since(watched: Watched) -> None:
    watch = watched.loop.oversight.watch
    ended = [o.finish_s for o in watch._ended]
    since_s = sorted(ended)[len(ended) // 2]
    assert watch.attainment(since_s)[1] == sum(t > since_s for t in ended)
    good, number = watch.attainment(-1.0)
    assert 0 < good <= number == len(ended)


# ---------------------------------------------------------------- starting


def test_a_taken_port_is_told_and_stops_no_controller(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    loop, operations, sessions = watched.loop, watched.operations, watched.sessions
    starting: Callable[..., Any] = start_http
    with pytest.raises(UnavailableError, match=f"{watched.port} .* --http-port"):
        watched._run(starting(loop, operations, sessions, "127.0.0.1", watched.port))
    config = ControllerConfig(http_port=watched.port)
    steering = Steering(loop, operations, sessions)
    assert watched._run(_dashboard(config, steering, Security())) is None
    assert "there is no dashboard" in caplog.text


def test_every_file_of_the_page_is_packaged_and_served(client: httpx.Client) -> None:
    names = {p.name for p in PAGES.iterdir()}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert data["package-data"]["controller"] == [f"dashboard/*{kind}" for kind in KINDS]
    for name in names:
        assert Path(name).suffix in KINDS
        answer = client.get(f"/{name}")
        assert (answer.status_code, answer.content) == (200, (PAGES / name).read_bytes())
