"""The product's page in a real browser against a real service: seen, clicked, typed, and never complaining."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browsing import Watched, assert_clean, charts_drawn, shown, watched
from playwright.sync_api import Browser, expect
from serving import Server, running
from test_service_store import altered

VIEWS = ("overview", "outliers", "score", "review", "scans", "models")
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> dict[str, list[Path]]:
    return {kind: sorted((digits_folder / kind).iterdir()) for kind in ("good", "8", "7")}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, pictures) -> Iterator[Server]:
    """A service that has judged some pictures, and draws a third of all for review."""
    place = tmp_path_factory.mktemp("page") / "s.sqlite"
    settings = f"store={place}", "review_share=0.3", "flush_ms=1", f"models={tiny_bundle.parent}"
    with running(tiny_bundle, *settings) as found:
        sent(found, [*pictures["good"][:20], *pictures["8"][:6]])
        yield found


@pytest.fixture
def view(browser: Browser, server: Server) -> Iterator[Watched]:
    """A page that must not have complained at the end."""
    with watched(browser, viewport={"width": 1280, "height": 900}) as found:
        yield found
        assert found.complaints == []


def sent(server: Server, chosen: list[Path]) -> list[dict]:
    """The results of pictures that somebody else had scored."""
    files = [("file", (path.name, path.read_bytes())) for path in chosen]
    reply = httpx.post(f"{server.url}/v1/score", files=files, params={"alpha": 0.1}, timeout=60)
    return reply.raise_for_status().json()["results"]


def outliers_of(server: Server) -> list[dict]:
    return httpx.get(f"{server.url}/v1/verdicts?outlier=true").raise_for_status().json()["verdicts"]


def test_an_uploaded_picture_gets_a_verdict_with_heat_map_parts_and_reasons(view: Watched, server: Server, pictures):
    page = shown(view.page, server, "score")
    page.set_input_files("#files", [pictures["8"][7], pictures["good"][30]])
    expect(page.locator("#scored > li")).to_have_count(2)
    ours: dict[str, dict] = {}
    while len(ours) < 2:  # they are kept a moment after they were answered
        kept = httpx.get(f"{server.url}/v1/verdicts?limit=2").json()["verdicts"]
        sent = (pictures["8"][7].name, pictures["good"][30].name)
        ours = {one["filename"]: one for one in kept if one["filename"] in sent}
    for k, path in enumerate((pictures["good"][30], pictures["8"][7])):
        result = page.locator("#scored > li").nth(k)
        expect(result.get_by_role("heading", name=path.name)).to_be_visible()
        expect(result.locator(".badge").first).to_have_text("▲ outlier" if ours[path.name]["outlier"] else "● normal")
        expect(result.get_by_role("region", name="Parts of the score")).to_contain_text("reconstruction")
        expect(result).to_contain_text("Most similar normal picture")
        slider = result.get_by_role("slider", name="Heat map")
        slider.fill("25")
        assert result.locator(".above").evaluate("image => [image.style.opacity, image.naturalWidth > 0]") == [
            "0.25",
            True,
        ]
    expect(page.locator("#scoring")).to_contain_text("2 pictures done")


def test_a_dropped_or_pasted_file_is_scored_and_what_is_no_picture_is_told_in_place(view, server, pictures):
    page = shown(view.page, server, "score")
    data = list(pictures["7"][0].read_bytes())
    for event, target in (("drop", "document.querySelector('#drop')"), ("paste", "document.body")):
        page.evaluate(
            f"""(data) => {{
          const carried = new DataTransfer();
          carried.items.add(new File([new Uint8Array(data)], "{event}<b>.png", {{ type: "image/png" }}));
          const options = {{ dataTransfer: carried, clipboardData: carried, bubbles: true, cancelable: true }};
          const made = "{event}" === "drop" ? new DragEvent("drop", options) : new ClipboardEvent("paste", options);
          {target}.dispatchEvent(made);
        }}""",
            data,
        )
        expect(page.locator("#scored h2").first).to_have_text(f"{event}<b>.png")
    page.set_input_files("#files", {"name": "no.png", "mimeType": "image/png", "buffer": b"no picture at all"})
    expect(page.locator("#scored > li").first.locator(".wrong")).to_contain_text("send a JPEG")
    assert len(view.complaints) == 1
    assert "status of 4" in view.complaints.pop()


def test_what_comes_in_appears_without_a_reload(view: Watched, server: Server, pictures):
    page = shown(view.page, server, "overview")
    charts_drawn(page)
    counted = page.locator("#tiles strong").first
    before = int(counted.inner_text())
    newest = page.locator("#latest .card").first.get_attribute("data-id")
    found: list[dict] = []
    for k in range(40):
        data = altered(pictures["8"][k % 20].read_bytes(), k)
        found += httpx.post(f"{server.url}/v1/score", files={"file": (f"live-{k}.png", data)}).json()["results"]
        if found[-1]["outlier"]:
            break
    expect(page.locator("#latest .card").first).to_contain_text(found[-1]["filename"])
    assert page.locator("#latest .card").first.get_attribute("data-id") > newest
    expect(counted).to_have_text(str(before + len(found)))


def test_charts_say_in_words_and_tables_what_they_show(view: Watched, server: Server):
    page = shown(view.page, server, "overview")
    charts_drawn(page)
    rates = httpx.get(f"{server.url}/v1/rates?minutes=30").json()
    scored = sum(one["scored"] for one in rates["buckets"])
    for name, words in (("rate", f"of {scored}"), ("p", f"{scored} p-values"), ("score", "The threshold is")):
        expect(page.locator(f"#{name}-said")).to_contain_text(words)
        label = page.locator(f"#{name}-chart").get_attribute("aria-label")
        assert label == page.locator(f"#{name}-said").inner_text()
    page.locator("#p-table summary").click()
    rows = page.locator("#p-table tbody tr")
    expect(rows).to_have_count(20)
    counts = [int(rows.nth(k).locator("td").first.inner_text()) for k in range(20)]
    assert counts == rates["p_values"]
    expected = sum(float(rows.nth(k).locator("td").nth(1).inner_text()) for k in range(20))
    assert expected == pytest.approx(scored, rel=0.01)


def test_feedback_changes_the_row_here_and_in_the_store(view: Watched, server: Server):
    page = shown(view.page, server, "outliers")
    card = page.locator("#verdicts .card").first
    name = card.get_attribute("data-id")
    card.get_by_role("button", name="False alarm").click()
    expect(card).to_contain_text("false alarm, said anyone")
    expect(card.get_by_role("button", name="False alarm")).to_have_attribute("aria-pressed", "true")
    assert httpx.get(f"{server.url}/v1/verdicts/{name}").json()["feedback"]["label"] == "false_alarm"
    card.get_by_role("button", name="Confirmed").click()
    expect(card).to_contain_text("confirmed, said anyone")
    expect(card.get_by_role("button", name="False alarm")).to_have_attribute("aria-pressed", "false")
    assert httpx.get(f"{server.url}/v1/verdicts/{name}").json()["feedback"]["label"] == "confirmed"


def test_a_verdict_is_seen_in_full_by_keyboard_alone(view: Watched, server: Server):
    page = shown(view.page, server, "outliers")
    first = page.locator("#verdicts .card").first
    first.locator(".thumb").focus()
    page.keyboard.press("Enter")
    box = page.locator("#viewer")
    expect(box).to_be_visible()
    expect(box.get_by_role("heading").first).to_be_focused()
    expect(box.get_by_role("region", name="Parts of the score")).to_be_visible()
    found = httpx.get(f"{server.url}/v1/verdicts/{first.get_attribute('data-id')}/regions").json()
    if found["regions"]:
        expect(box.locator("rect")).to_have_count(len(found["regions"]))
    else:
        expect(box).to_contain_text("No place stands out")
    slider = box.get_by_role("slider", name="Heat map")
    slider.focus()
    page.keyboard.press("Home")
    assert box.locator(".above").evaluate("image => image.style.opacity") == "0"
    box.get_by_role("button", name="Older").focus()
    page.keyboard.press("Enter")
    expect(box.get_by_role("button", name="Newer")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(box).to_be_hidden()
    expect(first.locator(".thumb")).to_be_focused()


def test_the_keyboard_reaches_everything_in_order(view: Watched, server: Server):
    page = shown(view.page, server, "outliers")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    reached = []
    for _ in range(len(VIEWS)):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached[:4] == ["Overview", "Outliers", "Score", "Review"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("h1:focus")).to_be_visible()
    outline = page.evaluate("getComputedStyle(document.querySelector('nav a')).outlineStyle")
    page.locator("nav a").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid" != outline


def test_a_policy_is_previewed_then_applied_and_taken_back(view: Watched, server: Server):
    page = shown(view.page, server, "models")
    policy = page.locator("form.policy")
    name = policy.get_attribute("data-policy")
    before = httpx.get(f"{server.url}/v1/models/{name}/policy").json()["policy"]
    expect(policy.get_by_role("button", name="Apply")).to_have_count(0)
    policy.get_by_label("Percent").fill("0.01")
    policy.get_by_role("button", name="Preview").click()
    expect(policy.locator(".wrong")).to_contain_text("calibration images")
    view.complaints.clear()
    policy.get_by_label("Percent").fill("20")
    policy.get_by_role("button", name="Preview").click()
    preview = httpx.post(f"{server.url}/v1/models/{name}/policy:preview", json={"alpha": 0.2}).json()
    row = policy.get_by_role("row", name=re.compile("^then"))
    expect(row).to_contain_text(f"{preview['flagged_then']} of {preview['verdicts']}")
    assert httpx.get(f"{server.url}/v1/models/{name}/policy").json()["policy"] == before
    policy.get_by_label("Percent").fill("25")
    expect(policy.get_by_role("button", name="Apply")).to_have_count(0)  # another choice wants another preview
    policy.get_by_label("Percent").fill("20")
    policy.get_by_role("button", name="Preview").click()
    policy.get_by_role("button", name="Apply").click()
    page.locator("#question").get_by_role("button", name="Apply").click()
    expect(policy.locator(".said").first).to_contain_text("α = 20%")
    assert httpx.get(f"{server.url}/v1/models/{name}/policy").json()["policy"]["alpha"] == 0.2
    policy.locator("summary").click()
    policy.get_by_role("button", name="Back to the policy before").click()
    expect(policy.locator(".said").first).not_to_contain_text("α = 20%")
    after = httpx.get(f"{server.url}/v1/models/{name}/policy").json()["policy"]
    assert {**after, "revision": 0} == before


def test_a_version_is_loaded_and_asked_for_twice(view: Watched, server: Server):
    page = shown(view.page, server, "models")
    model = page.locator("[data-model]")
    expect(model.locator("dd", has_text=re.compile(r"95%"))).to_be_visible()
    model.get_by_role("button", name="Load").click()
    box = page.locator("#question")
    expect(box).to_be_visible()
    box.get_by_role("button", name="Cancel").click()
    model.get_by_role("button", name="Roll back").click()
    box.get_by_role("button", name="Roll back").click()
    expect(model.locator(".wrong").first).to_contain_text("nothing to go back to")
    view.complaints.clear()  # the browser tells of the refusal as well


def test_reviews_are_kept_by_what_the_verdict_was(view: Watched, server: Server, pictures):
    sent(server, pictures["good"][40:70])
    page = shown(view.page, server, "review")
    asked = httpx.get(f"{server.url}/v1/review?limit=12").json()["verdicts"]
    assert len(asked) >= 3
    for answer, labels in (
        ("normal", {"normal", "false_alarm"}),
        ("odd", {"missed", "confirmed"}),
        ("unclear", {"unclear"}),
    ):
        card = page.locator("#to-review .card").first
        name = card.get_attribute("data-id")
        card.locator(f"[data-answer={answer}]").click()
        expect(page.locator(f"#to-review [data-id='{name}']")).to_have_count(0)
        verdict = httpx.get(f"{server.url}/v1/verdicts/{name}").json()
        assert verdict["feedback"]["label"] in labels
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#recalibration .wrong")).to_contain_text("it takes 100")
    view.complaints.clear()


@pytest.mark.parametrize(("scheme", "size"), [("light", None), ("dark", None), ("light", PHONE), ("dark", PHONE)])
def test_every_view_is_accessible_and_fits(browser: Browser, server: Server, scheme, size):
    with watched(browser, viewport=size or {"width": 1280, "height": 900}, color_scheme=scheme) as found:
        page = found.page
        for name in VIEWS:
            if page.url.startswith("http") and not page.locator(f"#views a[data-view={name}]").is_visible():
                continue
            shown(page, server, name)
            if name == "overview":
                charts_drawn(page)
            if name == "models":
                page.get_by_role("button", name="Preview").click()
                expect(page.locator("form.policy .outcome table")).to_be_visible()
            if name == "outliers":
                page.locator("#verdicts .thumb").first.click()
                page.locator("#viewer .controls").first.wait_for()
                assert_clean(page, "viewer")
                page.keyboard.press("Escape")
            assert_clean(page, name)
        assert found.complaints == []


def test_names_are_text_wherever_they_stand(view: Watched, server: Server, pictures):
    evil = "<img src=x onerror=alert(1)>.png"
    data = pictures["8"][0].read_bytes()
    files = {"file": (evil, data)}
    assert httpx.post(f"{server.url}/v1/score", files=files).json()["results"][0]["filename"] == evil
    page = shown(view.page, server, "outliers")
    page.locator("#filter [name=what]").select_option("all")
    expect(page.locator("#verdicts .name", has_text=evil).first).to_be_visible()
    page.locator("#verdicts .card", has_text=evil).first.locator(".thumb").click()
    expect(page.locator("#viewer-title")).to_have_text(evil)
    assert page.locator("img[src=x]").count() == 0


def test_alarms_are_shown_and_acknowledged(view: Watched, server: Server, pictures):
    end = time.monotonic() + 60
    while not any(one["raised"] for one in httpx.get(f"{server.url}/v1/alarms").json()["alarms"]):
        assert time.monotonic() < end, "no alarm was raised by nothing but outliers"
        sent(server, pictures["8"][:30])
    page = shown(view.page, server, "overview")
    alarm = page.locator(".alarm").first
    expect(alarm).to_be_visible()
    before = page.locator(".alarm").count()
    name = alarm.get_attribute("data-id")
    alarm.get_by_role("button", name="Acknowledge").click()
    page.locator("#question").get_by_role("button", name="Acknowledge").click()
    expect(page.locator(".alarm")).to_have_count(before - 1)
    left = {one["id"]: one["raised"] for one in httpx.get(f"{server.url}/v1/alarms").json()["alarms"]}
    assert left[name] is False


def test_scans_are_listed_with_their_reports(view: Watched, server: Server):
    model = httpx.get(f"{server.url}/v1/models").json()["models"][0]
    told = {
        "name": "monday <line 3>", "model": model["name"], "version": model["version"], "alpha": 0.05,
        "started": "2026-01-31T06:00:00Z", "finished": "2026-01-31T06:12:30Z",
        "scored": 4000, "failed": 2, "outliers": 51, "expected_rate": 0.01,
    }  # fmt: skip
    scan = httpx.post(f"{server.url}/v1/scans", json=told).raise_for_status().json()
    httpx.post(f"{server.url}/v1/scans", json={**told, "name": "bare"}).raise_for_status()
    report = {"content": b"<!doctype html><title>r</title><h1>All of it</h1>", "headers": {"Content-Type": "text/html"}}
    httpx.put(f"{server.url}/v1/scans/{scan['id']}/report", **report).raise_for_status()
    page = shown(view.page, server, "scans")
    rows = page.locator("#scans tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.filter(has_text="bare").get_by_role("link")).to_have_count(0)
    row = rows.filter(has_text="monday <line 3>")
    for words in ("4,000", "51 (1.3%)", "1%", model["version"]):
        expect(row).to_contain_text(words)
    assert_clean(page, "scans")
    with page.context.expect_page() as opened:
        row.get_by_role("link", name="Report").click()
    expect(opened.value.get_by_role("heading", name="All of it")).to_be_visible()


def test_rows_of_a_scan_are_outliers_like_others_also_of_a_model_that_is_not_served(view: Watched, server: Server):
    told = {
        "name": "archive", "model": "elsewhere", "version": "0123456789ab", "alpha": 0.05, "token": "f" * 32,
        "started": "2026-01-31T06:00:00Z", "finished": "2026-01-31T06:12:30Z",
        "scored": 3, "failed": 1, "outliers": 2, "expected_rate": 0.05, "source": "cellar",
    }  # fmt: skip
    scan = httpx.post(f"{server.url}/v1/scans", json=told).raise_for_status().json()
    row = {"score": 3.5, "p_value": 0.01, "outlier": True, "part_kl": 2.0, "version": told["version"]}
    body = "\n".join(json.dumps({**row, "path": f"/far/away/{i}.png", "outlier": i > 0}) for i in range(3))
    lines = {"content": body, "headers": {"Content-Type": "application/x-ndjson"}}
    httpx.post(f"{server.url}/v1/scans/{scan['id']}/rows?first=0", **lines).raise_for_status()
    page = shown(view.page, server, "scans")
    page.locator("#scans tbody tr").filter(has_text="archive").get_by_role("link", name="3 of 4").click()
    expect(page.locator("#verdicts > li")).to_have_count(2)
    expect(page.locator("#verdicts .name")).to_have_text(["2.png", "1.png"])
    for select, chosen in (("Model", "elsewhere"), ("Source", "cellar")):
        expect(page.locator("#filter").get_by_label(select)).to_have_value(chosen)
    assert_clean(page, "outliers")
    page.get_by_role("button", name="Show 2.png").click()
    expect(page.locator("#viewer")).to_contain_text("/far/away/2.png")
    expect(page.locator("#viewer")).to_contain_text("A scan sent this verdict")
    page.keyboard.press("Escape")
    page.locator("#filter").get_by_label("Model").select_option("all")
    page.locator("#filter").get_by_label("Source").select_option("all")
    expect(page.locator("#verdicts .thumb:not(.bare)").first).to_be_visible()


def test_a_service_that_does_not_answer_is_told_until_it_does(view: Watched, server: Server):
    page = shown(view.page, server, "overview")
    page.context.set_offline(True)
    expect(page.locator("#trouble")).to_contain_text("does not answer")
    expect(page.locator("#standing")).to_contain_text("no answer")
    page.context.set_offline(False)
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#standing")).to_contain_text("ready")
    assert all("ERR_INTERNET_DISCONNECTED" in one for one in view.complaints)
    view.complaints.clear()
