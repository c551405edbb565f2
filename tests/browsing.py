"""Debian's Chromium, driven by Playwright, with an eye on everything it complains about."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect
from serving import Server

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


def shown(page: Page, server: Server, name: str) -> Page:
    """A view, once it stands."""
    page.goto(f"{server.url}/#{name}")
    expect(page.locator(f"#view-{name}")).to_be_visible()
    expect(page.locator("#standing")).to_contain_text("ready")
    return page


def charts_drawn(page: Page) -> None:
    for name in ("rate", "p", "score"):
        expect(page.locator(f"#{name}-chart .main-svg").first).to_be_visible()


def assert_clean(page: Page, name: str) -> None:
    """Neither axe nor somebody who has to scroll sideways may find a fault with what the page shows now."""
    found = Axe().run(page)
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the screen"
