"""`python -m engine`: serve one model. Imports happen in `main`: workers re-import this module."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    import argparse
    import asyncio

    from engine.config import EngineConfig, add_arguments, parse_config
    from engine.errors import TidewrightError
    from engine.logs import configure_logging

    parser = argparse.ArgumentParser("python -m engine", description="Serve one model.")
    add_arguments(parser, EngineConfig)
    try:
        config = parse_config(parser, EngineConfig, argv)
        configure_logging(config.log_format, config.log_level)
        from engine.app import serve

        asyncio.run(serve(config))
    except TidewrightError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
