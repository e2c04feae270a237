"""`python -m nanovlm.data.documents`: the same files each time, fonts of one's own, and web pages."""

import json
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import get_data_path

from nanovlm.data.documents import __main__ as command
from nanovlm.data.documents import fonts, web
from nanovlm.data.documents.__main__ import DocumentsConfig, main
from nanovlm.data.documents.page import Page
from nanovlm.data.documents.words import Words
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.eval.tasks import open_records, read_questions


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_writes_what_training_reads(tmp_path, capsys):
    """Another process draws the same: Python's hashes of strings differ there."""
    kinds = ("form", "text", "form")
    main(DocumentsConfig(tmp_path / "alone", train=5, test=3, kinds=kinds))
    assert "wrote 5 pictures for training and 3 for tests" in capsys.readouterr().out
    main(DocumentsConfig(tmp_path / "workers", train=5, test=3, kinds=kinds, num_workers=1))
    written = files(tmp_path / "alone")
    assert written == files(tmp_path / "workers") and "sheet.png" in written
    main(DocumentsConfig(tmp_path / "seed", train=5, test=0, kinds=kinds, seed=1))
    assert files(tmp_path / "seed")["train/000000.png"] != written["train/000000.png"]

    source = open_source(str(tmp_path / "alone" / "train"))
    assert [source.read(ref.key)["template"].split("/")[0] for ref in first_pass(source)] == ["form", "text"] * 2 + [
        "form"
    ]
    questions = read_questions(open_records(str(tmp_path / "alone" / "test"), 10, metrics=("exact_match",)))
    assert {q.kind for q in questions} == {"form", "text"} and {q.record for q in questions} == {0, 1, 2}
    account = json.loads(written["documents.json"])
    assert account["splits"]["test"]["templates"] == {"form/card": 2, "text/note": 1}
    assert sum(account["splits"]["test"]["questions"].values()) == len(questions)
    assert account["what"] == "drawn documents, not scanned ones" and account["versions"].keys() == {
        "pillow",
        "matplotlib",
    }


def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "photographs", lambda: None)
    monkeypatch.setattr(web, "find_browser", lambda: None)
    with pytest.raises(
        UserError, match=r"web cannot be drawn: there is no headless Chromium: apt-get install chromium"
    ):
        main(DocumentsConfig(tmp_path / "out", kinds=("web",)))
    with pytest.raises(UserError, match=r"--kinds 'recipe' is no kind of document; there are letter, form, receipt"):
        main(DocumentsConfig(tmp_path / "out", kinds=("recipe",)))
    with pytest.raises(UserError, match="--train -1, --test 200 and --num-workers 0 must be at least 0"):
        main(DocumentsConfig(tmp_path / "out", train=-1))
    with pytest.raises(UserError, match="web pages need a browser"):
        web.take_pictures(["<p>"], ())
    main(DocumentsConfig(tmp_path / "out", train=1, test=0))
    assert "left out: sign: the photographs of scikit-image are not there" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "documents.json").read_text())["left_out"].keys() == {"sign", "web"}
    with pytest.raises(UserError, match="is there already: name a new folder"):
        main(DocumentsConfig(tmp_path / "out"))


def test_fonts_that_are_left_out_are_in_the_account(tmp_path, capsys):
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"no font")
    main(DocumentsConfig(tmp_path / "out", train=1, test=0, kinds=("text",), fonts=(str(tmp_path / "fonts"),)))
    account = json.loads((tmp_path / "out" / "documents.json").read_text())
    assert account["fonts_left_out"] == {"broken.ttf": "it cannot be read"}
    assert "left out: 1 fonts, such as broken.ttf: it cannot be read" in capsys.readouterr().out


