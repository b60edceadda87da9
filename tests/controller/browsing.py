"""Headless Chromium for tests of the dashboard: what it shows, fetches and complains of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
WAIT_S = 10.0
T = TypeVar("T")


class Browser:
    """One Chromium with a profile of its own; close it."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        assert DRIVER is not None
        self._profile = tempfile.mkdtemp(prefix="tidewright-chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        arguments = [
            *("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--disable-background-networking", "--no-first-run", "--force-device-scale-factor=1"),
            *("--disable-extensions", f"--user-data-dir={self._profile}", "--no-proxy-server"),
        ]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
            arguments.append("--no-sandbox")
        for argument in arguments:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.urls: list[str] = []
        self.ids: list[str] = []  # of the last event, that came with each of them

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.size(width, height)
        self.dark(dark)
        self.driver.get(url)

    def size(self, width: int, height: int) -> None:
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def wait(self, condition: Callable[[], T], what: str = "") -> T:
        """Until it is true; returns what it gave."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline_s, what or self.text("body")[-1500:]
            time.sleep(0.03)

    def wait_text(self, css: str, *parts: str) -> str:
        def found() -> str:
            text = self.text(css)
            return text if all(p in text for p in parts) else ""

        return self.wait(found, f"{parts} not in {css}: {self.text(css)!r}")

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def complaints(self) -> list[str]:
        """What the console says, since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Every address that was fetched so far."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                request = message["params"]["request"]
                self.urls.append(request["url"])
                self.ids.append(request["headers"].get("last-event-id", ""))
        return self.urls

    def picture(self, path: Path, height: int | None = None) -> None:
        """Of the whole page, or of its upper part."""
        width = self.js("return document.documentElement.clientWidth")
        full = self.js("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height or full, full), "scale": 1}
        asked = {"clip": clip, "captureBeyondViewport": True}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)
