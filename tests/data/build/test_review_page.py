"""The page of a sample in headless Chromium: data runs nothing there, and what it saves is read back."""

import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="needs playwright: make serve-test")
from playwright import sync_api as playwright

from nanovlm.data.build.review import PageConfig, VerdictsConfig, apply_verdicts, write_page
from tests.data.build.test_review import EVIL

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.mark.parametrize("is_escaped", [True, False])
def test_a_person_judges_and_data_runs_nothing(tmp_path, monkeypatch, is_escaped):
    """Also were nothing escaped, the policy of the page would let no script of data run."""
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    evil = EVIL.replace("alert", "document.title = document.title + ")
    records = [
        {"images": ["red.png"], "id": name, "texts": [{"user": text, "assistant": text}]}
        for name, text in (("r0", evil), ("__proto__", "fine"))
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if not is_escaped:
        monkeypatch.setattr("nanovlm.data.build.review.visible", lambda text: text)
        monkeypatch.setattr("nanovlm.data.build.review.html.escape", lambda text: text)
    write_page(PageConfig(str(tmp_path / "records.jsonl"), tmp_path / "page.html"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(accept_downloads=True)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("text=0 of 2")  # written by the page's own script
        title = page.title()
        assert title.startswith("2 of 2 records of ") and "1" not in title.rpartition("records.jsonl")[2]
        if is_escaped:
            assert page.locator("dt").first.inner_text() == evil and page.locator("script").count() == 1
        page.locator(".unit button[value=bad]").first.click()
        page.locator(".unit button[value=good]").nth(1).click()
        page.locator(".unit button[value=bad]").nth(1).click()
        page.locator(".unit button[value=good]").nth(1).click()
        assert page.locator("#count").inner_text() == "2 of 2"
        with page.expect_download() as saved:
            page.click("#save")
        saved.value.save_as(tmp_path / "verdicts.json")
        browser.close()
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert json.loads((tmp_path / "verdicts.json").read_text())["verdicts"] == {"r0": "bad", "__proto__": "good"}
    apply_verdicts(VerdictsConfig(str(tmp_path / "records.jsonl"), tmp_path / "verdicts.json", tmp_path / "out.jsonl"))
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["__proto__"]
