"""The report in a real browser: no network, no errors, one column on a phone, every link reached with the keyboard."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_results
from PIL import Image

from mimscale.study.report.report import write_report
from mimscale.study.results.published import published

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="no browser: apt-get install chromium chromium-driver")
PHONE, DESKTOP = (360, 740), (1280, 900)


class Browser:
    """Headless Chromium with the page in it, and what it logged and asked for."""

    def __init__(self, page: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.page = page

    def open(self, size: tuple[int, int], dark: bool = False) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(self.page.as_uri())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event)

    def picture(self) -> np.ndarray:
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """The report of published runs and of a study of its own, whose runs have folders to link to."""
    folder = tmp_path_factory.mktemp("browser")
    own = list(study_results.grid(run=str(folder / "runs")))
    own[0] = dataclasses.replace(own[0], note="a note of " + "many words " * 30, status="failed", val_loss=None)
    results = [*published(), *own]
    browser = Browser(
        write_report(results, folder / "report", "Two studies in one report, under quite a long title", output=folder)
    )
    yield browser
    browser.driver.quit()


def test_page_asks_for_nothing_and_logs_no_error(browser):
    browser.open(DESKTOP)
    browser.driver.get_log("performance")
    browser.driver.get_log("browser")
    browser.open(DESKTOP)
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked <= {browser.page.as_uri(), "data:,"} and browser.page.as_uri() in asked
    assert browser.driver.get_log("browser") == []
    assert browser.driver.title == "Two studies in one report, under quite a long title"


def test_a_phone_shows_one_column_that_does_not_scroll_sideways(browser):
    browser.open(PHONE)
    assert browser.run("return document.documentElement.scrollWidth") == PHONE[0]
    # What is wider stands in a frame that scrolls by itself.
    outside = browser.run(
        """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.frame') && !e.closest('svg') &&
           e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    wide = browser.run(
        "return [...document.querySelectorAll('.frame')].filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert wide > 3
    tops = browser.run(
        "return [...document.querySelectorAll('.panel, .finding')].map(e => e.getBoundingClientRect().left)"
    )
    assert len(set(map(round, tops))) == 1
    # Letters in pictures stay readable.
    smallest = browser.run(
        "return Math.min(...[...document.querySelectorAll('.panel svg text')].map(e => e.getBoundingClientRect().height))"
    )
    assert smallest > 8


def test_every_link_and_every_table_is_reached_with_the_keyboard_in_order(browser):
    browser.open(DESKTOP)
    wanted = browser.run("return document.querySelectorAll('a[href], .frame').length")
    assert wanted > 80
    seen = []
    for _ in range(wanted):
        browser.press("Tab", 9)
        seen.append(
            browser.run(
                """const e = document.activeElement, all = [...document.querySelectorAll('a[href], .frame')];
                   return [all.indexOf(e), getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)]"""
            )
        )
    assert [place for place, *_ in seen] == list(range(wanted))
    assert all(style == "solid" and width >= 2 for _, style, width in seen)


def test_the_skip_link_comes_first_and_leads_past_the_menu(browser):
    browser.open(DESKTOP)
    browser.press("Tab", 9)
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.run("return document.activeElement.getBoundingClientRect().left") >= 0
    browser.run("document.activeElement.click()")
    assert browser.run("return document.activeElement.id") == "content"


def test_headings_tables_and_pictures_can_be_read_aloud(browser):
    browser.open(DESKTOP)
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    tables = browser.run(
        """return [...document.querySelectorAll('table')].map(t => [t.caption.textContent.length,
           t.querySelectorAll('thead th:not([scope=col])').length, t.querySelectorAll('tbody th:not([scope=row])').length])"""
    )
    assert len(tables) == 10 and all(caption and not columns and not rows for caption, columns, rows in tables)
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    pictures = [n["name"]["value"] for n in nodes if n["role"]["value"] in ("image", "img") and not n["ignored"]]
    assert len(pictures) == browser.run("return document.querySelectorAll('.panel svg').length") > 8
    assert all(len(name) > 30 for name in pictures)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out_by_day_and_by_night(browser, dark):
    browser.open(DESKTOP, dark)
    pixels = browser.picture()
    assert (np.median(pixels) < 40) == dark
    contrasts = browser.run(
        """const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
               .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
           const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
           const back = e => { for (; e; e = e.parentElement) {
               const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } };
           const texts = [...document.querySelectorAll('p, li, a, th, td, h1, h2, h3, dt, dd, caption, figcaption')]
               .map(e => ratio(getComputedStyle(e).color, back(e)));
           const marks = [...document.querySelectorAll('.legend circle')]
               .map(e => ratio(getComputedStyle(e).stroke, back(e.ownerSVGElement.parentElement)));
           const words = [...document.querySelectorAll('.panel svg text')]
               .map(e => ratio(getComputedStyle(e).fill, back(e.ownerSVGElement.parentElement)));
           return [Math.min(...texts), Math.min(...marks), Math.min(...words)]"""
    )
    text, marks, words = contrasts
    assert text >= 4.5 and words >= 4.5
    assert marks >= 3
