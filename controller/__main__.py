"""`python -m controller`: steer an engine over gRPC."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

from controller.config import ControllerConfig
from engine.config import add_arguments, parse_config
from engine.errors import TidewrightError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m controller", description="Steer an engine.")
    add_arguments(parser, ControllerConfig)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at import; its errors reach us as such
    try:
        config = parse_config(parser, ControllerConfig, argv)
        from controller.app import serve

        asyncio.run(serve(config))
    except TidewrightError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
