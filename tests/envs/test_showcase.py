"""The showcase's arithmetic: windows, scaling, the last line; and its line view."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from controller.records import Mode, TickRecord, TickStatus, TypeRate
from engine.cluster import RequestStatus, SwitchPhase, SwitchTicket
from engine.errors import CheckpointError, InvalidRequestError
from envs.replay import ReplayRecord, summarise
from envs.showcase import LiveStatus, RunReport, cut_window, measured_pool, read_trained_pool
from envs.showcase_report import Showcase, summary_table
from envs.terminal import LineView, screen
from envs.workload import Trace

KEYS = (
    "requests_sent requests_finished requests_lost requests_rejected tokens ttft_p99_s tpot_p99_s "
    "switches policy_switches switch_s longest_gap_s latency_vs_keep"
)


def make_trace() -> Trace:
    arrival_s = np.array([0.0, 10.0, 12.0, 19.0, 20.0])
    return Trace(arrival_s, np.array([100, 2, 4000, 50, 9]), np.array([10, 3, 900, 5, 9]))


def ticket(phase: SwitchPhase, decision_id: str) -> SwitchTicket:
    return SwitchTicket("s", phase, "4xtp1pp1", "2xtp2pp1", 0, 10.0, 10.5, decision_id)


ROOT = Path(__file__).parents[2]


def test_the_pool_of_the_shipped_policy(tmp_path: Path) -> None:
    """What `python demo.py` starts with: the pool of the profile that the policy was trained on."""
    shipped = ROOT / "policies" / "artifacts" / "demo"
    profile = ROOT / "configs" / "profiles" / "tiny_llama_cpu4.json"
    expected = measured_pool(profile, "4xtp1pp1")
    assert read_trained_pool(shipped) == read_trained_pool(shipped / "seed0") == expected
    with pytest.raises(CheckpointError, match="no policy checkpoint at"):
        read_trained_pool(tmp_path)


def run_report(latency_s: float, *switches: SwitchTicket) -> RunReport:
    record = ReplayRecord(0, RequestStatus.FINISHED, 0.0, 4, 10, latency_s, 0.1, 0.01, 0.02)
    return RunReport(summarise([record] * 3, 9.0), switches, frozenset({"d-1", "d-2"}), ())


def test_window_is_half_open_starts_at_zero_and_fits() -> None:
    window = cut_window(make_trace(), 10.0, 5.0, speed=2.0, factor=0.1, max_tokens=128)
    assert window.arrival_s.tolist() == [0.0, 1.0, 4.5]
    assert window.prompt_tokens.tolist() == [1, 104, 5]  # 400 + 90 shrunk to 128 in proportion
    assert window.output_tokens.tolist() == [1, 24, 1]
    with pytest.raises(InvalidRequestError, match="ends at 20 s"):
        cut_window(make_trace(), 30.0, 5.0, speed=1.0, factor=0.1, max_tokens=128)


def test_last_line_has_exactly_its_keys() -> None:
    switches = (
        ticket(SwitchPhase.DONE, "d-1"),
        ticket(SwitchPhase.ROLLED_BACK, "d-2"),
        ticket(SwitchPhase.DONE, ""),
    )
    showcase = Showcase(run_report(0.6, *switches), run_report(0.8))
    line = json.loads(json.dumps(showcase.to_json()))
    assert " ".join(line) == KEYS
    assert (line["switches"], line["policy_switches"], line["switch_s"]) == (2, 1, 1.0)
    assert (line["requests_sent"], line["requests_lost"], line["tokens"]) == (3, 0, 30)
    assert line["latency_vs_keep"] == pytest.approx(0.75)
    assert Showcase(run_report(0.6), None).to_json()["latency_vs_keep"] is None
    assert summary_table(showcase).row_count == 15


def test_lines_name_decisions_and_switches_once() -> None:
    rates = (TypeRate("short", 1.0, 2.0, 0.5), TypeRate("long", 0.25, 1.0, None))
    tick = TickRecord(
        1, 3.0, TickStatus.DECIDED, Mode.ACTIVE, "d-1", (), 1, "2xtp2pp1", "2xtp2pp1", 0.9, "ppo",
        "policy", (), None, rates, 0, "4xtp1pp1",
    )  # fmt: skip
    status = LiveStatus("title", 10)
    status.ticks.append(tick)
    status.switches.append(ticket(SwitchPhase.DONE, "d-1"))
    console = Console(file=io.StringIO(), width=200)
    view = LineView(console)
    for _ in range(2):
        view.update(status)
    console.print(screen(status))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines, picture = text.split("╭", 1)
    assert lines.count("decision d-1: 2xtp2pp1, p=0.90, ppo") == 1
    assert lines.count("switch 4xtp1pp1 -> 2xtp2pp1: done in 0.50 s") == 1
    assert "1.25/s forecast, 0.50/s actual" in picture
