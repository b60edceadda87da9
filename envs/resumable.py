"""How commands end that go on where they were stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.errors import TidewrightError

STOPPED = "stopped; run it again to go on"


def exit_status(make: Callable[[], int], stopped: str = STOPPED) -> int:
    """What `make` returns; 130 and a word when it is interrupted, 2 and a sentence on a
    TidewrightError."""
    try:
        return make()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