def test_workers_draw_no_more_than_can_be_written(monkeypatch):
    """A pool hands all pictures that wait to the one process that writes, which is slower, and has to hold them."""
    drawn = []

    class Pool:
        def __init__(self, _number):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            pass

        def map(self, draw, places, chunksize):
            drawn.extend(places)
            return [draw(place) for place in places]

        def imap(self, draw, places, chunksize):
            return iter(self.map(draw, places, chunksize))

    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _name: SimpleNamespace(Pool=Pool))
    monkeypatch.setattr(command, "draw_one", lambda place, **_how: place)
    config = DocumentsConfig(Path("out"), num_workers=2)
    drawings = command.draw_all("train", 1000, ("text", "form"), config, {})
    assert next(drawings) == ("text", ("text", 0)) and len(drawn) <= 200
    assert [place for _kind, place in drawings] == [("text" if i % 2 == 0 else "form", i // 2) for i in range(1, 1000)]


# --- fonts ------------------------------------------------------------------------------------------------------------


def rename(file, name, style="Regular", wider=1.0):
    """Write a font of matplotlib's under another name, with more room for each letter."""
    from fontTools.ttLib import TTFont

    font = TTFont(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if style == 'Bold' else ''}.ttf")
    for record in font["name"].names:
        record.string = {1: name, 2: style, 4: f"{name} {style}", 16: name, 17: style}.get(
            record.nameID, record.toUnicode()
        )
    metrics = font["hmtx"].metrics
    metrics |= {letter: (round(wider * width), left) for letter, (width, left) in metrics.items()}
    font.save(file)


def test_a_font_that_is_wider_than_ours_is_left_out(tmp_path):
    """Its texts would not fit the pages, and a drawing of thousands would end with an error."""
    rename(tmp_path / "wide.ttf", "Wide", wider=1.6)
    assert fonts.read_families([str(tmp_path)]) == (fonts.own_families(), {"wide.ttf": "it is wider than all of ours"})
    wide = fonts.Family("Wide", tmp_path / "wide.ttf", tmp_path / "wide.ttf")
    with pytest.raises(UserError, match="pixels in Wide, and has 100: leave that font out of --fonts"):
        Page(Random(0), wide).write(0, 0, "a word that is too long", 100)


def test_fonts_of_ones_own_have_a_split_by_their_name(tmp_path):
    names = ["Alpha", "Beta", "Gamma", "Delta"]
    for name in names:
        rename(tmp_path / f"{name}.ttf", name)
    rename(tmp_path / "bold.ttf", "Alpha", "Bold")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    own, (found, left_out) = fonts.own_families(), fonts.read_families([str(tmp_path)])
    assert left_out == {"broken.ttf": "it cannot be read"}
    new = {split: [family for family in found[split] if family not in own[split]] for split in found}
    assert {split: [family.name for family in new[split]] for split in new} == {
        split: [name for name in sorted(names) if fonts.split_of(name) == split] for split in new
    }
    (alpha,) = [family for families in new.values() for family in families if family.name == "Alpha"]
    assert alpha.regular.name == "Alpha.ttf" and alpha.bold.name == "bold.ttf"
    assert all(family.bold == family.regular for f in new.values() for family in f if family.name != "Alpha")
    one = fonts.read_families([str(tmp_path / "Beta.ttf")])[0][fonts.split_of("Beta")]
    assert one[-1].name == "Beta", "whatever else is beside it"


def test_splits_of_families():
    """A relative of one of ours stays on its side; the others fall as their names do."""
    splits = [fonts.split_of(f"family {i}") for i in range(1000)]
    assert 200 < splits.count("test") < 300
    related = {"DejaVu Sans Light": "train", "STIX Two Text": "test", "Aileron Black": "test", "cmr10": "train"}
    assert {name: fonts.split_of(name) for name in related} == related


def test_fonts_that_are_no_use_are_left_out(tmp_path):
    """Those of matplotlib are known already, wherever they are, or lack letters; a path without a font is a mistake."""
    own = fonts.own_families()
    families, left_out = fonts.read_families([f"{get_data_path()}/fonts/ttf"])
    assert families == own and {*left_out.values()} == {"it is one of ours"}
    for name in ("STIXGeneral", "DejaVuSans", "STIXNonUni", "DejaVuSansDisplay", "cmb10"):
        shutil.copy(f"{get_data_path()}/fonts/ttf/{name}.ttf", tmp_path)
    families, left_out = fonts.read_families([str(tmp_path)])
    assert families == own and left_out["STIXNonUni.ttf"].startswith("it lacks the letters ")
    assert left_out["DejaVuSans.ttf"] == "it is one of ours" and len(left_out) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"--fonts .*empty names no font: give a file .ttf or .otf, a folder, or system"
    ):
        fonts.read_families([str(tmp_path / "empty")])


# --- web pages --------------------------------------------------------------------------------------------------------


def test_a_screenshot_is_cut_at_its_strips():
    heights, pixels = (30, 50, 20), np.full((200, web.EDGE + web.WIDTH, 3), 255, np.uint8)
    top = 0
    for number, height in enumerate((*heights, web.EDGE)):
        pixels[top : top + height, : web.EDGE] = web.COLORS[2 if number == 3 else number % 2]
        pixels[top : top + height, web.EDGE :] = 10 * number
        top += height
    images = web.cut(pixels, 3)
    assert [image.size for image in images] == [(web.WIDTH, height) for height in heights]
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 10, 20]
    for wrong in (2, 4):
        with pytest.raises(UserError, match=f"does not show {wrong} pages whole"):
            web.cut(pixels, wrong)
    with pytest.raises(UserError, match="does not show 3 pages whole"):
        web.cut(pixels[:100], 3)  # the last strip is missing


def test_answers_are_on_the_web_pages():
    for split, seed in (("train", 0), ("train", 1), ("train", 2), ("test", 0), ("test", 1)):
        rng = Random(seed)
        page, asked, template = web.write_page(rng, Words(rng, split), fonts.own_families()[split][0])
        assert template in web.PAGES[split] and len(asked) >= 6
        assert all(answer in " ".join(page.split()) for _kind, _question, answer in asked)
        if template == "product":  # whose color is asked for, and stands in words
            assert "linear-gradient(#bbb,#eee)" in page
    assert not web.PAGES["train"].keys() & web.PAGES["test"].keys()


@pytest.mark.skipif(web.find_browser() is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_web_pages_in_the_fonts_of_the_split():
    """The same page in two fonts differs, and in one font it does not; all of it is on white paper."""
    families = [*fonts.own_families()["train"][:2], fonts.own_families()["train"][0]]
    pages = []
    for family in families:
        rng = Random("page")
        pages.append((*web.write_page(rng, Words(rng, "train"), family), family))
    first, other, again = web.draw_pages(pages)
    assert first.image.width == web.WIDTH and 150 < first.image.height <= 512
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert (np.asarray(first.image).min(-1) > 240).mean() > 0.3
