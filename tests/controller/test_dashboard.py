"""The dashboard in a real Chromium, over a real control loop on the surrogate."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDS_BROWSER = bool(os.environ.get("TIDEWRIGHT_NEEDS_BROWSER"))
if not NEEDS_BROWSER:
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from browsing import CHROMIUM, DRIVER, Browser  # noqa: E402
from dashboard_page import CONTRAST, WIDER, button_named, is_focused, loaded, tab_to  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from watched import CONFIG, Watched, nodes  # noqa: E402

from controller.access import AccessFile, issue_token  # noqa: E402
from controller.gate import Gate  # noqa: E402
from controller.records import Mode  # noqa: E402
from engine.cluster import WorkloadType, WorkloadTyping  # noqa: E402
from engine.profile import ProfiledCluster  # noqa: E402

HAS_BROWSER = CHROMIUM is not None and DRIVER is not None
pytestmark = pytest.mark.skipif(
    not HAS_BROWSER and not NEEDS_BROWSER,
    reason="no Chromium: apt-get install chromium chromium-driver",
)


@pytest.fixture
def watched(synthetic_cluster: ProfiledCluster, browser: Browser) -> Iterator[Watched]:
    found = Watched(synthetic_cluster)
    try:
        yield found
    finally:
        browser.driver.get("about:blank")
        found.close()


# ---------------------------------------------------------------- what is shown


def test_every_panel_shows_the_controller(browser: Browser, watched: Watched) -> None:
    for _ in range(6):
        watched.step((5, 2))
    loaded(browser, watched)
    assert browser.text("#model") == "toy"
    assert "4xtp1pp1" in browser.text("#now")
    assert "epoch 0" in browser.text("#now")
    assert len(browser.all("#devices .block")) == 4
    rows = browser.all("#devices tbody tr")
    assert [r.text.split()[:3] for r in rows] == [[f"#{i}", "tp1", "pp1"] for i in range(4)]
    assert len(browser.all("#timeline rect.span")) == 4
    last = watched.history.since(6)["samples"][0]
    attained = f"{100 * last['num_good'] / last['num_ended']:.0f}"
    assert browser.text("#now .tiles > div:nth-child(3) strong").startswith(attained)
    waiting = f"{last['num_waiting']} waiting"
    assert browser.text("#now .tiles > div:nth-child(2) strong") == waiting
    assert len(browser.all("#traffic .plot")) == 2
    _, median, high, actual = last["rates"][0]
    ahead = browser.find("#traffic svg").get_attribute("aria-valuetext")
    assert ahead is not None
    assert f"forecast {median:.2f}" in ahead  # for the tick to come
    browser.js("document.querySelector('#traffic details').open = true")
    rows = browser.wait(lambda: browser.all("#traffic tbody tr"))
    assert rows[0].text.split()[1:] == ["–", f"{median:.2f}", f"{high:.2f}"]
    assert rows[1].text.split()[1] == f"{actual:.2f}"
    assert len(browser.all(".decisions li")) == 6
    browser.find(".decisions button").click()
    why = browser.wait_text(".why", "executed")
    for candidate in watched.loop.explained[-1].record.candidates:
        assert candidate.key in why
    assert "keep" in browser.text("#trust")
    watched.step((5, 2))  # without loading the page again
    browser.wait(lambda: len(browser.all(".decisions li")) == 7)
    assert browser.find("li:nth-child(2) .why").is_displayed()  # what was opened stays open
    assert browser.complaints() == []
    asked = [u for u in browser.requested() if u.startswith("http")]
    assert {u for u in asked if not u.startswith("http://127.0.0.1:")} == set()
    assert f"{watched.base}/api/events" in asked


def test_a_controller_without_a_tick_or_traffic(browser: Browser, watched: Watched) -> None:
    loaded(browser, watched)
    assert "No tick yet." in browser.text("#decisions")
    assert browser.text("#switch .lead") == "No switch so far."
    browser.wait(lambda: len(browser.all("#devices .block")) == 4)  # seen between ticks
    watched.step((0, 0))
    browser.wait(lambda: len(browser.all(".decisions li")) == 1)
    assert "no request ended" in browser.text("#now")
    assert browser.complaints() == []


def long_names() -> WorkloadTyping:
    named = [f"requests-of-a-tenant-with-a-very-long-name-indeed-{i}" for i in range(8)]
    types = (WorkloadType(n, 40 * 1.6**i, 20 * 1.3**i) for i, n in enumerate(named))
    return WorkloadTyping(tuple(types), (1 / 8,) * 8)


@pytest.fixture(scope="module")
def crowded(make_cluster: Callable[[int, int], ProfiledCluster]) -> Iterator[Watched]:
    """128 devices in nodes of 8, eight types, long names."""
    cluster = nodes(make_cluster(128, 2), 8)
    key = "32xtp2pp1+16xtp1pp2+32xtp1pp1"
    found = Watched(cluster, typing=long_names(), key=key, config=CONFIG)
    try:
        found.operations.set_mode(Mode.OFF)
        found.step((6,) * 8, tick=False)
        found.loop.tick()
        found.operations.hold(600, "a-reason-that-nobody-broke-into-words-" * 5)
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_readable_and_never_scrolls_sideways(
    browser: Browser, crowded: Watched, dark: bool
) -> None:
    loaded(browser, crowded, width=360, height=740, dark=dark)
    browser.wait(lambda: len(browser.all("#traffic .plot path.line")) == 16)
    assert len(browser.all("#devices .node")) == 16
    browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
    browser.find(".decisions button").click()
    browser.wait_text(".why", "why not")
    for width in (360, 820, 1280):
        browser.size(width, 740)
        assert browser.js(WIDER) == []
        wide = "return document.documentElement.scrollWidth"
        assert browser.js(wide) <= width
    number, bad = browser.js(CONTRAST)
    assert number > 200
    assert bad == []
    scheme = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (scheme == "rgb(14, 18, 23)") is dark
    assert browser.complaints() == []
    browser.driver.get("about:blank")


# ---------------------------------------------------------------- what is done


def test_buttons_change_the_controller(browser: Browser, watched: Watched) -> None:
    watched.step()
    loaded(browser, watched)
    browser.wait(lambda: browser.find("[data-mode=advisory]").is_enabled())
    browser.find("[data-mode=advisory]").click()
    browser.wait_text("#news", "The mode is advisory")
    assert watched.loop.mode is Mode.ADVISORY
    pressed = "[data-mode=advisory][aria-pressed=true]"
    browser.wait(lambda: browser.all(pressed))
    resume, hold, rollback = (
        browser.js(
            "return [...document.querySelectorAll('header button')]"
            ".find((b) => b.textContent.startsWith(arguments[0]))",
            name,
        )
        for name in ("Resume", "Hold", "Roll back")
    )
    assert not resume.is_enabled()
    hold.click()
    browser.find("#hold-reason").send_keys("night shift")
    browser.find("dialog .primary").click()
    browser.wait_text("#banners", "No switch until", "night shift")
    (held,) = watched.loop.oversight.holds(watched.loop.clock())
    assert held.reason == "night shift"
    assert 3590 < held.until_s - watched.loop.clock() <= 3600
    browser.wait(resume.is_enabled)
    resume.click()
    browser.wait(lambda: not browser.text("#banners"))
    assert not watched.loop.oversight.holds(watched.loop.clock())
    rollback.click()
    browser.find("dialog .primary").click()
    browser.wait_text("#news", "That was not done", "no policy was loaded")


def test_everything_is_reached_by_the_keyboard(browser: Browser, watched: Watched) -> None:
    watched.step((5, 2))
    watched.step((5, 2))
    loaded(browser, watched)
    browser.wait(lambda: browser.find("[data-mode=off]").is_enabled())
    browser.keys(Keys.TAB)
    assert is_focused(browser, ".skip")
    tab_to(browser, "[data-mode=off]")
    outline = "return getComputedStyle(document.activeElement).outline"
    assert "solid 3px" in browser.js(outline)
    browser.keys(Keys.ENTER)
    browser.wait(lambda: watched.loop.mode is Mode.OFF)
    browser.wait(lambda: browser.all("[data-mode=off][aria-pressed=true]"))
    assert is_focused(browser, "[data-mode=off]")
    browser.keys(Keys.TAB, Keys.ENTER)  # Hold
    browser.wait(lambda: is_focused(browser, "#hold-length"))
    browser.keys(Keys.ESCAPE)
    browser.wait(lambda: not browser.all("dialog[open]"))
    assert not watched.loop.oversight.holds(watched.loop.clock())
    browser.keys(Keys.ENTER)
    browser.wait(lambda: is_focused(browser, "#hold-length"))
    browser.keys(Keys.TAB, "by keyboard", Keys.ENTER)
    browser.wait_text("#banners", "by keyboard")
    tab_to(browser, "#devices summary")
    browser.keys(Keys.ENTER)
    tab_to(browser, "#ranges input")
    browser.keys(Keys.ARROW_LEFT)
    assert browser.js("return document.activeElement.value") == "900"
    tab_to(browser, "#traffic svg")
    said = "return document.activeElement.getAttribute('aria-valuetext')"
    browser.keys(Keys.HOME)
    first = browser.js(said)
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.js(said) != first
    tab_to(browser, ".decisions button")
    browser.keys(Keys.ENTER)
    browser.wait_text(".why", "candidate")
    assert is_focused(browser, ".decisions button")
    names = browser.js(
        "return [...document.querySelectorAll('button, input, select, svg[tabindex], .scroll')]"
        ".filter((e) => e.checkVisibility() && !e.textContent.trim() && !e.labels?.length"
        " && !e.getAttribute('aria-label')).map((e) => e.outerHTML)"
    )
    assert names == []


def test_the_phases_of_a_switch_appear_as_they_pass(browser: Browser, watched: Watched) -> None:
    watched.step()
    loaded(browser, watched)
    watched.operations.propose("1xtp2pp1+2xtp1pp1", dry_run=False)

    def current(phase: str) -> Any:
        return browser.wait_text("#switch [aria-current=step]", phase)

    current("prepare")
    watched.advance(0.32)
    current("transfer")
    assert "switching: 4xtp1pp1 → 1xtp2pp1+2xtp1pp1" in browser.text("#switch")
    browser.wait_text("#news", "transfer")
    watched.step()
    browser.wait_text("#switch .lead", "done")
    browser.wait_text("#now", "1xtp2pp1+2xtp1pp1", "epoch 1")
    assert len(browser.all("#devices .block")) == 3
    browser.wait(lambda: len(browser.all("#timeline rect.span")) == 7)
    watched.step()  # the dwell time passes
    assert watched.operations.propose("4xtp1pp1", dry_run=False).ticket
    current("prepare")
    browser.find("#switch > .danger").click()
    browser.find("dialog .primary").click()
    browser.wait_text("#switch .lead", "cancelled")
    assert watched.cluster.snapshot().deployment.key == "1xtp2pp1+2xtp1pp1"
    assert browser.complaints() == []


def test_without_the_role_nothing_can_be_changed(
    browser: Browser, synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    looker = issue_token(access, "looker", "read").strip()
    operator = issue_token(access, "operator", "operate").strip()
    found = Watched(synthetic_cluster, gate=Gate(AccessFile(access)))
    try:
        found.step()
        browser.driver.get(found.base)
        browser.js(f"sessionStorage.setItem('tidewright-token', '{looker}')")
        loaded(browser, found)
        browser.wait_text("#controls", "You may look")
        assert not [b for b in browser.all("[data-mode]") if b.is_enabled()]
        assert not button_named(browser, "Propose").is_enabled()
        browser.js("[...document.querySelectorAll('header button')].at(-1).click()")
        browser.wait_text("body", "Signed out.")
        browser.js(
            "[...document.querySelectorAll('header button')].at(-1).click();"
            f"document.getElementById('token').value = '{operator}'"
        )
        browser.find("dialog .primary").click()
        browser.wait(lambda: browser.find("[data-mode=off]").is_enabled())
        browser.find("[data-mode=off]").click()
        browser.wait(lambda: found.loop.mode is Mode.OFF)
        assert button_named(browser, "Propose").is_enabled()
        assert not button_named(browser, "Load policy").is_enabled()  # which is for admins
        kept = browser.js("return [document.cookie, localStorage.length]")
        assert kept == ["", 0]
        browser.js("sessionStorage.clear()")
        browser.driver.get("about:blank")
    finally:
        found.close()


# ---------------------------------------------------------------- when it goes wrong


def test_a_lost_controller_is_shown_as_lost_and_found_again(
    browser: Browser, watched: Watched
) -> None:
    watched.step()
    loaded(browser, watched)
    browser.wait(lambda: browser.find("[data-mode=off]").is_enabled())
    watched.stop_front()
    browser.wait_text("#banners", "Not connected since", "may no longer hold")
    assert browser.text("#link") == "not connected"
    browser.wait_text("#now", "unknown")  # when the next decision is due
    assert all("old: as of" in e.text for e in browser.all("section h2"))
    assert not [b for b in browser.all("header button") if b.is_enabled() and b.is_displayed()]
    watched.step()
    watched.step()
    watched.start_front()
    browser.wait_text("#link", "live")
    browser.wait(lambda: len(browser.all(".decisions li")) == 3)
    browser.requested()
    assert f"{watched.loop.log.life}:1" in browser.ids  # only what was missed is sent again
    assert not browser.text("#banners")
    assert not [e for e in browser.all(".old") if e.is_displayed()]
    browser.wait(lambda: browser.find("[data-mode=off]").is_enabled())
    browser.find("[data-mode=off]").click()  # with the page token of the front before
    browser.wait(lambda: watched.loop.mode is Mode.OFF)
    browser.complaints()


def test_a_controller_that_says_nothing_any_more_is_lost_too(
    browser: Browser, watched: Watched
) -> None:
    watched.step()
    loaded(browser, watched)
    release = threading.Event()
    watched._events.call_soon_threadsafe(release.wait, 30)  # connected, and frozen
    try:
        browser.wait_text("#banners", "Not connected since")
    finally:
        release.set()
    browser.wait_text("#link", "live")
    browser.complaints()


def test_an_engine_that_is_gone_and_a_loop_that_is_stuck_are_told(
    browser: Browser, watched: Watched
) -> None:
    watched.step()
    loaded(browser, watched)
    watched.cluster.is_gone = True
    watched.step()
    browser.wait_text("#banners", "The engine has not answered since", "made to be gone")
    assert "no answer" in browser.text(".decisions li")
    watched.cluster.is_gone = False
    watched.step()
    browser.wait(lambda: not browser.text("#banners"))
    watched.late_s = 60.0
    browser.wait_text("#banners", "No tick since", "stuck")
    assert browser.all("body.is-old")
