"""The page of services that stand otherwise: empty, without a store, with keys."""

import json
from pathlib import Path

from browsing import assert_clean, charts_drawn, shown, watched
from playwright.sync_api import Browser, expect
from serving import running

from service.keys import KeyFile, Role, made


def test_an_empty_service_tells_what_to_do(browser: Browser, tiny_bundle: Path, tmp_path: Path):
    with running(tiny_bundle, f"store={tmp_path / 's.sqlite'}") as empty, watched(browser) as found:
        page = shown(found.page, empty, "overview")
        charts_drawn(page)
        expect(page.locator("#rate-said")).to_contain_text("Send some with POST /v1/score")
        expect(page.locator("#latest")).to_contain_text("No outliers yet")
        for name, words in (
            ("outliers", "Outliers appear"),
            ("review", "Nothing to review"),
            ("scans", "No scans yet"),
            ("models", "no pictures"),
        ):
            expect(shown(page, empty, name).locator(f"#view-{name}")).to_contain_text(words)
        assert found.complaints == []


def test_without_a_store_there_is_scoring_and_no_more(browser: Browser, tiny_bundle: Path, digits_folder: Path):
    with running(tiny_bundle, "store=none") as alone, watched(browser) as found:
        page = shown(found.page, alone, "score")
        assert page.locator("#views a:visible").all_inner_texts() == ["Score", "Models"]
        page.set_input_files("#files", sorted((digits_folder / "8").iterdir())[0])
        expect(page.locator("#scored .badge").first).to_be_visible()
        shown(page, alone, "models")
        assert found.complaints == []


def test_signing_in_by_role_and_out(browser: Browser, tiny_bundle: Path, tmp_path: Path, digits_folder: Path):
    """A key opens what its role may, the cookie is out of reach of scripts, and a removed key ends it all."""
    keys, secrets = [], {}
    for role in Role:
        key, secrets[role.name.lower()] = made(f"for-{role.name.lower()}", role)
        keys.append(key)
    place = tmp_path / "keys.yaml"
    KeyFile(keys=tuple(keys)).write(place)
    with running(tiny_bundle, f"store={tmp_path / 's.sqlite'}", f"keys={place}") as server, watched(browser) as found:
        page = found.page
        page.goto(f"{server.url}/#models")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        expect(page.get_by_label("API key")).to_be_focused()
        assert_clean(page, "sign-in")
        page.get_by_label("API key").fill("av_00000000_wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#sign-in-error")).to_contain_text("unknown or no longer valid")
        assert len(found.complaints) == 1
        assert "401" in found.complaints.pop()
        for role, views in (("score", 2), ("read", 6), ("admin", 6)):
            page.get_by_label("API key").fill(secrets[role])
            page.get_by_role("button", name="Sign in").click()
            expect(page.locator("#whoami")).to_have_text(f"for-{role} ({role})")
            expect(page.locator("#views a:visible")).to_have_count(views)
            expect(page.locator("form.policy")).to_have_count(0 if role == "score" else 1)
            expect(page.get_by_role("button", name="Roll back")).to_have_count(1 if role == "admin" else 0)
            (cookie,) = page.context.cookies()
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            assert page.evaluate("document.cookie") == ""
            assert secrets[role] not in json.dumps(page.context.storage_state())
            if role != "admin":
                page.get_by_role("button", name="Sign out").click()
                expect(page.get_by_label("API key")).to_be_visible()
        page.goto(f"{server.url}/#score")
        page.set_input_files("#files", sorted((digits_folder / "8").iterdir())[0])
        expect(page.locator("#scored .badge").first).to_be_visible()
        # What was under way when somebody signed out is refused.
        assert all("401" in one for one in found.complaints)
        KeyFile(keys=tuple(keys[:2])).write(place)
        expect(page.get_by_label("API key")).to_be_visible()
