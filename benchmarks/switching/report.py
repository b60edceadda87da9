"""What a run of `benchmarks/switch.py` came to: tables for people, one object for machines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from switching.load import percentile

Row = dict[str, Any]


def summarise(rows: Sequence[Row], lost: int) -> dict[str, Any]:
    """The last line: figures over all transitions; None for what no transition measured."""
    pauses = [p for row in rows for p in row["pauses_s"]]
    steps = [p / row["step_s"] for row in rows for p in row["pauses_s"]]
    unaffected = [g for row in rows for g in row["gaps_unaffected_s"]]
    steady = [g for row in rows for g in row["gaps_unaffected_steady_s"]]
    makespans = [row["makespan_over_bound"] for row in rows if row["makespan_over_bound"]]
    ratio = percentile(unaffected, 99) / percentile(steady, 99) if unaffected and steady else None
    return {
        "benchmark": "switch",
        "bytes_over_bound_max": _rounded(max(row["bytes_over_bound"] for row in rows), 4),
        "makespan_over_bound_p50": _median(makespans),
        "gap_affected_p99_s": _rounded(percentile(pauses, 99)) if pauses else None,
        "gap_affected_p50_s": _rounded(percentile(pauses, 50)) if pauses else None,
        "gap_affected_p99_steps": _rounded(percentile(steps, 99)) if steps else None,
        "gap_affected_p50_steps": _rounded(percentile(steps, 50)) if steps else None,
        "gap_unaffected_p99_ratio": _rounded(ratio),
        "speedup_vs_reload_dropped_p50": _median(_speedups(rows, "reload_dropped", "seconds")),
        "speedup_vs_reload_warm_p50": _median(_speedups(rows, "reload_warm", "seconds")),
        "speedup_vs_restart_p50": _median(_speedups(rows, "restart", "last_token_s")),
        "longest_gap_ratio_reload_dropped_p50": _median(_gap_ratios(rows, "reload_dropped")),
        "longest_gap_ratio_reload_warm_p50": _median(_gap_ratios(rows, "reload_warm")),
        "longest_gap_ratio_restart_p50": _median(_gap_ratios(rows, "restart")),
        "lost_requests": lost,
        "throughput_lost_frac_p50": _median([row["throughput_lost_frac"] for row in rows]),
        "plan_ms_p50": _median([row["plan_ms"] for row in rows]),
        "transitions": len(rows),
        "transitions_reloaded": sum("reload_warm" in row for row in rows),
        "transitions_restarted": sum("restart" in row for row in rows),
    }


def _speedups(rows: Sequence[Row], other: str, key: str) -> list[float]:
    return [row[other][key] / row["seconds"] for row in rows if other in row]


def _gap_ratios(rows: Sequence[Row], other: str) -> list[float]:
    """How many times as long as in the live switch the last affected request waits for a token. A
    restart keeps all of them waiting from the command on."""
    compared = [row for row in rows if other in row and row["pauses_s"]]
    return [_longest_gap_s(row[other]) / max(row["pauses_s"]) for row in compared]


def _longest_gap_s(other: Row) -> float:
    return float(max(other["pauses_s"]) if "pauses_s" in other else other["last_token_s"])


def _median(values: Sequence[float]) -> float | None:
    return _rounded(median(values)) if values else None


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


# ------------------------------------------------------------------------------------


def print_tables(rows: Sequence[Row], num_ended: int) -> None:
    """One line per transition in each of three tables."""
    console = Console(width=150)
    console.print(_work_table(rows))
    console.print(_client_table(rows))
    console.print(_other_ways_table(rows))
    console.print(f"{num_ended} requests ended while all this went on.")


def _work_table(rows: Sequence[Row]) -> Table:
    phases = ("prepare", "transfer", "verify", "commit", "release")
    table = Table("transition", "plan ms", *phases, "MB", "/least", "makespan s", "/bound", "KV MB")
    for row in rows:
        table.add_row(
            _name(row),
            f"{row['plan_ms']:.1f}",
            *(_text(row["phase_s"].get(phase), 2) for phase in phases),
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['bytes_over_bound']:.3f}",
            _text(row["makespan_s"], 2),
            _text(row["makespan_over_bound"], 2),
            f"{row['kv_bytes'] / 1e6:.0f}",
        )
    return table


def _client_table(rows: Sequence[Row]) -> Table:
    table = Table(
        "gaps in ms: p50 / p99 / max",
        "step",
        "affected",
        "same, steady",
        "unaffected",
        "same, steady",
        "throughput lost",
    )
    for row in rows:
        table.add_row(
            f"{_name(row)} ({row['affected']})",
            f"{1e3 * row['step_s']:.0f}",
            _gaps(row["gap_affected_s"]),
            _gaps(row["gap_affected_steady_s"]),
            _gaps(row["gap_unaffected_s"]),
            _gaps(row["gap_unaffected_steady_s"]),
            f"{row['throughput_lost_frac']:.0%}",
        )
    return table


def _other_ways_table(rows: Sequence[Row]) -> Table:
    table = Table("seconds to the next token", "live", "reload, warm", "reload, dropped", "restart")
    for row in rows:
        cells = [row.get("reload_warm", {}).get("seconds")]
        cells.append(row.get("reload_dropped", {}).get("seconds"))
        cells.append(row.get("restart", {}).get("last_token_s"))
        table.add_row(_name(row), f"{row['seconds']:.2f}", *(_text(c, 1) for c in cells))
    return table


def _name(row: Row) -> str:
    return f"{_short(row['from'])} -> {_short(row['to'])}"


def _short(key: str) -> str:
    """A deployment's key without degrees of one."""
    terms = []
    for term in key.split("+"):
        count, _, parallel = term.partition("x")
        tp, _, pp = parallel.removeprefix("tp").partition("pp")
        degrees = (f"tp{tp}" if tp != "1" else "") + (f"pp{pp}" if pp != "1" else "")
        terms.append((f"{count}x" if count != "1" else "") + (degrees or "tp1"))
    return "+".join(terms)


def _gaps(seconds: dict[str, float | None]) -> str:
    return " / ".join("-" if v is None else f"{1e3 * v:.0f}" for v in seconds.values())


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
