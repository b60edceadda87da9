"""Switches and policies chosen on the dashboard, in a real Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDS_BROWSER = bool(os.environ.get("TIDEWRIGHT_NEEDS_BROWSER"))
if not NEEDS_BROWSER:
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from browsing import CHROMIUM, DRIVER, Browser  # noqa: E402
from dashboard_page import CONTRAST, WIDER, button_named, is_focused, loaded, tab_to  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from watched import Watched  # noqa: E402

from engine.profile import ProfiledCluster  # noqa: E402

pytestmark = pytest.mark.skipif(
    (CHROMIUM is None or DRIVER is None) and not NEEDS_BROWSER,
    reason="no Chromium: apt-get install chromium chromium-driver",
)


@pytest.fixture
def with_policies(
    synthetic_cluster: ProfiledCluster, browser: Browser, tmp_path: Path
) -> Iterator[Watched]:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    found = Watched(synthetic_cluster, policies=tmp_path)
    try:
        found.step((5, 2))
        yield found
    finally:
        browser.driver.get("about:blank")
        found.close()


def test_a_switch_is_proposed_and_made(browser: Browser, with_policies: Watched) -> None:
    loaded(browser, with_policies)
    button = button_named(browser, "Propose")
    browser.wait(button.is_enabled)
    button.click()
    browser.wait(lambda: is_focused(browser, "#switch-key"))
    offered = {o.get_attribute("value") for o in browser.all("#switch-keys option")}
    assert offered == {c.key for c in with_policies.loop.explained[-1].record.candidates}
    browser.keys("2xtp2pp1", Keys.ENTER)
    browser.wait_text("#news", "A switch to 2xtp2pp1 may be made", "transfers")
    assert with_policies.cluster.snapshot().switch is None
    button.click()
    browser.wait(lambda: is_focused(browser, "#switch-key"))
    browser.keys("9xtp9pp9", Keys.ENTER)
    browser.wait_text("#news", "That was not done")
    button.click()
    browser.wait(lambda: is_focused(browser, "#switch-key"))
    browser.keys("2xtp2pp1", Keys.TAB, Keys.SPACE, Keys.ENTER)
    browser.wait_text("#switch .lead", "switching: 4xtp1pp1 → 2xtp2pp1")
    assert all("status of 400" in text for text in browser.complaints())  # that was not done


def test_policies_are_loaded_and_put_on_trial_by_the_keyboard(
    browser: Browser, with_policies: Watched
) -> None:
    loaded(browser, with_policies)
    browser.wait(lambda: button_named(browser, "Load policy").is_enabled())
    tab_to(browser, "#trust .buttons button", most=60)
    browser.keys(Keys.ENTER)
    browser.wait(lambda: is_focused(browser, "#policy-name"))
    options = {o.get_attribute("value"): o for o in browser.all("#policy-name option")}
    assert list(options) == ["keep", "myopic", "hysteresis", "broken"]
    assert not options["broken"].is_enabled()
    browser.keys("h", Keys.TAB, Keys.TAB, Keys.ENTER)
    browser.wait_text("#news", "hysteresis decides, in place of keep")
    assert with_policies.loop.active.name == "hysteresis"
    assert is_focused(browser, "#trust .buttons button")
    browser.keys(Keys.TAB, Keys.ENTER)
    browser.wait(lambda: is_focused(browser, "#policy-name"))
    browser.keys("m", Keys.TAB, Keys.ENTER)
    browser.wait_text("#trust", "myopic in 20.0 % of blocks")
    canary = with_policies.loop.trials.canary
    assert canary is not None
    browser.keys(Keys.ENTER)
    browser.wait(lambda: is_focused(browser, "#policy-name"))
    browser.keys("n", Keys.TAB, Keys.ENTER)
    browser.wait(lambda: with_policies.loop.trials.canary is None)
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_dialogs_are_readable_and_fit(browser: Browser, with_policies: Watched, dark: bool) -> None:
    loaded(browser, with_policies, width=360, height=740, dark=dark)
    browser.wait(lambda: button_named(browser, "Canary").is_enabled())
    for name, field in (
        ("Propose", "#switch-key"),
        ("Load policy", "#policy-name"),
        ("Canary", "#canary-share"),
    ):
        browser.js("arguments[0].click()", button_named(browser, name))
        browser.wait(lambda css=field: browser.all(css))
        assert browser.js(WIDER) == []
        assert browser.js(CONTRAST)[1] == []
        folder = os.environ.get("TIDEWRIGHT_PICTURES")
        if folder:
            scheme = "dark" if dark else "light"
            browser.driver.save_screenshot(f"{folder}/{field[1:]}-{scheme}.png")
        browser.keys(Keys.ESCAPE)
        browser.wait(lambda: not browser.all("dialog[open]"))
