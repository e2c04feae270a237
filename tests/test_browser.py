"""The page in examples/browser answers in headless Chromium what our own model answers, and says what is missing."""

import base64
import contextlib
import dataclasses
import functools
import http.server
import io
import shutil
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser-test")
pytest.importorskip("onnxscript", reason="needs onnxscript: make browser-test")
from playwright import sync_api as playwright

import nanovlm
from nanovlm.config import TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import layout, make_tiles, marker_tokens, plan_tiles
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub.export import export_onnx
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.onnx import FORMATS
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.hub.test_onnx import round_weights

CHROMIUM, PAGE = shutil.which("chromium"), Path(__file__).parent.parent / "examples" / "browser"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not (PAGE / "vendor" / "transformers.min.js").is_file(), reason="needs transformers.js: make browser-test"
    ),
]
CONFIG = dataclasses.replace(
    TINY,
    tiling=TilingConfig("idefics3", longest_edge=40),
    vision=dataclasses.replace(TINY.vision, num_hidden_layers=1),
    decoder=dataclasses.replace(TINY.decoder, num_hidden_layers=1),
)
PATIENCE = 300_000  # milliseconds, on a machine that does much else
SIZES = [(16, 16), (40, 40), (100, 64), (33, 130), (300, 7), (1, 1), (64, 41)]
# Cut a picture as the page does: what tiles it has, its text, and how far pixels are from those of Python.
CUT = """async ([url, tiles]) => {
  const {readPicture, cutPicture, layout, toPixels} = await import("./picture.js");
  const cut = cutPicture(await readPicture(await (await fetch(url)).blob()), 40, 16);
  const pixels = toPixels(cut.tiles, 16, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]);
  const theirs = new Float32Array(Uint8Array.from(atob(tiles), (x) => x.charCodeAt(0)).buffer);
  const furthest = pixels.reduce((most, x, i) => Math.max(most, Math.abs(x - theirs[i])), 0);
  return {text: layout(cut, "<image>"), sizes: [pixels.length, theirs.length], furthest};
}"""


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@contextlib.contextmanager
def serving(folder):
    """Serve a folder as python -m http.server does, and yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page with the export of a random model, and the model itself beside it."""
    folder = tmp_path_factory.mktemp("browser")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(CONFIG))
    save_model(folder / "ours", VLM(CONFIG), Processor(tokenizer, CHAT_TEMPLATE, CONFIG))
    shutil.copytree(PAGE, folder / "page", ignore=shutil.ignore_patterns("vendor", "model"))
    (folder / "page" / "vendor").symlink_to(PAGE / "vendor")
    export_onnx(folder / "ours", folder / "page" / "model")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(browser, folder, query="", complains=False):
    """Open the page of a folder. Nothing is asked of others and, unless it `complains`, nothing is wrong."""
    complaints, requests = [], []
    with serving(folder) as url, contextlib.closing(browser.new_context()) as context:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url + query)
        yield page
        assert all(request.startswith((url, "data:", "blob:")) for request in requests)
        assert complains or not complaints


def says(page, text):
    playwright.expect(page.locator("#status")).to_contain_text(text, timeout=PATIENCE)


@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_it_answers_what_the_model_answers(browser, folder, dtype):
    model, processor = nanovlm.load(folder / "ours")
    if dtype != "fp32":
        round_weights(model, FORMATS[dtype][0])
    with visit(browser, folder / "page", f"?dtype={dtype}") as page:
        says(page, "Choose a picture")
        for seed, question in enumerate(("what color is the circle?", "how many objects are there?")):
            image = noise(seed, 64).resize((64, 20 + 40 * seed))
            page.locator("#file").set_input_files(
                {"name": f"{seed}.png", "mimeType": "image/png", "buffer": encode(image)}
            )
            says(page, f"{seed}.png: 64 x {20 + 40 * seed} pixels.")
            page.locator("#question").fill(question)
            page.keyboard.press("Enter")
            playwright.expect(page.locator("#ask")).to_be_enabled(timeout=PATIENCE)
            batch = processor([{"role": "user", "content": question}], [image])
            answer = processor.decode(nanovlm.generate(model, batch, max_new_tokens=128)[0])
            assert page.locator("dt").first.inner_text() == question
            assert page.locator("dd").first.text_content() == answer and len(answer) > 100


def test_what_is_wrong_is_said(browser, folder):
    with visit(browser, folder / "page") as page:
        says(page, "Choose a picture")
        page.locator("#question").fill("what is it?")
        page.locator("#ask").click()
        says(page, "Choose a picture first.")
        page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
        says(page, "a.txt is no picture that this browser reads.")
        picture = {"name": "a.png", "mimeType": "image/png", "buffer": encode(noise(0))}
        page.locator("#file").set_input_files(picture)
        says(page, "a.png: 16 x 16 pixels.")
        for question, problem in (("", "Write a question first."), ("<image> is?", "The question contains <image>")):
            page.locator("#question").fill(question)
            page.locator("#ask").click()
            says(page, problem)
        assert page.locator("dt").count() == 0


@pytest.mark.parametrize("missing", ["model", "vendor"])
def test_what_is_missing_is_said(browser, folder, tmp_path, missing):
    for part in (folder / "page").iterdir():
        if part.name != missing:
            (tmp_path / part.name).symlink_to(part)
    with visit(browser, tmp_path, complains=True) as page:
        says(
            page, {"model": "There is no model/config.json: write", "vendor": "vendor/ has no transformers.js"}[missing]
        )


def test_pictures_have_the_pixels_that_the_model_was_trained_on(browser, folder):
    with visit(browser, folder / "page") as page:
        for seed, size in enumerate(SIZES):
            image = noise(seed, 300).resize(size)
            tiles = normalize(make_tiles(image, CONFIG))
            url = "data:image/png;base64," + base64.b64encode(encode(image)).decode()
            found = page.evaluate(CUT, [url, base64.b64encode(tiles.numpy().tobytes()).decode()])
            assert found["text"] == layout(plan_tiles(*size, CONFIG), "<image>", CONFIG)
            assert found["sizes"] == [tiles.numel()] * 2 and found["furthest"] == 0
