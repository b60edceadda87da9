"""A report in headless Chromium: complete without a network, on any screen and printed."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from browsing import CHROMIUM, DRIVER, Browser

import evaluate
from envs.offline.course import Course, Switch
from envs.offline.gate import Reason
from envs.offline.paired import Gain
from envs.offline.report import write_report
from envs.offline.report_pages import page_of_policies

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver on this machine"
)
DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo"
NAME = "a policy <with> & 'signs' and a rather long name, as folders of checkpoints have"


def course(name: str) -> Course:
    rng = np.random.default_rng(0)
    at_s = 15.0 * np.arange(240)
    keys = tuple("4xtp4pp1" if i < 120 else "2xtp8pp1" for i in range(240))
    ended_s = np.sort(rng.uniform(0, 3600, 900))
    latency_s = rng.exponential(2.0, 900)
    switch = Switch(1800.0, "4xtp4pp1", "2xtp8pp1", f"{name}: lowest_latency", 2.0, 0.9)
    return Course(
        name, at_s, keys, rng.normal(size=240), np.full(240, 4.0), ended_s, latency_s,
        (latency_s < 4).astype(float), 15.0, (switch,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    line = {
        "j": 0.5, "gain_j": 0.1, "gain_j_interval": [0.05, 0.15], "latency_mean_s": 2.0,
        "slo": 0.9, "switches_per_hour": 1.0,
    }  # fmt: skip
    told = {
        "a": NAME, "b": "hysteresis", "verdict": f"{NAME} is better.", "notes": ["some traffic"],
        "policies": {NAME: line, "hysteresis": line}, "command": f"python evaluate.py '{NAME}'",
        "versions": {"tidewright": "0"}, "git_revision": "",
    }  # fmt: skip
    gain = Gain(0.1, (0.05, 0.15), None, 0)
    reasons = (Reason("margin", True, "J is well above"), Reason("max_slo_drop", False, "no"))
    courses = [course(NAME), course("hysteresis")]
    write_report(path, page_of_policies(courses, gain, told, reasons), told)
    return path


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `evaluate.py replay`, with two policies, two loads and the statics."""
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    given = ["replay", "--policy", "keep", str(DEMO), "--load", "0.3", "0.5", "--statics"]
    given += ["--windows", "2", "--window-s", "150", "--processes", "1", "--no-progress"]
    assert evaluate.main([*given, "--report", str(path)]) == 0
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_replay_stands_alone_and_fits(
    replayed: Path, browser: Browser, width: int, dark: bool
) -> None:
    told = json.loads(replayed.with_suffix(".json").read_text())
    browser.open(replayed.as_uri(), width, 900, dark)
    assert browser.complaints() == []
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.text(".verdict") == told["verdict"]
    assert told["command"] in browser.text("pre")
    headings = [h.text for h in browser.all("h2")]
    assert headings[:3] == ["All windows", "Cell by cell", "Window by window"]
    assert f"worst for {DEMO}" in headings[3]
    tables = [len(t.find_elements("css selector", "tbody tr")) for t in browser.all("table")[:3]]
    assert tables == [2, 4, 4]  # policies; their cells; windows of the one beside the first
    pictures = browser.js("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(pictures) >= 3
    assert all(wide > 500 for wide in pictures)
    shown = browser.js("return [...document.images].map(i => i.getBoundingClientRect().width)")
    assert min(shown) >= 500  # letters stay legible on a phone; the picture is scrolled instead
    lines = [p.text for p in browser.all("section:nth-of-type(4) > p")]
    assert len(lines) > 2  # what was done to the traffic, a line each
    assert lines[0].endswith("over keep's.")
    shades = browser.js(
        "return ['body', '.verdict'].map(s => getComputedStyle(document.querySelector(s)))"
        ".map(c => [c.color, c.backgroundColor])"
    )
    for text, ground in shades:
        assert _contrast(text, ground) > 7.0  # WCAG 2.1, level AAA


def _contrast(*colours: str) -> float:
    """Of two CSS colours rgb(r, g, b), by the WCAG's relative luminance."""
    lights = []
    for colour in colours:
        shares = np.array([int(c) for c in re.findall(r"\d+", colour)[:3]]) / 255.0
        linear = np.where(shares <= 0.03928, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_replay_is_printed_whole(replayed: Path, browser: Browser) -> None:
    browser.open(replayed.as_uri(), 688, 900)  # A4 less its margins, at 96 dots per inch
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    wide = browser.js(
        "return [...document.querySelectorAll('table, img, pre')]"
        ".filter(e => e.getBoundingClientRect().right > 688.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("width", [1280, 390])
def test_it_stands_alone_and_fits(report: Path, browser: Browser, width: int) -> None:
    before = len(browser.requested())  # by the tests that had this browser so far
    browser.open(report.as_uri(), width, 900)
    assert browser.complaints() == []
    since = browser.requested()[before:]
    fetched = [u for u in since if not u.startswith(("data:", "chrome"))]
    assert set(fetched) == {report.as_uri()}
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    sizes = browser.js(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length])"
    )
    assert len(sizes) == 3
    assert all(done and wide > 500 and alt > 10 for done, wide, alt in sizes)
    assert NAME in browser.text("h1")
    headings = [h.text for h in browser.all("h2")]
    assert headings[0] == "Gate: failed"
    assert headings[-1] == "How it was made"


def test_it_is_printed_whole(report: Path, browser: Browser) -> None:
    """Every section is on the paper, and nothing is cut off at its right edge."""
    browser.open(report.as_uri(), 1280, 900)
    asked = {"preferCSSPageSize": True, "printBackground": True}
    printed = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", asked)["data"])
    assert printed.startswith(b"%PDF")
    pages = printed.count(b"/Type /Page\n") or printed.count(b"/Type /Page ")
    assert 1 <= pages <= 6
    streams = printed.split(b"stream\n")[1::2]
    assert any(len(_inflated(stream)) > 1000 for stream in streams)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.size(688, 900)  # A4 less its margins, at 96 dots per inch
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def _inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(stream)
    except zlib.error:
        return b""
