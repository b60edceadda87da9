"""`python tests/controller/dashboard_pictures.py`: the pictures of docs/dashboard.md."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "controller")]

from browsing import Browser  # noqa: E402
from conftest import build_cluster  # noqa: E402
from PIL import Image  # noqa: E402
from watched import Watched, nodes  # noqa: E402

from controller.decision import DecisionConfig  # noqa: E402
from controller.roster import PolicyInfo  # noqa: E402
from engine.cluster import WorkloadType, WorkloadTyping  # noqa: E402
from policies.baselines import HysteresisPolicy  # noqa: E402

DOCS = ROOT / "docs"
HEIGHT = 2600  # pixels of the page that are kept
EIGHT = tuple(WorkloadType(f"type{i}", 40.0 * 1.6**i, 20.0 * 1.35**i) for i in range(8))


def small() -> Watched:
    """Four devices, two types, some switches, the last of them running."""
    found = Watched(build_cluster(4, 4))
    found.loop.active = PolicyInfo("hysteresis", "rule")
    found.loop.policy_server.policy = HysteresisPolicy(found.pipeline.observation_spec)
    mixes = [(4, 1), (6, 1), (9, 2), (12, 2), (14, 4), (12, 6), (8, 8), (6, 9), (5, 7), (4, 4)]
    for tick in range(70):
        found.step(mixes[(tick // 4) % len(mixes)])
        if tick == 24:
            found.operations.propose("1xtp2pp1+2xtp1pp1", dry_run=False)
        if tick == 44:
            found.operations.propose("2xtp2pp1", dry_run=False)
    found.operations.propose("1xtp2pp1+2xtp1pp1", dry_run=False)
    found.advance(0.33)  # into the transfer
    return found


def large() -> Watched:
    """128 devices in 16 nodes, eight types; a tick takes seconds."""
    typing = WorkloadTyping(EIGHT, (1 / 8,) * 8)
    config = DecisionConfig(grid_s=5.0, min_dwell_s=5.0, max_candidates=8)
    key = "8xtp4pp2+12xtp4pp1+4xtp2pp1+8xtp1pp1"
    cluster = nodes(build_cluster(128, 8), 8)
    found = Watched(cluster, typing=typing, key=key, config=config)
    for tick in range(14):
        found.step(tuple(8 + (tick * (i + 1)) % 9 for i in range(8)))
    return found


def main(names: list[str]) -> None:
    scenes = {"small": small, "large": large}
    browser = Browser()
    try:
        for name in names or list(scenes):
            watched = scenes[name]()
            try:
                take(browser, watched, "" if name == "small" else f"-{name}")
            finally:
                watched.close()
    finally:
        browser.close()


def take(browser: Browser, watched: Watched, suffix: str) -> None:
    sizes = {"light": (1280, False), "dark": (1280, True), "phone": (360, False)}
    for name, (width, dark) in sizes.items():
        if suffix and name != "light":
            continue
        browser.open(watched.base, width, 900, dark)
        browser.wait(lambda: browser.all(".decisions li"))
        browser.wait(lambda: browser.all("#timeline rect.span"))
        if name == "dark":
            browser.js("document.querySelector('#decisions input').click()")
        elif name == "light":
            browser.js("document.querySelector('.decisions button').click()")
            browser.wait(lambda: browser.all(".why table"))
        path = DOCS / f"dashboard{suffix}-{name}.png"
        browser.picture(path, HEIGHT)
        Image.open(path).quantize(256, kmeans=4).save(path, optimize=True)
        print(path.name, path.stat().st_size)
    print(browser.complaints())


if __name__ == "__main__":
    main(sys.argv[1:])
