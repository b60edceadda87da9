"""What a showcase came to: a table for people and one JSON object for machines."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.cluster import SwitchPhase, SwitchTicket
from envs.showcase import RunReport
from envs.terminal import switch_text


@dataclass(frozen=True, slots=True)
class Showcase:
    """The same window served twice: steered by the policy, and kept as it started."""

    steered: RunReport
    kept: RunReport | None

    @property
    def switches(self) -> tuple[SwitchTicket, ...]:
        """Completed ones."""
        return tuple(t for t in self.steered.switches if t.phase is SwitchPhase.DONE)

    @property
    def policy_switches(self) -> tuple[SwitchTicket, ...]:
        """Completed ones that a decision in the controller's own record made."""
        return tuple(t for t in self.switches if t.decision_id in self.steered.decision_ids)

    @property
    def latency_vs_keep(self) -> float | None:
        """Mean request latency, steered over kept: below 1 the policy was faster."""
        if self.kept is None or not self.kept.summary.latency_mean_s:
            return None
        return self.steered.summary.latency_mean_s / self.kept.summary.latency_mean_s

    def to_json(self) -> dict[str, Any]:
        """`switch_s` is the seconds of all completed switches together."""
        summary, ratio = self.steered.summary, self.latency_vs_keep
        return {
            "requests_sent": summary.requests_sent,
            "requests_finished": summary.requests_finished,
            "requests_lost": summary.requests_lost,
            "requests_rejected": summary.requests_rejected,
            "tokens": summary.tokens,
            "ttft_p99_s": round(summary.ttft.p99_s, 4),
            "tpot_p99_s": round(summary.tpot.p99_s, 4),
            "switches": len(self.switches),
            "policy_switches": len(self.policy_switches),
            "switch_s": round(sum(t.duration_s for t in self.switches), 3),
            "longest_gap_s": round(summary.longest_gap_s, 4),
            "latency_vs_keep": None if ratio is None else round(ratio, 3),
        }


def summary_table(showcase: Showcase) -> Table:
    """Both runs side by side."""
    runs = [showcase.steered, *([showcase.kept] if showcase.kept is not None else [])]
    table = Table("", "policy", *(["keep"] if showcase.kept is not None else []))
    for name, cells in _rows(runs):
        table.add_row(name, *cells)
    return table


def _rows(runs: list[RunReport]) -> list[tuple[str, list[str]]]:
    s = [run.summary for run in runs]
    per_quantile = [
        (f"{what} {q}", [f"{1000 * getattr(getattr(x, field), f'{q}_s'):.1f} ms" for x in s])
        for what, field in (("TTFT", "ttft"), ("TPOT", "tpot"))
        for q in ("p50", "p95", "p99")
    ]
    return [
        ("requests sent", [str(x.requests_sent) for x in s]),
        ("finished", [str(x.requests_finished) for x in s]),
        ("lost", [str(x.requests_lost) for x in s]),
        ("rejected", [str(x.requests_rejected) for x in s]),
        ("tokens", [str(x.tokens) for x in s]),
        *per_quantile,
        ("mean latency", [f"{x.latency_mean_s:.3f} s" for x in s]),
        ("longest gap between tokens", [f"{1000 * x.longest_gap_s:.0f} ms" for x in s]),
        ("switches", [str(len(run.switches)) for run in runs]),
        ("duration", [f"{x.duration_s:.1f} s" for x in s]),
    ]


def print_report(showcase: Showcase, console: Console) -> None:
    """The table, every switch with the decision that made it, some answers of a chat, and why
    requests went unanswered."""
    console.print(summary_table(showcase))
    for ticket in showcase.steered.switches:
        console.print(switch_text(ticket), markup=False, soft_wrap=True)
    for question, answer in showcase.steered.answers:
        console.print(f"\n> {shorten(question, 100)}\n{answer}", markup=False, soft_wrap=True)
    for reason in showcase.steered.reasons:
        console.print(f"not answered: {reason}", markup=False, soft_wrap=True)
