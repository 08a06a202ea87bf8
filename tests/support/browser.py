"""Chromium, and a page of it that may not complain."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs a browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, expected: str = "", **how: Any) -> Iterator[Page]:
    """Opens a page with a storage of its own. It may neither write to the console, as a breach of its content security
    policy would, nor raise errors, nor ask other servers.

    Args:
        expected: part of a line on the console that is expected.
        how: settings of Playwright's browser context.
    """
    context, complaints = browser.new_context(**how), list[str]()
    context.set_default_timeout(20000)
    expect.set_options(timeout=20000)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    yield page
    context.close()
    unexpected = [line for line in complaints if not expected or expected not in line]
    assert not unexpected, unexpected
