"""The switches of an engine: at most one in flight, a ticket for each, something to watch it by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

from engine.cluster import EventKind, SwitchMode, SwitchPhase, SwitchPlan, SwitchTicket
from engine.counters import SwitchCounters
from engine.errors import NotFoundError, StaleEpochError, SwitchInProgressError
from engine.events import EventLog
from engine.migration.check import check_plan
from engine.migration.host import SwitchHost
from engine.migration.in_place import InPlaceSwitch
from engine.migration.switch import Switch

WATCH_POLL_S = 1.0
MAX_TICKETS = 1000


class SwitchingEngine(SwitchHost, Protocol):
    """What the switchboard needs of the engine beyond what a switch does."""

    @property
    def epoch(self) -> int: ...
    def raise_fence(self) -> int:
        """What earlier switches have still to say to workers is stale from now on."""
        ...

    async def wait_for_change(self, timeout_s: float) -> None: ...


class Switchboard:
    """Owns the running switch and its task. `on_idle` is called whenever a switch has ended."""

    def __init__(self, host: SwitchingEngine, log: EventLog, on_idle: Callable[[], None]) -> None:
        self._host, self._log, self._on_idle = host, log, on_idle
        self._tickets: dict[str, SwitchTicket] = {}  # of the latest MAX_TICKETS switches
        self._num_started = 0
        self.counters = SwitchCounters()
        self.current: Switch | InPlaceSwitch | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def latest(self) -> SwitchTicket | None:
        return next(reversed(self._tickets.values()), None)

    def check(self, plan: SwitchPlan) -> None:
        """Raises SwitchInProgressError, StaleEpochError, or what `check_plan` raises."""
        if self.current is not None:
            raise SwitchInProgressError(
                f"switch {self.current.ticket.ticket_id} is in phase "
                f"{self.current.ticket.phase}; wait for it or cancel it."
            )
        host = self._host
        if plan.expected_epoch != host.epoch:
            raise StaleEpochError(
                f"the plan was made for epoch {plan.expected_epoch}, the current one is "
                f"{host.epoch}; plan again from a new snapshot."
            )
        check_plan(host.spec, host.deployment, plan, host.dead_devices)

    def start(self, plan: SwitchPlan) -> SwitchTicket:
        """Raises what `check` raises."""
        self.check(plan)
        host = self._host
        host.raise_fence()
        now_s = host.now_s()
        ticket = SwitchTicket(
            ticket_id=f"switch-{self._num_started:04d}",
            phase=SwitchPhase.PREPARE,
            from_key=host.deployment.key,
            to_key=plan.target.key,
            from_epoch=host.epoch,
            started_s=now_s,
            updated_s=now_s,
            decision_id=plan.decision_id,
            mode=plan.mode,
            planned_bytes=plan.weight_bytes,
            lower_bound_bytes=plan.lower_bound_bytes,
            predicted_s=plan.predicted_s,
            lower_bound_s=plan.lower_bound_s,
        )
        self._num_started += 1
        self._tickets[ticket.ticket_id] = ticket
        if len(self._tickets) > MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        kind = InPlaceSwitch if plan.mode is SwitchMode.IN_PLACE else Switch
        self.current = kind(host, plan, ticket)
        self._task = asyncio.create_task(self._run(self.current), name=ticket.ticket_id)
        return ticket

    async def _run(self, switch: Switch | InPlaceSwitch) -> None:
        try:
            await switch.run()
        finally:
            self.current = None
            if switch.ticket.phase.is_terminal:
                self.counters.observe(switch.ticket)
            self._on_idle()

    async def until_idle(self) -> None:
        """Return when no switch runs."""
        while self.current is not None and self._task is not None:
            await asyncio.wait([self._task])

    def ticket(self, ticket_id: str) -> SwitchTicket:
        if ticket_id not in self._tickets:
            raise NotFoundError(f"there is no switch {ticket_id!r} among the latest {MAX_TICKETS}.")
        return self._tickets[ticket_id]

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """Ask for a rollback before commit."""
        ticket = self.ticket(ticket_id)
        if self.current is not None and self.current.ticket.ticket_id == ticket_id:
            self.current.cancel()
        return ticket

    def publish(self, ticket: SwitchTicket) -> None:
        self._tickets[ticket.ticket_id] = ticket
        self._log.append(self._host.now_s(), EventKind.SWITCH, ticket=ticket)

    async def watch(self, ticket_id: str) -> AsyncIterator[SwitchTicket]:
        """Every state of a ticket that can be seen, up to the terminal one."""
        seen: SwitchTicket | None = None
        while True:
            ticket = self.ticket(ticket_id)
            if ticket != seen:
                yield (seen := replace(ticket))
            if ticket.phase.is_terminal:
                return
            await self._host.wait_for_change(WATCH_POLL_S)

    async def close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
