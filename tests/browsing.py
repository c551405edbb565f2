"""Debian's Chromium, driven by Playwright, with an eye on everything it complains about."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect

_VIOLATIONS = """document.addEventListener("securitypolicyviolation",
  (event) => console.error(`forbidden by the policy: ${event.effectiveDirective} ${event.blockedURI}`));"""

_PATIENCE = 30_000
"""Milliseconds; machines that test other things meanwhile are slow."""


def chromium() -> str | None:
    """Where the browser is, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def launched(play: Playwright) -> Browser:
    """The browser; as root it has no sandbox."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return play.chromium.launch(executable_path=chromium(), args=[*arguments, "--disable-dev-shm-usage"])


@dataclass
class Watched:
    """A page and its complaints: errors and warnings of the console, uncaught ones, and breaches of the policy."""

    page: Page
    complaints: list[str] = field(default_factory=list)


@contextmanager
def watched(browser: Browser, **settings: object) -> Iterator[Watched]:
    """A page in a context of its own. Nothing outside of the machine can be reached from it."""
    context: BrowserContext = browser.new_context(**{"locale": "en-GB", "timezone_id": "Europe/London", **settings})
    context.set_default_timeout(_PATIENCE)
    expect.set_options(timeout=_PATIENCE)
    context.add_init_script(_VIOLATIONS)
    page = context.new_page()
    found = Watched(page)
    page.on("console", lambda said: found.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    try:
        yield found
    finally:
        context.close()
