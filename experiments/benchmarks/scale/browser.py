"""Opens a page in Chromium without a window, and says how long that takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

TIMES = 5
WHEN = """
const done = arguments[0], painted = performance.getEntriesByName("first-contentful-paint");
requestAnimationFrame(() => setTimeout(() => {
  const loaded = performance.getEntriesByType("navigation")[0].loadEventEnd;
  done([loaded, painted[0].startTime, performance.now()]);
}));
"""
"""Milliseconds since the navigation began: the end of the load event, the first paint with content, and the first frame
after the load."""


def opening(page: Path) -> dict[str, Any]:
    """The bytes of a page, and seconds until it is loaded and drawn, medians of `TIMES`; no seconds where there is no
    browser."""
    found: dict[str, Any] = {"report_bytes": page.stat().st_size}
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        return found
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        seen = []
        for _ in range(TIMES):
            browser.get("about:blank")
            browser.get(page.as_uri())
            seen.append(browser.execute_async_script(WHEN))
    finally:
        browser.quit()
    for name, values in zip(("load", "first_paint", "drawn"), zip(*seen, strict=True), strict=True):
        found[f"{name}_seconds"] = round(median(values) / 1000, 2)
        found[f"{name}_seconds_of_each"] = [round(value / 1000, 2) for value in values]
    return found
