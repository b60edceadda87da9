"""How the operator's commands look on a terminal: messages of the control API as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from controller.json_messages import Told


def table(*columns: str, rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Columns whose names start with '#' are numbers."""
    found = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        found.add_column(name.lstrip("#"), justify="right" if name.startswith("#") else "left")
    for row in rows:
        found.add_row(*map(str, row))
    return found


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and values, without those that are empty."""
    found = Table.grid(padding=(0, 2))
    for name, value in pairs:
        if value not in ("", None, []):
            found.add_row(Text(name, "bold"), str(value))
    return found


def word(enum: str) -> str:
    """MODE_ACTIVE -> active"""
    return enum.rpartition("_")[2].lower()


def render_state(told: Told) -> RenderableType:
    canary, last = told.get("canary"), told.get("last_tick", {})
    holds = [f"{h['rule']} for {h['remaining_s']:.0f} s: {h['reason']}" for h in told["holds"]]
    about = facts(
        [
            ("mode", word(told["mode"])),
            ("policy", f"{told['policy']} {told['policy_digest']}".strip()),
            ("decided by", told["actor"]),
            ("breaker", f"{told['breaker']} {told['breaker_reason']}".strip()),
            ("holds", "; ".join(holds) or "none"),
            (
                "canary",
                canary and f"{canary['name']} at {canary['fraction']:g}, now {canary['arm']}",
            ),
            ("shadows", ", ".join(told["shadows"])),
            ("retraining", "; ".join(told["retraining"]) or "not advised"),
            ("engine", "answers" if told["engine_available"] else "does not answer"),
            ("deployment", f"{told['deployment_key']} (epoch {told['epoch']})"),
            ("last decision", last.get("reason", "")),
            ("notes", "; ".join(last.get("notes", []))),
        ]
    )
    rates = table(
        *("type", "#forecast/s", "#high/s", "#actual/s"),
        rows=[
            (
                r["type"],
                f"{r['forecast_p50_per_s']:.2f}",
                f"{r['forecast_p90_per_s']:.2f}",
                f"{r['actual_per_s']:.2f}" if "actual_per_s" in r else "",
            )
            for r in last.get("rates", [])
        ],
    )
    counted = {k.removeprefix("num_"): v for k, v in told["counters"].items() if v}
    counts = Text(", ".join(f"{name} {number}" for name, number in counted.items()), "dim")
    return Group(about, rates, counts)


def render_change(told: Told) -> RenderableType:
    """Of `watch --states`."""
    return render_state(told["state"])


def render_decision(told: Told) -> RenderableType:
    """One line."""
    record = told["record"]
    what = record["executed_key"] or record["deployment_key"]
    arrow = "=" if what == record["deployment_key"] else "->"
    line = Text(f"{record['seq']:>6} {record['at_s']:>9.1f} s  {word(record['status']):<11} ")
    line.append(f"{arrow} {what or '-'}", "bold green" if arrow == "->" else "")
    line.append(f"  {record['reason']}")
    for note in [*record["notes"], *(f"vetoed: {v}" for v in record["vetoes"])]:
        line.append(f"  [{note}]", "yellow")
    return line


def render_explanation(told: Told) -> RenderableType:
    rows = []
    for found in told["candidates"]:
        view = found["candidate"]
        mark = "executed" if found["is_executed"] else "chosen" if found["is_chosen"] else ""
        asked = f"{view['probability']:.2f}" if "probability" in view else "–"
        numbers = (f"{view[name]:.2f}" for name in ("headroom", "predicted_switch_s"))
        rows.append((mark, view["key"], asked, *numbers, found["why"]))
    shown = table(*("", "candidate", "#prob.", "#headroom", "#switch s", "why"), rows=rows)
    parts: list[RenderableType] = [Text(told["summary"]), shown]
    if len(told["candidates"]) == 1:
        named = sorted(told["candidates"][0]["features"].items())
        parts.append(table("feature", "#value", rows=[(k, f"{v:.4g}") for k, v in named]))
    return Group(*parts)


def render_forecast(told: Told) -> RenderableType:
    rows = [
        (
            f"{h['ahead'] * told['grid_s']:g}",
            t["type"],
            *(f"{t[k]:.2f}" for k in ("mean_per_s", "p50_per_s", "p90_per_s", "relative_error")),
            "yes" if h["is_drifting"] else "",
        )
        for h in told["horizons"]
        for t in h["types"]
    ]
    columns = ("#within s", "type", "#mean/s", "#p50/s", "#p90/s", "#rel. error", "drifting")
    return table(*columns, rows=rows, title=f"by {told['predictor']}")


def render_plan(told: Told) -> RenderableType:
    rows = [
        (
            d["key"],
            f"{d['headroom']:.2f}",
            f"{d['latency_s']:.2f}",
            d["num_devices"],
            f"{d['switch_s']:.2f}",
            f"{d['weight_bytes'] / 1e6:.1f}",
            d["origin"].replace("+", ", "),
        )
        for d in told["deployments"]
    ]
    columns = (
        "deployment",
        "#headroom",
        "#latency s",
        "#devices",
        "#switch s",
        "#MB",
        "proposed as",
    )
    return table(*columns, rows=rows)


def render_policies(told: Told) -> RenderableType:
    if "policies" not in told:  # the answer to a change: which now, which before
        named = ((role, view["name"]) for role, view in told.items())
        return facts(named) if told else "no canary"
    rows = [
        ("*" if p["is_active"] else "", p["name"], p["kind"], p["digest"], p["problem"])
        for p in told["policies"]
    ]
    return table("", "policy", "kind", "digest", "problem", rows=rows)


def render_switch(told: Told) -> RenderableType:
    ticket = told.get("ticket")
    return facts(
        [
            ("target", told.get("target_key")),
            ("applied", "yes" if told.get("applied") else "no"),
            ("vetoes", ", ".join(told["vetoes"])),
            ("predicted", f"{told['predicted_s']:.2f} s" if "predicted_s" in told else ""),
            ("weights", f"{told['weight_bytes'] / 1e6:.1f} MB" if "weight_bytes" in told else ""),
            ("ticket", ticket and f"{ticket['ticket_id']} {word(ticket['phase'])}"),
        ]
    )


def render_hold(told: Told) -> RenderableType:
    return f"no switch for {told['hold']['remaining_s']:.0f} s: {told['hold']['reason']}"


def render_resume(told: Told) -> RenderableType:
    ended = [f"{h['rule']} ({h['reason']})" for h in told["ended"]]
    return f"ended: {', '.join(ended)}" if ended else "nothing was held"


def render_mode(told: Told) -> RenderableType:
    return f"{word(told['mode'])}, before {word(told['previous'])}"


def render_ticket(told: Told) -> RenderableType:
    ticket = told["ticket"]
    return f"{ticket['ticket_id']} to {ticket['to_key']}: {word(ticket['phase'])}"


RENDER: dict[str, Callable[[Told], RenderableType]] = {
    "state": render_state,
    "watch": render_decision,
    "explain": render_explanation,
    "forecast": render_forecast,
    "plan": render_plan,
    "policies": render_policies,
    "switch": render_switch,
    "hold": render_hold,
    "resume": render_resume,
    "mode": render_mode,
    "cancel": render_ticket,
}
