"""Views of a running showcase: a live screen for terminals, plain lines for everything else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from controller.records import TickRecord
from engine.cluster import ClusterSnapshot, SwitchTicket
from envs.showcase import LiveStatus

LINE_INTERVAL_S = 5.0
SHOWN_TICKS = 6
SHOWN_SWITCHES = 6


def switch_text(ticket: SwitchTicket) -> str:
    """One line on a switch that has ended."""
    moved = f"{ticket.num_migrated} migrated, {ticket.num_recomputed} recomputed"
    return (
        f"{ticket.from_key} -> {ticket.to_key}: {ticket.phase} in {ticket.duration_s:.2f} s "
        f"(paused {ticket.pause_s:.2f} s, {moved}, {ticket.num_drained} drained), "
        f"decision {ticket.decision_id or 'by hand'}"
        + (f", {ticket.reason}" if ticket.reason else "")
    )


def tick_text(tick: TickRecord) -> str:
    """One line on a decision."""
    if not tick.decision_id:
        return f"observed; {tick.reason}" if tick.reason else "observed"
    chosen = tick.executed_key
    if tick.chosen_key != tick.executed_key:
        chosen = f"{tick.executed_key} (wanted {tick.chosen_key})"
    return f"{tick.decision_id}: {chosen}, p={tick.propensity:.2f}, {tick.policy}; {tick.reason}"


def rates_text(tick: TickRecord) -> str:
    """Forecast against actual arrivals of one interval, all types together."""
    forecast = sum(r.forecast_p50_per_s for r in tick.rates)
    actual = [r.actual_per_s for r in tick.rates if r.actual_per_s is not None]
    known = f"{sum(actual):.2f}/s" if actual else "not yet known"
    return f"{forecast:.2f}/s forecast, {known} actual"


def replica_table(snapshot: ClusterSnapshot) -> Table:
    table = Table("replica", "shape", "devices", "running", "waiting", "KV blocks", expand=True)
    stats = {s.replica_id: s for s in snapshot.replicas}
    for replica in snapshot.deployment.replicas:
        load = stats.get(replica.replica_id)
        devices = ",".join(map(str, replica.placement.devices))
        cells = ["-", "-", "-"]
        if load is not None:
            used = f"{load.kv_blocks_used}/{load.kv_blocks_total}"
            cells = [str(load.num_running), str(load.num_waiting), used]
        table.add_row(str(replica.replica_id), replica.parallel.key, devices, *cells)
    return table


def screen(status: LiveStatus) -> RenderableType:
    """The whole picture of one moment."""
    parts: list[RenderableType] = [ProgressBar(total=status.num_total, completed=status.num_ended)]
    parts.append(
        f"{status.elapsed_s:5.1f} s   sent {status.num_sent}/{status.num_total}   "
        f"ended {status.num_ended}   tokens {status.tokens}"
    )
    if status.snapshot is not None:
        queued = sum(s.num_waiting for s in status.snapshot.replicas)
        queued += status.snapshot.num_queued_unrouted
        switch = status.snapshot.switch
        state = "none in flight"
        if switch is not None and status.snapshot.switch_in_flight:
            state = f"{switch.to_key}: {switch.phase}"
        parts.append(
            f"deployment {status.snapshot.deployment.key}   queue {queued}   switch {state}"
        )
        parts.append(replica_table(status.snapshot))
    if status.ticks:
        parts.append(f"arrivals: {rates_text(status.ticks[-1])}")
    recent = list(status.ticks)[-SHOWN_TICKS:]
    decisions = "\n".join(tick_text(t) for t in recent) or "none yet"
    parts.append(Panel(decisions, title="decisions", title_align="left"))
    switches = "\n".join(switch_text(t) for t in status.switches[-SHOWN_SWITCHES:]) or "none yet"
    parts.append(Panel(switches, title="switches", title_align="left"))
    return Panel(Group(*parts), title=status.title)


class ScreenView:
    """Redraws a live screen; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, status: LiveStatus) -> None:
        self._live.update(screen(status), refresh=True)


class LineView:
    """Prints a line for every decision that is not keep, every switch, and every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_seq = self._shown_switches = 0
        self._next_line_s = 0.0
        self._title = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def update(self, status: LiveStatus) -> None:
        if status.title != self._title:
            self._title = status.title
            self._console.print(status.title, markup=False, soft_wrap=True)
        for tick in [t for t in status.ticks if t.seq > self._shown_seq]:
            self._shown_seq = tick.seq
            if tick.decision_id and tick.chosen_key != tick.deployment_key:
                self._print(status, f"decision {tick_text(tick)}")
        for ticket in status.switches[self._shown_switches :]:
            self._print(status, f"switch {switch_text(ticket)}")
        self._shown_switches = len(status.switches)
        if time.monotonic() >= self._next_line_s and status.snapshot is not None:
            self._next_line_s = time.monotonic() + LINE_INTERVAL_S
            self._print(status, self._progress(status, status.snapshot))

    def _progress(self, status: LiveStatus, snapshot: ClusterSnapshot) -> str:
        queue = snapshot.num_queued_unrouted + sum(s.num_waiting for s in snapshot.replicas)
        rates = f"; {rates_text(status.ticks[-1])}" if status.ticks else ""
        return (
            f"{snapshot.deployment.key}, sent {status.num_sent}/{status.num_total}, ended "
            f"{status.num_ended}, queue {queue}{rates}"
        )

    def _print(self, status: LiveStatus, text: str) -> None:
        self._console.print(f"[{status.elapsed_s:6.1f} s] {text}", markup=False, soft_wrap=True)


def build_view(console: Console) -> ScreenView | LineView:
    view: ScreenView | LineView
    view = ScreenView(console) if console.is_terminal else LineView(console)
    return view
