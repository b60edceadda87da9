"""The operator's commands, over a controller that the test steps."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console
from served import Served

from controller.cli import COMMANDS, build_parser, demand_of, duration_s, main
from controller.cli_tables import RENDER
from engine.errors import InvalidRequestError, NotFoundError, TidewrightError
from engine.profile import ProfiledCluster

Run = Callable[..., str]


@pytest.fixture
def served(synthetic_cluster: ProfiledCluster) -> Iterator[Served]:
    found = Served(synthetic_cluster)
    found.step()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def run(served: Served, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command, as a person sees it, or as a machine does."""

    def found(*arguments: str) -> str:
        page = io.StringIO()
        console = Console(file=page, width=160)
        given = [*arguments, "--control", f"127.0.0.1:{served.port}", "--timeout-s", "20"]
        assert main(given, console) == 0
        return capsys.readouterr().out if "--json" in arguments else page.getvalue()

    return found


def test_the_state_says_what_is_and_why(served: Served, run: Run) -> None:
    text = run("state")
    for shown in ("active", "keep", "closed", "4xtp1pp1 (epoch 0)", "forecast/s", "long"):
        assert shown in text
    served.cluster.is_gone = True
    served.step()
    assert "does not answer" in run("state")
    assert json.loads(run("state", "--json"))["engine_available"] is False


def test_numbers_are_numbers_in_json(run: Run) -> None:
    state = json.loads(run("state", "--json"))
    assert (state["epoch"], state["counters"]["num_ticks"]) == (0, 1)
    assert state["deployment"]["replicas"][1]["replica_id"] == 1
    plan = json.loads(run("plan", "--json"))
    assert all(isinstance(d["weight_bytes"], int) for d in plan["deployments"])


def test_decisions_are_watched_line_by_line(served: Served, run: Run) -> None:
    served.step()
    lines = run("watch", "--from-seq", "1", "--count", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert "= 4xtp1pp1" in lines[0]
    told = run("watch", "--from-seq", "1", "--count", "2", "--json").splitlines()
    assert [json.loads(line)["record"]["seq"] for line in told] == [1, 2]
    states = run("watch", "--states", "--count", "1", "--json")
    assert json.loads(states)["state"]["next_seq"] == 3


def test_a_decision_is_explained(run: Run) -> None:
    text = run("explain")
    assert text.startswith("keep decided to keep 4xtp1pp1 (probability 1.00)")
    assert "legal, with probability 0.000" in text
    decision = json.loads(run("explain", "1", "--json"))["record"]["decision_id"]
    by_id = json.loads(run("explain", decision, "--candidate", "4xtp1pp1", "--json"))
    assert len(by_id["candidates"]) == 1
    assert "log_latency" in run("explain", "--candidate", "4xtp1pp1")


def test_without_a_decision_there_is_no_probability(served: Served, run: Run) -> None:
    run("mode", "off")
    served.step()
    text = run("explain")
    assert text.startswith("nothing was decided (observed): the mode is off")
    rows = [line.split() for line in text.splitlines() if "nothing was decided, so" in line]
    assert rows
    assert all(row[1] == "–" for row in rows)


def test_hold_resume_and_mode(served: Served, run: Run) -> None:
    assert run("hold", "30m", "--reason", "maintenance") == "no switch for 1800 s: maintenance\n"
    held = json.loads(run("state", "--json"))["holds"]
    assert 1790 < held[0]["remaining_s"] <= 1800
    assert "hold for 1" in run("state")
    assert run("resume") == "ended: hold (maintenance)\n"
    assert run("resume") == "nothing was held\n"
    assert json.loads(run("state", "--json"))["holds"] == []
    assert run("mode", "advisory") == "advisory, before active\n"
    assert served.loop.mode == "advisory"


def test_what_if(run: Run) -> None:
    assert "by ewma" in run("forecast")
    rows = run("plan", "long=2.5", "short=1")
    assert "4xtp1pp1" in rows
    assert "optimum" in rows
    with pytest.raises(InvalidRequestError, match="no type 'middling'"):
        run("plan", "middling=1")


def test_a_switch_is_shown_then_applied_then_cancelled(served: Served, run: Run) -> None:
    shown = run("switch", "2xtp2pp1")
    assert "MB" in shown
    assert served.loop.counters.num_switches_started == 0
    assert "prepare" in run("switch", "2xtp2pp1", "--apply")
    assert served.loop.counters.num_switches_started == 1
    assert "switch_in_flight" in run("switch", "1xtp4pp1")
    assert run("cancel").endswith("to 2xtp2pp1: cancelled\n")


def test_policies_are_listed_loaded_and_taken_back(served: Served, run: Run) -> None:
    assert "hysteresis" in run("policies")
    assert "hysteresis" in run("policies", "--load", "hysteresis")
    assert served.loop.policy_server.policy.name == "hysteresis"
    assert "keep" in run("policies", "--rollback")
    assert json.loads(run("policies", "--canary", "myopic", "0.2", "--json"))["canary"]["name"] == (
        "myopic"
    )
    assert "myopic at 0.2" in run("state")
    run("policies", "--end-canary")
    assert served.loop.trials.canary is None
    with pytest.raises(NotFoundError):
        run("policies", "--load", "nobody")
    with pytest.raises(InvalidRequestError, match="expected a number"):
        run("policies", "--canary", "myopic", "much")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("1.5h", 5400.0), ("30m", 1800.0), ("1d", 86400.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5m", "5 m", "1w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected such as 90, 30m or 2h"):
        duration_s(text)


@pytest.mark.parametrize("pair", ["type0", "type0=", "type0=x", "=", "2.5"])
def test_what_is_no_demand(pair: str) -> None:
    with pytest.raises(TidewrightError, match="expected TYPE=PER_S"):
        demand_of([pair])


def test_every_command_has_help_and_something_to_show() -> None:
    assert set(RENDER) == set(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([name, "--help"])
        assert ended.value.code == 0
