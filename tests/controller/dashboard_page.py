"""What tests of the dashboard do with its page, and what they measure on it."""

from __future__ import annotations

from typing import Any

from browsing import Browser
from selenium.webdriver.common.keys import Keys
from watched import Watched

CONTRAST = """
const parse = (text) => {
  const found = text.match(/[\\d.]+/g).map(Number);
  return found.length < 4 ? [...found, 1] : found;
};
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ratio = (a, b) => {
  const [hi, lo] = [light(a), light(b)].sort((x, y) => y - x);
  return (hi + 0.05) / (lo + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour[3] === 1) return colour;
  }
  return [255, 255, 255, 1];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const bad = [];
let number = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest(".hidden, noscript, .skip")) continue;
  const style = getComputedStyle(element);
  const svg = element.namespaceURI.endsWith("svg");
  const ink = parse(svg ? style.fill : style.color);
  const under = element.classList.contains("span-text")
    ? parse(getComputedStyle(element.previousElementSibling).fill) : behind(element);
  number += 1;
  const found = ratio(ink, under);
  if (found < 4.5) bad.push([text.slice(0, 30), Math.round(found * 100) / 100]);
}
const root = getComputedStyle(document.documentElement);
const card = behind(document.querySelector("#traffic"));
for (const name of ["--accent", "--two", "--edge", "--rule", "--good", "--bad"]) {
  const probe = document.createElement("i");
  probe.style.color = root.getPropertyValue(name);
  document.body.append(probe);
  const found = ratio(parse(getComputedStyle(probe).color), card);
  probe.remove();
  if (found < 3) bad.push([name, found]);
}
return [number, bad];
"""
WIDER = """
const edge = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll > *, .hidden, .skip, svg"))
  .filter((e) => e.getBoundingClientRect().right > edge + 0.5)
  .map((e) => `${e.tagName}.${e.className} ${e.textContent.slice(0, 20)}`);
"""


def loaded(browser: Browser, watched: Watched, **options: Any) -> None:
    browser.complaints()
    browser.open(watched.base, **options)
    browser.wait_text("#link", "live")
    browser.wait(lambda: browser.find("#now strong").text != "–")


def is_focused(browser: Browser, css: str) -> bool:
    return bool(browser.js("return document.activeElement.matches(arguments[0])", css))


def tab_to(browser: Browser, css: str, most: int = 40) -> None:
    for _ in range(most):
        browser.keys(Keys.TAB)
        if is_focused(browser, css):
            return
    raise AssertionError(f"{css} is not reached by Tab")


def button_named(browser: Browser, name: str) -> Any:
    script = (
        "return [...document.querySelectorAll('button')]"
        ".find((b) => b.textContent.startsWith(arguments[0]))"
    )
    return browser.js(script, name)
