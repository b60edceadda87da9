"""`python -m controller`: steer an engine over gRPC, or ask a controller that does."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from controller import cli
from controller.access import issue_token
from controller.config import ControllerConfig
from engine.config import add_arguments, parse_config
from engine.errors import TidewrightError


def build_parser() -> argparse.ArgumentParser:
    """Of `run`, which may be left out; it also tells of the other commands."""
    told = "\n".join(f"  {name:<10} {text}" for name, text in cli.COMMANDS.items())
    parser = argparse.ArgumentParser(
        "python -m controller",
        usage="%(prog)s [run] [options]\n"
        "       %(prog)s COMMAND [--control HOST:PORT] [--json] [--token-file FILE]\n"
        "                [--tls-ca FILE [--tls-cert FILE --tls-key FILE]]\n"
        "       %(prog)s token NAME ROLE --access FILE",
        description="Steer an engine; or ask or tell a running controller, with a command.",
        epilog=f"commands (each has --help):\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, ControllerConfig)
    return parser


def run(argv: list[str]) -> None:
    """Raises TidewrightErrors."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    config = parse_config(build_parser(), ControllerConfig, argv)
    import uvloop

    from controller.app import serve

    uvloop.run(serve(config))


def add_token(argv: list[str]) -> None:
    """Prints the token, which is kept nowhere. Raises InvalidRequestError."""
    text = "A new bearer token: its hash goes into the access file, the token to standard output."
    parser = argparse.ArgumentParser("python -m controller token", description=text)
    parser.add_argument("name", help="whose it is, as the audit log calls them")
    parser.add_argument("role", help="read, operate or admin")
    parser.add_argument("--access", type=Path, required=True, metavar="FILE", help="made if none")
    given = parser.parse_args(argv)
    print(issue_token(given.access, given.name, given.role))


def main(argv: list[str]) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at import; its errors reach us as such
    try:
        if argv and argv[0] in cli.COMMANDS:
            return cli.main(argv)
        if argv and argv[0] == "token":
            add_token(argv[1:])
            return 0
        run(argv[1:] if argv and argv[0] == "run" else argv)
    except TidewrightError as error:
        build_parser().exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
