"""The page in headless Chromium: asked by keyboard, and what it shows is what the server computes."""

import base64
import copy
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="needs playwright: make serve-test")
from playwright import sync_api as playwright

from nanovlm.config import MoEConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens, place_tiles
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.infer.engine import Engine
from nanovlm.infer.look_sheet import heat_map
from nanovlm.infer.looking import look
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.infer.serving import FakeEngine, data_url, question, running

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PICTURE = noise(0, 90).resize((60, 24))
# The canvas of the first picture: how opaque each of its pixels is.
OPACITY = """() => {
  const canvas = document.querySelector("#shown canvas");
  const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  context.drawImage(canvas, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return {width: canvas.width, alpha: [...pixels.filter((_, i) => i % 4 === 3)]};
}"""
BOXES = "all => all.map((x) => x.getBoundingClientRect()).map(({x, y, width, height}) => [x, y, width, height])"
# A file is dropped, or pasted, maybe with texts of some types.
GIVE = """([how, url, name, texts]) => {
  const bytes = Uint8Array.from(atob(url.split(",")[1]), (character) => character.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, {type: url.slice(5).split(";")[0]}));
  for (const type of texts ?? []) files.setData(type, "text");
  const options = {dataTransfer: files, clipboardData: files, bubbles: true, cancelable: true};
  if (how === "paste") document.body.dispatchEvent(new ClipboardEvent("paste", options));
  else for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, options));
}"""


@pytest.fixture(scope="module")
def mixture():
    """A mixture of experts that cuts pictures into tiles, and its processor."""
    torch.manual_seed(0)
    decoder = dataclasses.replace(
        TINY.decoder, moe=MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16)
    )
    config = dataclasses.replace(TINY, decoder=decoder, tiling=TilingConfig("fit", max_tiles=4))
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), 512, marker_tokens(config))
    return VLM(config).eval(), Processor(tokenizer, CHAT_TEMPLATE, config)


