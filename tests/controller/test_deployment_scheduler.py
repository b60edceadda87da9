from __future__ import annotations

from dataclasses import replace

from controller.scheduler import DeploymentScheduler, SchedulerConfig
from engine.cluster import Decision, KvCostParams, SwitchPhase, SwitchPlan, SwitchTicket
from engine.cluster import Deployment as Empty

PLAN = SwitchPlan(Empty(()), 0, (), KvCostParams(1.0, 1.0, 1.0), 0, 0, 0.0, 0.0)
SWITCH = Decision("d1", 0.0, 1, "a", "a", 1.0, "p", "", plan=PLAN)


def _ticket(name: str, started_s: float, ended_s: float | None) -> SwitchTicket:
    phase = SwitchPhase.TRANSFER if ended_s is None else SwitchPhase.DONE
    return SwitchTicket(name, phase, "a", "b", 0, started_s, ended_s or started_s)


def _scheduler(**changes: float) -> DeploymentScheduler:
    return DeploymentScheduler(replace(SchedulerConfig(60.0, 36.0, 2.0), **changes))


def test_one_in_flight_then_dwell_then_free() -> None:
    scheduler = _scheduler()
    assert scheduler.admit(SWITCH, 0.0) == ""
    scheduler.record_switch(0.0)
    assert scheduler.admit(SWITCH, 1.0) == "switch_in_flight"
    scheduler.observe(_ticket("t1", 0.5, None))
    assert scheduler.reason(5.0) == "switch_in_flight"
    scheduler.observe(_ticket("t1", 0.5, 8.0))
    assert scheduler.reason(67.9) == "dwell"
    assert scheduler.since_switch_s(68.0) == 60.0
    assert scheduler.reason(68.0) == ""


def test_keep_is_always_admitted() -> None:
    scheduler = _scheduler()
    scheduler.record_switch(0.0)
    assert scheduler.admit(replace(SWITCH, plan=None), 0.0) == ""


def test_budget_refills_by_the_hour() -> None:
    scheduler = _scheduler(min_dwell_s=0.0)
    for i in range(2):
        scheduler.observe(_ticket(f"t{i}", float(i), i + 0.5))
    assert scheduler.reason(2.0) == "switch_budget"
    assert scheduler.reason(99.9) == "switch_budget"  # 36 per hour: one in 100 s
    assert scheduler.reason(101.0) == ""


def test_a_switch_is_counted_once_whoever_reports_it() -> None:
    scheduler = _scheduler(min_dwell_s=0.0)
    scheduler.record_switch(1.0)
    for _ in range(3):
        scheduler.observe(_ticket("t1", 1.0, 2.0))
    assert scheduler.reason(2.0) == ""  # one of two spent


def test_switches_before_the_reset_cost_no_budget_but_dwell() -> None:
    scheduler = _scheduler(burst=1.0)
    scheduler.reset(100.0)
    scheduler.observe(_ticket("old", 80.0, 90.0))
    assert scheduler.reason(120.0) == "dwell"
    assert scheduler.reason(150.0) == ""


def test_a_switch_that_never_got_a_ticket_does_not_block_for_ever() -> None:
    scheduler = _scheduler()
    scheduler.record_switch(0.0)
    scheduler.observe(None)
    assert scheduler.reason(1.0) == ""
