"""A folder of pictures is indexed and searched by texts and pictures, and what is found is drawn."""

import json

import pytest
import torch
from PIL import Image

from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.search.__main__ import main
from nanovlm.search.index import open_index
from nanovlm.search.sheet import draw_sheet
from tests.conftest import TINY, noise
from tests.search.test_embed import make_dual

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory, processor):
    """A folder of pictures, one of them no picture and one cut off, and its index by a tiny dual model."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in" / "deep").mkdir(parents=True)
    for i in range(6):
        noise(i, size=20 + i).save(folder / "in" / f"{i}.png")
    noise(9, size=33).save(folder / "in" / "deep" / "x.jpg")
    (folder / "in" / "no.png").write_bytes(b"no picture")
    (folder / "in" / "cut.png").write_bytes((folder / "in" / "5.png").read_bytes()[:300])
    (folder / "in" / "notes.txt").write_text("not a picture's name")
    model, processor = make_dual(folder / "model", processor)
    main(["index", str(folder / "in"), str(folder / "out"), "--model", str(folder / "model"), "--dtype", "fp32"])
    return folder, model, processor


def test_what_cannot_be_read_is_counted_and_named(made, capsys):
    folder = made[0]
    main(["index", str(folder / "in"), str(folder / "out"), "--model", str(folder / "model"), "--dtype", "fp32"])
    printed = capsys.readouterr().out
    assert "7 items of 9 files: 9 as before, 2 unreadable" in printed
    assert "not read: cut.png cannot be read" in printed and "not read: no.png cannot be read" in printed


@torch.inference_mode()
def test_pictures_are_found_in_the_order_of_their_cosines(made, capsys):
    folder, model, processor = made
    main(["query", str(folder / "out"), "a red circle", "-k", "4", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "deep/x.jpg"]
    images = model.embed_images(processor.encode_images([Image.open(folder / "in" / name) for name in names]))
    scores = (images @ model.embed_texts(processor.encode_texts(["a red circle"])).T)[:, 0]
    best = scores.sort(descending=True)
    assert [match["file"] for match in found] == [names[i] for i in best.indices[:4]]
    assert [match["score"] for match in found] == pytest.approx(best.values[:4].tolist(), abs=1e-5)


def test_a_picture_finds_itself_and_is_drawn(made, capsys, tmp_path):
    folder = made[0]
    picture, sheet = str(folder / "in" / "deep" / "x.jpg"), tmp_path / "sheet.png"
    main(["query", str(folder / "out"), "--image", picture, "-k", "9", "--sheet", str(sheet)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1  1.0000  deep/x.jpg" and len(lines) == 7
    drawn = Image.open(sheet)
    assert drawn.format == "PNG" and drawn.width > 900 and drawn.height > 600


def test_a_sheet_shows_the_pictures():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    import io

    def count(sheet: bytes, color):
        return sum(n for n, c in Image.open(io.BytesIO(sheet)).getcolors(2**20) if c == color)

    found = [(red, "a" * 200 + ".png", 0.5)] * 7
    assert count(draw_sheet("red \x1b", None, found), (255, 0, 0)) == 7 * 192**2
    with_query = draw_sheet("q", blue, found[:1])
    assert count(with_query, (0, 0, 255)) == count(with_query, (255, 0, 0)) == 192**2


def test_mistakes_are_named(made, tmp_path, processor):
    folder, out = made[0], str(made[0] / "out")
    for arguments, words in (
        (["query", out], "search for a text or for a picture"),
        (["query", out, "a", "--image", "b.png"], "and not for both"),
        (["query", out, "a", "-k", "0"], "-k 0 must be at least 1"),
        (["query", out, "a", "--sheet", "a.jpg"], "end in .png"),
        (["query", str(tmp_path), "a"], "has no index"),
        (["find", out], "there is no command 'find'; there are index, index-documents, query"),
    ):
        with pytest.raises(UserError, match=words.replace(".", r"\.")):
            main(arguments)
    blind = TINY.__class__(decoder=TINY.decoder, vision=None, image_token_id=None)
    processor = processor.__class__(processor.tokenizer, processor.chat_template, blind)
    save_model(tmp_path / "blind", VLM(blind), processor)
    with pytest.raises(UserError, match="is a language model, which sees no pictures"):
        main(["index", str(folder / "in"), str(tmp_path / "new"), "--model", str(tmp_path / "blind")])
    with pytest.raises(UserError, match="is not the model of the index"):
        main(["query", out, "a", "--model", str(tmp_path / "blind")])


def test_an_index_says_where_it_is_from(made):
    folder, about = made[0], open_index(made[0] / "out").about
    assert about["folder"] == str(folder / "in") and about["model"] == str(folder / "model")
    assert about["kind"] == "pictures" and about["dtype"] == "float32" and len(about["fingerprint"]) == 64
