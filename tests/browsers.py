"""A Chromium for the tests of pages: this machine's, or the one that Playwright has fetched."""

from __future__ import annotations

import functools
import os
import shutil

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "there is no Chromium: apt-get install chromium, or playwright install chromium, or name one "
    "in RETOUR_CHROMIUM"
)


@functools.cache
def chromium() -> str | None:
    """Its path: the environment's RETOUR_CHROMIUM, one on PATH, or Playwright's own."""
    named = os.environ.get("RETOUR_CHROMIUM")
    if named:
        return named
    return next(filter(None, map(shutil.which, NAMES)), None) or _fetched()


def _fetched() -> str | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as play:
        path = play.chromium.executable_path
    return path if os.path.isfile(path) else None
