"""Pictures of the service's page for the documentation: `python benchmarks/page_shots.py BUNDLE --data PICTURES`.

PICTURES holds `good/` and `defect/`. What the bundle has not seen is judged, each normal picture in its eight
orientations, and kept with made-up moments of the last day: defects are rare, but for two hours. A service on that
store is then looked at in Chromium (Debian's package, by Playwright).
"""

import argparse
import io
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from anomaly_vae import Detector, Engine, encode_png
from anomaly_vae.client import Client
from service import ids
from service.store import Record, Store

DAY = 86_400
TROUBLE = (0.55, 0.64)
"""When there are many defects, as shares of the day."""
WIDE, PHONE = ViewportSize(width=1280, height=800), ViewportSize(width=360, height=740)
Judged = tuple[dict[str, Any], torch.Tensor]


def main() -> None:
    """Fill a store, serve it, and write the pictures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    options.add_argument("--pictures", type=int, default=2500)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.sqlite"
        defects = filled(store, asked.bundle, asked.data, asked.pictures)
        with served(asked.bundle, store) as url, sync_playwright() as play:
            happened(url, asked.bundle, asked.data, defects)
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            for name, picture in looked(browser, url, defects[-1]):
                Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, kmeans=2).save(
                    asked.out / f"page-{name}.png", optimize=True
                )
                print(name)


def filled(place: Path, bundle: Path, data: Path, count: int) -> list[Path]:
    """Keep so many verdicts of the last day; the defects that were not among them."""
    engine, chance = Engine(Detector.load(bundle), "cpu"), random.Random(0)
    defects = sorted((data / "defect").iterdir())
    chance.shuffle(defects)
    shown, left = defects[: len(defects) // 2], defects[len(defects) // 2 :]
    normals = [one for one in sorted((data / "good").iterdir()) if not engine.detector.has_seen(one.read_bytes())]
    turned = [(one, k) for one in normals for k in range(8)]
    chance.shuffle(turned)
    store, now = Store(str(place)), time.time()
    moments = sorted(chance.random() for _ in range(count))
    judged: dict[tuple[Path, int], Judged] = {}
    records = []
    for number, moment in enumerate(moments):
        odd = chance.random() < (0.35 if TROUBLE[0] < moment < TROUBLE[1] else 0.015)
        file, turn = (chance.choice(shown), 0) if odd else turned[number % len(turned)]
        if (file, turn) not in judged:
            judged[file, turn] = _judged(engine, file, turn)
        row, image = judged[file, turn]
        records.append(_record(engine, bundle.name, file, row, image, ids.first_at(now - DAY * (1 - moment)) + number))
    for start in range(0, count, 500):
        store.write(records[start : start + 500])
    store.close()
    return left


def happened(url: str, bundle: Path, data: Path, defects: list[Path]) -> None:
    """A stretch of nothing but defects, which raises the alarm, and two scans that tell the service of themselves."""
    with Client(url) as client:
        for start in range(0, 48, 12):
            client.score(*(defects * 12)[start : start + 12])
        for _ in range(120):
            if any(alarm.raised for alarm in client.alarms()):
                break
            time.sleep(0.5)
        else:
            sys.exit("no alarm was raised")
    for kind in ("good", "defect"):
        with tempfile.TemporaryDirectory() as folder:
            words = [str(bundle.resolve()), f"{data.name}/{kind}", "--out", f"{folder}/out.csv", "--send-to", url]
            subprocess.run([sys.executable, "-m", "anomaly_vae", "scan", *words], check=True, cwd=data.resolve().parent)


def _judged(engine: Engine, file: Path, turn: int) -> Judged:
    image = torch.rot90(engine.prepare(file.read_bytes()), turn % 4, (1, 2))
    image = image.flip(2) if turn >= 4 else image
    return engine.judge(image[None]).row(0), image.contiguous()


def _record(engine: Engine, model: str, file: Path, row: dict[str, Any], image: torch.Tensor, number: int) -> Record:
    parts = {name: float(value) if np.isfinite(value) else None for name, value in row["parts"].items()}
    policy = engine.detector.policy
    return Record(
        number, f"shot-{number}", file.name, model, engine.detector.version, "line-1" if number % 3 else "line-2",
        row["score"], row["p_value"], row["outlier"], policy.alpha, 0, policy.expected_false_alarm_rate, parts,
        drawn=number % 40 == 0, png=encode_png(image.numpy()) if row["outlier"] or number % 40 == 0 else None,
    )  # fmt: skip


@contextmanager
def served(bundle: Path, store: Path) -> Iterator[str]:
    """A service that is ready."""
    command = [sys.executable, "-m", "anomaly_vae", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    settings = [f"store={store}", f"models={bundle.resolve().parent}"]
    command += [part for setting in settings for part in ("-o", setting)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if line.strip().startswith("address"):
                url = line.split()[1]
            if line.strip().startswith("stop "):
                break
        assert url, "the service did not start; its message is above"
        yield url
    finally:
        process.terminate()
        process.wait(60)


def looked(browser: Browser, url: str, defect: Path) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each picture."""
    with opened(browser, WIDE, "light") as page:
        yield "overview", whole(page, url)
        show(page, url, "outliers")
        page.locator("#verdicts .card", has_text="_S_D_").first.locator(".thumb").click()
        page.locator("#viewer .controls label").first.wait_for()
        page.wait_for_load_state("networkidle")
        yield "outlier", page.screenshot()
        show(page, url, "score")
        page.set_input_files("#files", defect)
        page.locator("#scored img").first.wait_for()
        page.wait_for_timeout(500)
        yield "score", page.screenshot(full_page=True)
        show(page, url, "scans")
        page.locator("#scans tbody tr").nth(1).wait_for()
        yield "scans", page.screenshot()
    with opened(browser, WIDE, "dark") as page:
        yield "overview-dark", whole(page, url)
        show(page, url, "models")
        page.get_by_label("Percent").fill("10")
        page.get_by_role("button", name="Preview").click()
        page.locator("form.policy .outcome table").wait_for()
        yield "models", page.screenshot(full_page=True)
    with opened(browser, PHONE, "light", scale=2) as page:
        yield "phone", whole(page, url, False)
        show(page, url, "outliers")
        page.locator("#verdicts .card").nth(3).wait_for()
        page.wait_for_load_state("networkidle")
        yield "phone-outliers", page.screenshot()


@contextmanager
def opened(browser: Browser, size: ViewportSize, scheme: Literal["light", "dark"], scale: int = 1) -> Iterator[Page]:
    """A page of its own."""
    context = browser.new_context(
        viewport=size, color_scheme=scheme, locale="en-GB", device_scale_factor=scale, reduced_motion="reduce"
    )
    yield context.new_page()
    context.close()


def show(page: Page, url: str, name: str) -> None:
    """Go to a view."""
    page.goto("about:blank")
    page.goto(f"{url}/#{name}")
    page.locator(f"#view-{name}:not([hidden])").wait_for()


def whole(page: Page, url: str, full: bool = True) -> bytes:
    """The overview once its charts are drawn."""
    show(page, url, "overview")
    for name in ("rate", "p", "score"):
        page.locator(f"#{name}-chart .main-svg").first.wait_for()
    page.locator("#latest img").first.wait_for()
    page.wait_for_timeout(500)
    return page.screenshot(full_page=full)


if __name__ == "__main__":
    main()
