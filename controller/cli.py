"""`python -m controller state|watch|explain|...`: what an operator asks and tells, over the control
API. Tables for people, `--json` for machines: the messages of control.proto, field by field."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from controller.records import Mode
from engine.errors import InvalidRequestError

if TYPE_CHECKING:  # gRPC reads its settings when it is imported; `__main__` makes them first
    from rich.console import Console

    from controller.json_messages import Told
    from controller.remote_control import RemoteControl

DEFAULT_TARGET = "127.0.0.1:50052"
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
ACCESS = {
    "--tls-ca": "the authority of the controller's certificate: speak TLS",
    "--tls-cert": "a client certificate, where the controller asks for one",
    "--tls-key": "its key",
    "--token-file": "a bearer token, where the controller has an access file",
}
COMMANDS = {
    "state": "what the controller does and why, what is deployed, what is expected to arrive",
    "watch": "every decision as it is made; --states: every change of the state",
    "explain": "why a decision was made, and why not another candidate",
    "forecast": "what is expected to arrive, at every horizon",
    "plan": "what the planner would propose for a mix such as 'type0=2.5 type1=1'",
    "policies": "rules and checkpoints; --load, --rollback, --canary NAME FRACTION, --end-canary",
    "hold": "no switch for so long, such as 30m or 2h",
    "resume": "end all holds",
    "mode": "active, advisory or off",
    "switch": "what a switch by hand would take; --apply: do it",
    "cancel": "roll back the switch in flight",
}


# ---------------------------------------------------------------- what is asked


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m controller", description="Ask a controller.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--control", default=DEFAULT_TARGET, metavar="HOST:PORT", help="the controller's gRPC"
    )
    shared.add_argument("--json", action="store_true", help="JSON instead of tables")
    shared.add_argument("--timeout-s", type=float, default=10.0, help="seconds to wait for it")
    for flag, text in ACCESS.items():
        shared.add_argument(flag, type=Path, metavar="FILE", help=text)
    made = {
        name: commands.add_parser(name, help=text, description=text, parents=[shared])
        for name, text in COMMANDS.items()
    }
    _add_arguments(made)
    return parser


def _add_arguments(made: dict[str, argparse.ArgumentParser]) -> None:
    made["watch"].add_argument("--from-seq", type=int, default=0, help="first tick; 0: to come")
    made["watch"].add_argument("--states", action="store_true", help="states, not decisions")
    made["watch"].add_argument("--count", type=int, help="end after so many")
    made["explain"].add_argument(
        "decision", nargs="?", default="", help="seq or id; none: the last"
    )
    made["explain"].add_argument("--candidate", default="", metavar="KEY", help="only this one")
    made["plan"].add_argument("demand", nargs="*", metavar="TYPE=PER_S", help="none: the forecast")
    made["hold"].add_argument("duration", type=duration_s, help="such as 90, 30m, 2h or 1d")
    made["hold"].add_argument("--reason", default="", help="for whoever asks later")
    made["mode"].add_argument("mode", choices=[mode.value for mode in Mode])
    made["switch"].add_argument("target", help="a deployment such as 1xtp2pp1+2xtp1pp1")
    made["switch"].add_argument("--apply", action="store_true", help="do it, if nothing is against")
    made["cancel"].add_argument("ticket", nargs="?", default="", help="none: the one in flight")
    what = made["policies"].add_mutually_exclusive_group()
    what.add_argument("--load", metavar="NAME", help="decide by it from the next tick on")
    what.add_argument("--rollback", action="store_true", help="back to the policy before")
    what.add_argument("--canary", nargs=2, metavar=("NAME", "FRACTION"), help="put it on trial")
    what.add_argument("--end-canary", action="store_true", help="end the trial")


def duration_s(text: str) -> float:
    """'90', '30m', '2h' or '1d' in seconds. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; expected such as 90, 30m or 2h")
    return float(match[1]) * UNITS[match[2]]


def demand_of(pairs: Sequence[str]) -> dict[str, float]:
    """Requests per second by type. Raises InvalidRequestError."""
    demand = {}
    for pair in pairs:
        name, _, rate = pair.partition("=")
        try:
            demand[name] = float(rate)
        except ValueError:
            raise InvalidRequestError(
                f"demand {pair!r} is not understood; expected TYPE=PER_S, such as type0=2.5."
            ) from None
    return demand


def ask(control: RemoteControl, given: argparse.Namespace) -> Iterator[Told]:
    """What the command makes the controller say; one message but for `watch`."""
    match given.command:
        case "state":
            yield control.state()
        case "watch":
            following = control.watch_decisions(given.from_seq)
            yield from islice(control.watch_state() if given.states else following, given.count)
        case "explain":
            seq = int(given.decision) if given.decision.isdecimal() else 0
            yield control.explain(seq, "" if seq else given.decision, given.candidate)
        case "forecast":
            yield control.forecast()
        case "plan":
            yield control.plan(demand_of(given.demand))
        case "policies":
            yield _ask_policies(control, given)
        case "hold":
            yield control.hold(given.duration, given.reason)
        case "resume":
            yield control.resume()
        case "mode":
            yield control.set_mode(Mode(given.mode))
        case "switch" if given.apply:
            yield control.apply(given.target, control.state()["epoch"])
        case "switch":
            yield control.propose(given.target)
        case "cancel":
            yield control.cancel(given.ticket)


def _ask_policies(control: RemoteControl, given: argparse.Namespace) -> Told:
    if given.load:
        return control.load_policy(given.load)
    if given.rollback:
        return control.rollback()
    if given.canary:
        name, fraction = given.canary
        try:
            return control.set_canary(name, float(fraction))
        except ValueError:
            raise InvalidRequestError(
                f"the canary's fraction is {fraction!r}; expected a number such as 0.2."
            ) from None
    return control.set_canary("", 0.0) if given.end_canary else control.policies()


def main(argv: list[str], out: Console | None = None) -> int:
    """Raises TidewrightErrors."""
    from rich.console import Console

    from controller.cli_tables import RENDER, render_change
    from controller.control_channel import ClientAccess
    from controller.remote_control import RemoteControl

    given = build_parser().parse_args(argv)
    console, render = out or Console(), RENDER[given.command]
    if given.command == "watch" and given.states:
        render = render_change
    access = ClientAccess(given.tls_ca, given.tls_cert, given.tls_key, given.token_file)
    with RemoteControl(given.control, given.timeout_s, access=access) as control:
        try:
            for told in ask(control, given):
                if given.json:
                    sys.stdout.write(json.dumps(told) + "\n")
                    sys.stdout.flush()
                else:
                    console.print(render(told))
        except KeyboardInterrupt:
            return 0
    return 0
