"""The command that says what the embeddings of a dual model are good for: a model that sees colors, and a real one."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from nanovlm.config import DualConfig, TextConfig, VisionConfig
from nanovlm.data.dual import DualProcessor, train_text_tokenizer
from nanovlm.data.scenes import HELD_OUT
from nanovlm.errors import UserError
from nanovlm.eval import dual
from nanovlm.eval.dual import DualEvalConfig, main
from nanovlm.hub.dual import save_dual
from nanovlm.model.dual import Dual

pytestmark = pytest.mark.usefixtures("one_thread")
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "dark red": (90, 0, 0), "gray": (90, 90, 90)}


class SeesColors(nn.Module):
    """Embeds the first pixel of a picture, and the color that a text names; nothing else of it."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def embed_images(self, pixels):
        return F.normalize(pixels.float() + 1, dim=-1)

    def embed_texts(self, pixels):
        return self.embed_images(pixels)


class NamesColors:
    def encode_images(self, images):
        return torch.tensor([image.getpixel((0, 0)) for image in images])

    def encode_texts(self, texts):
        return torch.tensor([next(COLORS[name] for name in sorted(COLORS, key=len)[::-1] if name in t) for t in texts])


@pytest.fixture
def sees_colors(monkeypatch):
    monkeypatch.setattr(dual, "load_dual", lambda name, device: (SeesColors(), NamesColors()))


@pytest.fixture
def photos(tmp_path):
    """Folders of classes, among them pictures that are of another color than their class says."""
    for split in ("train", "test"):
        for name in ("red", "green", "blue"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                shown = "gray" if split == "test" and name == "blue" and i < 2 else name
                Image.new("RGB", (8, 8), COLORS[shown]).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_classes_are_told_by_their_names_and_by_probes(sees_colors, photos, capsys):
    spec = str(photos / "test")
    config = DualEvalConfig("", classify=(spec,), train=str(photos / "train"), templates=("a {} one.", "{}"), json=True)
    results = main(config)
    assert json.loads(capsys.readouterr().out) == results
    figures = results[f"{spec}, classes"]
    assert figures.keys() == {"n", "zero_shot_top_1", "knn_top_1", "linear_top_1"} and figures["n"] == 18
    # Gray is as near to all three, a tie, which is a miss; a probe takes one of them, of which blue is right.
    assert figures["zero_shot_top_1"] == pytest.approx(16 / 18)
    assert all(figures[key] >= 16 / 18 for key in ("knn_top_1", "linear_top_1"))


def test_captions_are_retrieved_and_equal_ones_count_once(sees_colors, tmp_path):
    records = []
    for i, name in enumerate(["red", "green", "blue", "red", "gray"]):
        Image.new("RGB", (8, 8), COLORS[name]).save(tmp_path / f"{i}.png")
        answers = [f"a {name} one", f"it is {name}"] if name == "green" else [f"a {name} one"]
        records.append({"image": f"{i}.png", "question": "what?", "answers": answers})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    spec = str(tmp_path / "captions.jsonl")
    figures = main(DualEvalConfig("", retrieve=(spec,)))[f"{spec}, retrieval"]
    assert figures == {"n": 4} | {f"{way}_{k}": 1.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


def test_drawn_scenes_of_one_object_are_classified_and_held_out_pairs_are_what_is_shown():
    read = {spec: [*dual.read(spec, DualEvalConfig("", limit=40))] for spec in dual.SPLITS}
    for spec, pictures in read.items():
        found = [match[1] for _, texts in pictures if (match := dual.ONE_OBJECT.fullmatch(texts[0]))]
        assert 3 < len(found) < 40 and {*found} <= {*dual.SCENE_CLASSES}
        is_held_out = [any(name == f"a {color} {shape}" for color, shape in HELD_OUT) for name in found]
        assert all(is_held_out) if spec == "scenes:compositional" else not any(is_held_out)
    texts = {template.replace("{}", name) for name in dual.SCENE_CLASSES for template in dual.SCENE_TEMPLATES}
    assert {texts[0] for _, texts in read["scenes"] if dual.ONE_OBJECT.fullmatch(texts[0])} <= texts
    train, test = ([*dual.read("scenes", DualEvalConfig("", limit=3), is_train)] for is_train in (True, False))
    assert all(a.tobytes() != b.tobytes() for (a, _), (b, _) in zip(train, test, strict=True))


def test_a_stored_model_is_measured_on_drawn_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dual, "SCENE_TEMPLATES", dual.SCENE_TEMPLATES[::30])
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DualConfig(
        vision=VisionConfig(image_size=16, patch_size=8, **shape),
        text=TextConfig(vocab_size=300, max_position_embeddings=24, **shape),
        projection_size=32,
    )
    torch.manual_seed(0)
    model = Dual(config)
    save_dual(tmp_path / "model", model, DualProcessor(train_text_tokenizer(dual.SCENE_CLASSES, 290), config))
    results = main(
        DualEvalConfig(str(tmp_path / "model"), limit=30, train="scenes", classify=("scenes",), device="cpu")
    )
    figures = results["scenes, classes"]
    assert {f"{name}_top_{k}" for name in ("zero_shot", "knn", "linear") for k in (1, 5)} | {"n"} == figures.keys()
    assert all(0 <= value <= 1 for key, value in figures.items() if key != "n")
    assert f"scenes, classes: n {figures['n']}, zero_shot_top_1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"templates": ("a photo",)}, "'a photo' has no {}"),
        ({"train": "scenes"}, "nothing is named"),
        ({"classify": ("one.jsonl",)}, "one.jsonl are of one class, 'red'"),
    ],
)
def test_mistakes_are_told(sees_colors, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), COLORS["red"]).save("a.png")
    record = {"image": "a.png", "question": "what?", "answer": "red"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        main(dataclasses.replace(DualEvalConfig(""), **changes))


def test_a_record_with_several_pictures_is_named(sees_colors, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"images": ["a.png", "a.png"], "question": "what?", "answer": "red"}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"own.jsonl, .*it has 2 pictures and 1 texts"):
        main(DualEvalConfig("", retrieve=(str(tmp_path / "own.jsonl"),)))