@pytest.fixture(scope="module")
def server(mixture):
    with running(mixture[1], Engine(mixture[0], num_rows=2)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that was opened, what it asked for, and what it complained of."""

    def __init__(self, browser, server, script="", **options):
        """`script` runs before those of the page."""
        self.context = browser.new_context(viewport={"width": 1000, "height": 800}, **options)
        self.context.set_default_timeout(15_000)
        self.page, self.server = self.context.new_page(), server
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.add_init_script(script)
        self.page.goto(server.url)

    def ask(self, text, num_tokens=12):
        self.page.evaluate("n => document.getElementById('max_tokens').value = n", num_tokens)
        self.page.locator("#question").fill(text)
        self.page.keyboard.press("Enter")

    def tokens(self):
        """Wait for the tokens of the last answer, and return them."""
        playwright.expect(self.page.locator("#stop")).to_be_hidden()
        return self.page.locator(".turn:last-child .token")

    def save(self):
        """Return the text of the file that is saved."""
        with self.page.expect_download() as download:
            self.page.locator("#save").click()
        return download.value.path().read_text(encoding="utf-8")

    def says(self, text):
        playwright.expect(self.page.locator("#status")).to_contain_text(text)


@pytest.fixture
def visit(browser, server):
    """Open a page; at the end nothing was asked of others, and nothing was wrong."""
    visits = []

    def open(at=server, **options):
        visits.append(Visit(browser, at, **options))
        return visits[-1]

    yield open
    for visit in visits:
        visit.context.close()
        assert all(request.url.startswith((visit.server.url, "data:", "blob:")) for request in visit.requests)
        assert not visit.complaints


@pytest.fixture(scope="module")
def answered(browser, server):
    """A visit with one answer about a picture, and the text of the file that it saves."""
    visit = Visit(browser, server)
    assert visit.page.evaluate("document.activeElement.id") == "question"
    visit.page.evaluate(GIVE, ["drop", data_url(PICTURE), "a<b>.png"])
    playwright.expect(visit.page.locator("#pending img")).to_have_count(1)
    visit.ask("what is <i>this</i>?")
    visit.tokens()
    yield visit, visit.save()
    visit.context.close()
    assert all(request.url.startswith((server.url, "data:", "blob:")) for request in visit.requests)
    assert not visit.complaints


def opacity(page):
    drawn = page.evaluate(OPACITY)
    return np.array(drawn["alpha"]).reshape(-1, drawn["width"])


def test_a_token_shows_where_it_looked(answered, server, mixture):
    """Its heat map, its alternatives and its experts are those that are computed here."""
    (visit, _), (model, processor) = answered, mixture
    page, tokens = visit.page, visit.tokens()
    body = {"model": "tiny", "messages": question("what is <i>this</i>?", PICTURE), "temperature": 0}
    choice = server.post(body=body | {"max_tokens": 12, "return_token_ids": True}).json()["choices"][0]
    assert tokens.count() == 12 == len(choice["token_ids"])
    shown = [text for text in tokens.all_text_contents() if text != "·"]
    assert "".join(shown) == choice["message"]["content"]
    playwright.expect(page.locator(".counts")).to_contain_text("12 tokens, ")
    playwright.expect(page.locator(".counts")).to_contain_text(", the first after ")
    prompt = processor.prompt([{"role": "user", "content": "what is <i>this</i>?"}], [PICTURE])
    found = look(model, prompt, choice["token_ids"])
    places = place_tiles(*PICTURE.size, model.config)
    assert sum(place.is_whole for place in places) == 1 and len(places) > 2

    def expected(weights, view):
        chosen = [i for i, place in enumerate(places) if view == "all" or place.is_whole == (view == "whole")]
        heat = heat_map(weights.view(len(places), -1)[chosen], [places[i] for i in chosen], (320, 128)).numpy()
        return 255 * 0.62 * (heat / heat.max()) ** 1.5

    tokens.nth(5).hover()
    for layer, head, view in ((None, None, "all"), (1, None, "whole"), (None, 3, "tiles"), (0, 2, "all")):
        page.locator("#layer").select_option("mean" if layer is None else str(layer))
        page.locator("#head").select_option("mean" if head is None else str(head))
        page.locator("#view").select_option(view)
        weights = found.to_images[:, :, 5]
        weights = weights if layer is None else weights[layer, None]
        weights = weights if head is None else weights[:, head, None]
        drawn = opacity(page)
        assert drawn.shape == (128, 320) and drawn.max() > 140 and drawn.min() < 120
        assert np.abs(drawn - expected(weights.mean((0, 1)), view)).max() < 5
    about = page.locator("#about").text_content()
    assert f"{100 * float(found.to_text[0, 2, 5]):.0f} % on the text" in about
    others = page.locator("#likeliest li")
    assert others.count() == 10
    likeliest = float(found.likeliest_logprobs[5, 0].exp())
    assert others.nth(0).text_content().endswith(f"{100 * likeliest:.{1 if likeliest < 0.0995 else 0}f} %")
    (expert, other), share = found.experts[1, 5].tolist(), float(found.expert_weights[1, 5, 0])
    line = page.locator("#experts li").nth(1).text_content()
    assert line.startswith(f"layer 1: {expert} ({100 * share:.0f} %), {other} (")


def heat_lies_on_pictures(page):
    boxes = [page.locator(f"#shown {name}").evaluate_all(BOXES) for name in ("img", "canvas")]
    return np.abs(np.subtract(*boxes)).max() < 1


def test_pictures_of_other_shapes(visit):
    """Each has its own height, and its heat map covers all of it and nothing else."""
    here = visit()
    for size in ((60, 24), (24, 60)):
        here.page.evaluate(GIVE, ["drop", data_url(PICTURE.resize(size)), "a.png"])
    playwright.expect(here.page.locator("#pending img")).to_have_count(2)
    here.ask("what?", 2)
    here.tokens()
    assert here.page.locator("#shown img").count() == 2 and heat_lies_on_pictures(here.page)


def test_the_keyboard_walks_over_the_tokens(answered):
    visit, _ = answered
    page, tokens = visit.page, visit.tokens()
    tokens.nth(0).focus()
    for key, at in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 11),
        ("ArrowRight", 11),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        playwright.expect(tokens.nth(at)).to_be_focused()
        assert tokens.nth(at).get_attribute("aria-selected") == "true"
    page.keyboard.press("Alt+ArrowRight")  # the browser's
    playwright.expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("Tab")  # all tokens are one stop
    playwright.expect(page.locator("#question")).to_be_focused()
    names = page.locator("button:visible, input:visible, select:visible, textarea:visible").evaluate_all(
        "all => all.map((x) => x.ariaLabel || x.textContent.trim() || [...x.labels].map((y) => y.textContent).join())"
    )
    assert len(names) > 5 and all(names)


def test_the_focus_is_seen(visit):
    """A file is chosen by a field out of sight; the label that is seen in its place has the ring, and nothing else."""
    page = visit().page
    for focused in ("open", "pictures"):
        page.locator("#new" if focused == "open" else "#question").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == focused
        ringed = page.locator("button, .button").evaluate_all(
            "all => all.filter((x) => getComputedStyle(x).outlineStyle !== 'none').map((x) => x.htmlFor)"
        )
        assert ringed == [focused]


def test_what_was_saved_is_shown_without_an_answer(answered, visit, tmp_path):
    before, text = answered
    (turn,) = json.loads(text)["turns"]
    assert turn["pictures"] == [{"name": "a<b>.png", "url": data_url(PICTURE)}] and len(turn["look"]["tokens"]) == 12
    assert turn["model"] == "tiny"
    (tmp_path / "a.json").write_text(text.replace('"model":"tiny"', '"model":"another"'))
    after = visit()
    after.page.locator("#open").set_input_files(tmp_path / "a.json")
    after.says("opened; another gave the answers")
    assert after.tokens().all_text_contents() == before.tokens().all_text_contents()
    for one in (before, after):
        one.tokens().nth(7).hover()
        for name in ("layer", "head"):
            one.page.locator(f"#{name}").select_option("mean")
        one.page.locator("#view").select_option("all")
    assert np.array_equal(opacity(before.page), opacity(after.page))
    assert after.page.locator("#likeliest").inner_text() == before.page.locator("#likeliest").inner_text()
    assert after.page.locator(".question").inner_text() == "what is <i>this</i>?"
    assert not [request for request in after.requests if request.method == "POST"]
    after.ask("and now?", 3)  # the conversation goes on
    assert after.tokens().count() == 3 and after.page.locator(".turn").count() == 2
    asked = json.loads(next(r for r in after.requests if r.url.endswith("completions")).post_data)["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "user"]
    assert asked[0]["content"][0]["image_url"]["url"] == data_url(PICTURE)
    assert after.page.locator("#shown img").count() == 1
    again = json.loads(after.save())["turns"]
    assert [turn["model"] for turn in again] == ["another", "tiny"] and again[0]["ids"] == turn["ids"]


@pytest.mark.parametrize("width", [1000, 360])
def test_the_end_of_a_long_conversation_is_in_sight(answered, visit, tmp_path, width):
    """That of a file, of which a token is chosen, and what is said below. A picture above the turns hides no token."""
    data = json.loads(answered[1])
    data["turns"] += [data["turns"][0] | {"pictures": []} for _ in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(data))
    here = visit()
    here.page.set_viewport_size({"width": width, "height": 640})
    here.page.locator("#open").set_input_files(tmp_path / "a.json")
    here.says("opened; ")

    def stands_below(token):
        here.page.wait_for_timeout(100)  # for the picture to have its height
        look, box = here.page.locator("#look").bounding_box(), token.bounding_box()
        return box["y"] >= (look["y"] + look["height"] - 1 if width == 360 else 0)

    first, another = here.tokens().nth(0), here.page.locator(".turn").nth(4).locator(".token").nth(0)
    assert first.get_attribute("aria-selected") == "true" and stands_below(first)
    last = here.page.locator(".turn:last-child").bounding_box()
    assert last["y"] + last["height"] < 641
    if width == 1000:
        playwright.expect(here.page.locator("#status")).to_be_in_viewport(ratio=1)
    another.evaluate("token => scrollBy(0, token.getBoundingClientRect().y - 60)")
    another.evaluate("token => token.focus()")
    assert stands_below(another)
    here.page.route("**/completions", lambda _route: None)  # never answered
    here.ask("and now?")
    playwright.expect(here.page.locator("#stop")).to_be_in_viewport(ratio=1)
    playwright.expect(here.page.locator("#status")).to_be_in_viewport(ratio=1)


def damage(text):
    """Yield files that are not what was saved, each with what is said of it."""

    def changed(*keys, to):
        data = copy.deepcopy(json.loads(text))
        at = data
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to
        return json.dumps(data)

    look = ("turns", 0, "look")
    yield "{", "it is not JSON"
    yield "[]", "its format is not"
    yield changed("version", to=2), "its format is not"
    yield changed("turns", to={}), "it has no turns"
    yield changed("turns", to=[]), "it has no turns"
    yield changed("turns", 0, "answer", to=["<b>"]), "a turn has no answer"
    yield changed("turns", 0, "model", to=None), "a turn has no model"
    yield changed("turns", 0, "ids", to=["5"]), "a turn has no tokens"
    yield changed("turns", 0, "pictures", 0, "url", to="https://example.com/a.png"), "a picture is not in the file"
    yield changed("turns", 0, "pictures", 0, "url", to="data:image/svg+xml;base64,AAAA"), "a picture is not in the file"
    yield changed("turns", 0, "pictures", 0, "url", to="data:image/png;base64,AAAA"), "a<b>.png cannot be shown"
    yield changed("turns", 0, "pictures", to=[]), "what was looked at are other pictures"
    yield changed("turns", 0, "pictures", 0, "url", to=[data_url(PICTURE)]), "a picture is not in the file"
    yield changed(*look, "version", to=9), "it has no version 1"
    yield changed(*look, "grid", to=3), "bytes, not"
    yield changed(*look, "grid", to=1e9), "tiles"
    yield changed(*look, "tiles", 0, "image", to=1), "tiles"
    yield changed(*look, "tiles", 0, "box", to=[0, 0, "1", 1]), "tiles"
    yield changed(*look, "tiles", 0, "box", to=[0, 0, 1e-200, 1e-200]), "tiles"
    yield changed(*look, "tokens", to=[]), "tokens"
    yield changed(*look, "tokens", 0, "logprob", to=700), "tokens"
    yield changed(*look, "tokens", 0, "likeliest", 0, to=[1, {}, 0]), "alternatives"
    yield changed(*look, "tokens", 0, "likeliest", 0, 2, to=700), "alternatives"
    yield changed(*look, "attention", "layers", to=-1), "layers and heads"
    yield changed(*look, "attention", "weights", to="*"), "is not in base64"
    yield changed(*look, "attention", "peaks", to=base64.b64encode(b"\xff" * 4 * 2 * 4 * 12).decode()), "are no shares"
    yield changed(*look, "experts", "chosen", 0, 0, to=[7]), "experts"
    for name, rows in json.loads(text)["turns"][0]["look"]["experts"].items():
        if name != "count":  # what has a length and indices, but is no list
            yield changed(*look, "experts", name, to=dict(enumerate(rows), length=12)), "experts"
            yield changed(*look, "experts", name, 0, to=dict(enumerate(rows[0]), length=2)), "experts"
            yield changed(*look, "experts", name, 0, 0, to=dict(enumerate(rows[0][0]), length=2)), "experts"
    yield changed(*look, "images", 0, "width", to=0), "images"


def test_files_of_strangers(answered, visit, tmp_path):
    """What does not fit together is refused in one sentence; what fits is shown as text, whatever it holds."""
    here = visit()
    for number, (text, message) in enumerate(damage(answered[1])):
        (tmp_path / f"{number}.json").write_text(text)
        here.page.locator("#open").set_input_files(tmp_path / f"{number}.json")
        here.says(message)
        assert here.page.locator(".turn").count() == 0
    data, evil = json.loads(answered[1]), "<img src=x onerror=alert(1)><script>alert(2)</script>"
    turn = data["turns"][0]
    turn["model"] = turn["question"] = turn["answer"] = turn["counts"] = turn["pictures"][0]["name"] = evil
    for token in turn["look"]["tokens"]:
        token["text"] = token["likeliest"][0][1] = evil
    (tmp_path / "evil.json").write_text(json.dumps(data))
    here.page.on("dialog", lambda dialog: here.complaints.append("it ran"))
    here.page.locator("#open").set_input_files(tmp_path / "evil.json")
    here.says(evil)
    assert here.tokens().all_text_contents() == [evil] * 12
    assert here.page.locator("main script, main [onerror]").count() == 0


def test_an_answer_streams_and_can_be_stopped(visit, mixture):
    model, processor = mixture
    words = processor.encode_answer("a red circle <b> & a blue star. " * 100)
    engine = FakeEngine(lambda *_: words, pace=0.01)
    engine.model = model
    with running(processor, engine) as slow:
        here = visit(slow)
        here.page.evaluate(GIVE, ["paste", data_url(PICTURE), "a.png"])
        playwright.expect(here.page.locator("#pending img")).to_have_count(1)
        here.ask("what?", len(words))
        answer = here.page.locator(".answer")
        playwright.expect(answer).to_contain_text("<b> & a blue")
        assert here.page.locator("#stop").is_visible() and here.page.locator("#send").is_hidden()
        # Escape that is an input method's is not the page's.
        here.page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', isComposing: true}))")
        playwright.expect(answer).to_contain_text("<b> & a blue star. a red")
        assert here.page.locator("#stop").is_visible()
        here.page.keyboard.press("Escape")
        num = here.tokens().count()
        assert 0 < num < len(words) and answer.text_content() == processor.decode(words[:num])
        playwright.expect(here.page.locator(".counts")).to_contain_text("; stopped")
        playwright.expect(here.page.locator("#question")).to_be_focused()
        engine.leave.clear()  # now nothing comes: the question is given back
        here.ask("and then?", len(words))
        playwright.expect(here.page.locator(".turn")).to_have_count(2)
        here.page.locator("#stop").click()
        here.says("stopped")
        playwright.expect(here.page.locator("#send")).to_be_focused()  # in the place of the button that went away
        assert here.page.locator("#question").input_value() == "and then?"
        assert here.page.locator(".turn").count() == 1 and here.tokens().count() == num
        engine.leave.set()
        here.page.locator("#new").click()
        assert here.page.locator(".turn").count() == 0 and here.page.locator("#look").is_hidden()


def test_what_came_before_an_error_is_kept(visit, mixture, tmp_path):
    model, processor = mixture
    words = processor.encode_answer("a red circle. " * 100)
    engine = FakeEngine(lambda *_: words, pace=0.02)
    engine.model = model
    with running(processor, engine, timeout=2) as slow:
        here = visit(slow)
        here.ask("what?", len(words))
        playwright.expect(here.page.locator(".counts")).to_contain_text("; too late")  # as the server says it
        num = here.tokens().count()
        assert 0 < num < len(words)
        counts = here.page.locator(".counts").text_content()
        assert 0 < float(re.search(r"([0-9.]+) tokens a second, the first after", counts)[1]) < 50
        (tmp_path / "a.json").write_text(here.save())
    (kept,) = json.loads((tmp_path / "a.json").read_text())["turns"]
    assert kept["answer"] == processor.decode(words[:num]) and kept["ids"] == words[:num] and kept["finish"] == "error"
    here.page.locator("#open").set_input_files(tmp_path / "a.json")
    here.says("opened; ")
    playwright.expect(here.page.locator(".counts")).to_contain_text("; too late")
    playwright.expect(here.page.locator(".counts")).to_have_css("color", "rgb(176, 0, 32)")


def test_a_server_that_is_gone(visit, mixture):
    """It is said in the same words in all browsers, before an answer as in the midst of one."""
    model, processor = mixture
    words = processor.encode_answer("a red circle. " * 100)
    engine = FakeEngine(lambda *_: words, pace=0.02)
    engine.model = model
    with running(processor, engine) as leaving:
        here = visit(leaving)
        here.ask("what?", len(words))
        playwright.expect(here.page.locator(".answer")).to_contain_text("a red circle")
    playwright.expect(here.page.locator(".counts")).to_contain_text("; the connection to the server was lost")
    here.says("the server cannot be reached")  # to look at what came
    here.ask("and then?")
    playwright.expect(here.page.locator("#question")).to_have_value("and then?")
    here.says("the server cannot be reached")
    assert all("Failed to load resource" in text for text in here.complaints), here.complaints
    here.complaints.clear()


def test_what_comes_together_has_no_speed(visit):
    """It was computed before the first piece was there."""
    here = visit()
    pieces = [{"choices": [{"delta": {"content": "a"}, "token_ids": [5], "finish_reason": None}]} for _ in range(32)]
    pieces[-1]["choices"][0]["finish_reason"] = "stop"
    body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
    here.page.route("**/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    here.ask("what?")
    assert here.tokens().count() == 32
    assert here.page.locator(".counts").text_content().startswith("32 tokens, the first after ")


def test_another_conversation_begins_while_it_looks(answered, visit, tmp_path):
    """What is said then is of the new one, not that the old one was stopped."""
    (tmp_path / "a.json").write_text(answered[1])
    here = visit()
    here.page.route("**/v1/look", lambda _route: None)  # never answered
    for begin, said in (
        (lambda: here.page.locator("#open").set_input_files(tmp_path / "a.json"), "opened; tiny gave the answers"),
        (lambda: here.page.locator("#new").click(), ""),
    ):
        here.ask("why?", 2)
        here.says("looking…")
        begin()
        playwright.expect(here.page.locator("#send")).to_be_visible()
        here.page.wait_for_timeout(100)  # for what the old one still says
        assert here.page.locator("#status").text_content() == said


def test_text_is_dropped_into_the_question(visit):
    """Only files are taken by the page: what is done with all else is up to the browser."""
    page = visit().page
    page.locator("#hint").select_text()
    page.locator("#hint").drag_to(page.locator("#question"), source_position={"x": 40, "y": 10})
    assert "Drop a picture anywhere" in page.locator("#question").input_value()
    assert page.locator("#drop").is_hidden()


def test_text_is_pasted_without_its_picture(visit):
    """Office programs give text as a picture, too; file managers give a file's name, too."""
    page = visit().page
    for name, texts in (
        ("office.png", ["text/plain", "text/html"]),
        ("file.png", ["text/plain"]),
        ("web.png", ["text/html"]),
    ):
        page.evaluate(GIVE, ["paste", data_url(PICTURE), name, texts])
    playwright.expect(page.locator("#pending img")).to_have_count(2)
    assert sorted(page.locator("#pending img").evaluate_all("all => all.map((x) => x.alt)")) == ["file.png", "web.png"]


def test_what_the_server_refuses_is_said(visit, server):
    here = visit()
    data = base64.b64decode(data_url(PICTURE).split(",")[1])  # half of it is enough for a browser
    here.page.locator("#pictures").set_input_files(
        [{"name": "a.png", "mimeType": "image/png", "buffer": data[: len(data) // 2]}]
    )
    playwright.expect(here.page.locator("#pending img")).to_have_count(1)
    here.ask("what?")
    here.says("image 1 cannot be read as an image")
    assert here.page.locator("#question").input_value() == "what?" and here.page.locator(".turn").count() == 0
    here.page.get_by_label("Remove a.png").click()
    assert here.page.locator("#pending img").count() == 0
    assert [text for text in here.complaints if "400 (Bad Request)" not in text] == []
    here.complaints.clear()


def test_without_a_picture_there_are_alternatives(visit):
    """And nothing else: no lists of layers and heads, and no place for a picture."""
    here = visit()
    here.ask("why?", 2)
    assert here.tokens().count() == 2 and here.page.locator("#shown img").count() == 0
    assert "likely." in here.page.locator("#about").text_content()
    assert here.page.locator("#layer").is_hidden() and here.page.locator("#head").is_hidden()
    assert here.page.locator("#likeliest li").count() == 10
    here.page.set_viewport_size({"width": 360, "height": 640})
    assert here.page.locator("#about").bounding_box()["width"] > 300


def test_what_cannot_be_shown_is_not_taken(visit):
    here = visit()
    tiff = io.BytesIO()
    PICTURE.save(tiff, "TIFF")
    for name, kind, data, said in (
        ("a.txt", "text/plain", b"text", "a.txt is no picture that can be shown"),
        ("b.png", "image/png", b"text", "b.png cannot be shown"),
        ("c.tif", "image/tiff", tiff.getvalue(), "c.tif cannot be shown"),
    ):
        here.page.locator("#pictures").set_input_files([{"name": name, "mimeType": kind, "buffer": data}])
        here.says(said)
        assert here.page.locator("#pending img").count() == 0


def test_a_question_has_words(visit):
    here = visit()
    here.page.evaluate(GIVE, ["drop", data_url(PICTURE), "a.png"])
    playwright.expect(here.page.locator("#pending img")).to_have_count(1)
    here.page.locator("#send").click()
    here.says("write a question")
    playwright.expect(here.page.locator("#question")).to_be_focused()
    assert here.page.locator(".turn").count() == 0 and here.page.locator("#pending img").count() == 1


def test_options(visit):
    """One that was emptied is as at first; what the server refuses is said, though the options are folded."""
    here = visit()
    for name in ("temperature", "max_tokens", "seed"):
        here.page.evaluate("name => document.getElementById(name).value = ''", name)
    here.page.locator("#question").fill("why?")
    with here.page.expect_request("**/completions") as asked:
        here.page.locator("#send").click()
    body = json.loads(asked.value.post_data)
    assert body["temperature"] == 0 and body["max_tokens"] == 128 and "seed" not in body
    assert here.page.locator("#temperature").input_value() == "0"
    here.tokens()
    here.page.evaluate("document.getElementById('top_p').value = 7")
    here.page.locator("#question").fill("and then?")
    here.page.locator("#send").click()
    here.says("top_p")
    assert here.page.locator("#question").input_value() == "and then?"
    assert [text for text in here.complaints if "400 (Bad Request)" not in text] == []
    here.complaints.clear()


def test_a_server_with_a_token(visit, mixture):
    with running(mixture[1], Engine(mixture[0], num_rows=1), token="secret") as closed:
        here = visit(closed)
        here.says("the server asks for its token: see Options")
        here.page.locator("summary").click()
        here.page.get_by_label("Token of the server").fill("secret")
        here.page.keyboard.press("Tab")
        playwright.expect(here.page.locator("#model")).to_have_text("tiny")
        here.ask("why?", 2)
        assert here.tokens().count() == 2
        assert [text for text in here.complaints if "401 (Unauthorized)" not in text] == []
        here.complaints.clear()


def test_light_and_dark(answered, visit, tmp_path):
    data = json.loads(answered[1])
    for number, text in enumerate(("", "a")):  # a part of a character, and a text
        data["turns"][0]["look"]["tokens"][number]["text"] = text
    (tmp_path / "a.json").write_text(json.dumps(data))
    here = visit(color_scheme="dark")
    here.page.locator("#open").set_input_files(tmp_path / "a.json")

    def brightness():
        """Return that of the page; the token that is chosen stands out, whatever it is, and so do hints."""
        for number in (0, 1):
            here.tokens().nth(number).hover()
            assert abs(shade(here.tokens().nth(number), "color") - shade(here.tokens().nth(number))) > 300
        field = here.page.locator("#question")
        assert abs(shade(field, "color", "::placeholder") - shade(field)) > 300
        return shade(here.page.locator("body"))

    def shade(element, name="backgroundColor", part=None):
        color = element.evaluate("(x, [name, part]) => getComputedStyle(x, part)[name]", [name, part])
        return sum(map(int, color.strip("rgb()").split(", ")))

    assert brightness() < 150
    here.page.get_by_label("Colors").select_option("light")
    assert brightness() > 700
    here.page.reload()
    here.page.locator("#open").set_input_files(tmp_path / "a.json")
    assert brightness() > 700
    here.page.get_by_label("Colors").select_option("dark")
    here.page.emulate_media(color_scheme="light")
    assert brightness() < 150


def test_a_browser_that_keeps_nothing(visit):
    here = visit(script="Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied') }})")
    playwright.expect(here.page.locator("#model")).to_have_text("tiny")
    here.page.get_by_label("Colors").select_option("dark")
    assert here.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"


def test_it_fits_a_phone(answered, visit, tmp_path):
    (tmp_path / "a.json").write_text(answered[1])
    here = visit(has_touch=True)
    here.page.set_viewport_size({"width": 360, "height": 640})
    here.page.locator("#open").set_input_files(tmp_path / "a.json")
    here.tokens().nth(3).tap()
    assert here.tokens().nth(3).get_attribute("aria-selected") == "true"
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert here.page.locator("#shown canvas").bounding_box()["width"] > 90
    assert heat_lies_on_pictures(here.page)
