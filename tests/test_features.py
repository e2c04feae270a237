"""Stored features of a frozen encoder are what it makes of the pictures, and a run learns from them what it would from
the pictures."""

import base64
import dataclasses
import functools
import io
import json
import random

import pytest
import torch
from PIL import Image

import train
from nanovlm import features
from nanovlm.command_line import parse_train
from nanovlm.config import TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.features import Features, Missing, digest
from nanovlm.data.images import make_tiles, marker_tokens, open_image
from nanovlm.data.loader import fingerprint
from nanovlm.data.process import make_process
from nanovlm.data.shard_writer import write_shards
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import Document
from nanovlm.errors import UserError
from nanovlm.features import FeaturesConfig, Shard, store
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.train.counting import count_encoder, count_flops
from nanovlm.train.step import fill_up
from tests.conftest import TINY, make_batch, noise

MODEL = dataclasses.replace(TINY, tiling=TilingConfig(max_tiles=4))
# The pictures of each record.
SHOWN = [[i, i + 1] if i % 7 == 0 else [] if i % 11 == 3 else [i] for i in range(40)] + [[0]]


def png(number):
    """A picture of a size of its own, as a file."""
    width, height = random.Random(number).choices(range(8, 60), k=2)
    file = io.BytesIO()
    noise(number, 64).resize((width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    """Drawing them takes a third of the time of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda _path: b"")
        yield


@pytest.fixture(scope="module")
def cutting():
    """A processor that cuts a picture into several tiles."""
    return Processor(train_tokenizer(["what is a picture?"] * 9, 400, marker_tokens(MODEL)), CHAT_TEMPLATE, MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cutting):
    """A model, and records: of one picture, of two, of one that another has, of none, and of one that is broken."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    save_model(folder / "model", VLM(MODEL), cutting)
    with open(folder / "mine.jsonl", "w") as lines:
        for numbers in SHOWN:
            pictures = [base64.b64encode(png(n)).decode() for n in numbers]
            texts = [{"user": f"what is {numbers}?", "assistant": f"picture {numbers}"}]
            lines.write(json.dumps({"images": pictures, "texts": texts}) + "\n")
        broken = base64.b64encode(png(0)[:-40] + b"?" * 9).decode()
        lines.write(json.dumps({"images": [broken], "texts": texts}) + "\n")
    return folder


@functools.cache
def stage_1(folder):
    """The config of a run that trains the projector and the decoder."""
    arguments = {
        "init.model": folder / "model",
        "data.sources": folder / "mine.jsonl",
        "optim.freeze": "^vision",
        "optim.steps": 4,
        "optim.warmup-steps": 1,
        "data.row-length": 160,
        "data.batch-rows": 2,
        "data.pack-buffer": 8,
        "data.max-bad-fraction": 0.2,
        "data.too-long": "skip",
        "checkpoint-every": 2,
        "eval.every": 0,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    }
    return parse_train(["small", *(str(x) for name, value in arguments.items() for x in (f"--{name}", value))])


def config_of(folder, **changes):
    """The same with other values of fields, by their names with __ for each dot."""

    def change(config, names, value):
        if not names:
            return value
        return dataclasses.replace(config, **{names[0]: change(getattr(config, names[0]), names[1:], value)})

    config = stage_1(folder)
    for name, value in changes.items():
        config = change(config, name.split("__"), value)
    return config


@pytest.fixture(scope="module")
def stored(folder):
    """The folders of features in 32 and in 16 bits, and what the command says of the first."""
    said = store(FeaturesConfig(folder / "float32", "float32", batch_tiles=8), config_of(folder))
    store(FeaturesConfig(folder / "bfloat16", "bfloat16", batch_tiles=8), config_of(folder))
    return {"float32": str(folder / "float32"), "bfloat16": str(folder / "bfloat16"), "said": said}


def test_a_picture_has_what_the_encoder_makes_of_its_tiles(folder, stored):
    found = Features(folder / "float32", MODEL)
    model = features.init.start(config_of(folder), ())[0].eval()
    num_tiles = 0
    pictures = {number for numbers in SHOWN for number in numbers}
    for number in random.Random(0).sample(sorted(pictures), 20):
        (folder / "one.png").write_bytes(png(number))
        image = open_image(folder / "one.png")
        seen, tiles = found.find(png(number)), make_tiles(image, MODEL)
        with torch.no_grad():
            expected = model.vision(normalize(tiles))
        assert seen.size == image.size
        torch.testing.assert_close(seen.features, expected, rtol=1e-5, atol=1e-5)
        half = Features(folder / "bfloat16", MODEL).find(png(number)).features
        assert half.equal(seen.features.bfloat16())
        num_tiles += len(tiles)
    assert num_tiles > 25
    about = found.about
    assert about["records"] == len(SHOWN) + 1 and about["unreadable_pictures"] == 1 and about["unusable_records"] == 0
    assert about["pictures"] == len(pictures) + 1
    assert (
        f"features of {about['tiles']} tiles of {about['pictures']} pictures in {len(SHOWN) + 1} records"
        in stored["said"]
    )
    with pytest.raises(Missing, match=r"image 3 is not among the .* pictures of data.features"):
        found.find(png(1000), 3)
    with pytest.raises(UserError, match="image 0 must be an encoded file"):
        found.find("a.png")


def test_a_picture_that_comes_decoded_is_found_by_its_pixels():
    image = noise(0)
    assert digest(image) == digest(image.copy()) != digest(noise(1))
    assert digest(Image.new("RGB", (32, 8))) != digest(Image.new("RGB", (8, 32)))


def losses(run_dir):
    """Loss, size of the gradient and trained tokens of each step, and the loss on held-out records at the end."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [(line["loss"], line["grad_norm"], line["trained_tokens"]) for line in lines]
    return steps, json.loads((run_dir / "eval.json").read_text())["val_loss"]


@pytest.fixture(scope="module")
def from_pictures(folder):
    train.main(config_of(folder, run_dir=str(folder / "from_pictures")))
    return losses(folder / "from_pictures")


def test_a_run_learns_the_same_from_features_in_32_bits(folder, stored, from_pictures, monkeypatch, capsys):
    """Losses equal to the bit, the same packing, and no step runs the encoder; killed and resumed, too."""
    config = config_of(folder, run_dir=str(folder / "stored"), data__features=stored["float32"])
    step = train.train_step

    def step_without_encoder(state, *args):
        with monkeypatch.context() as patch:
            patch.setattr("nanovlm.model.vision.VisionEncoder.forward", None)
            return step(state, *args)

    def die(state, *args):
        if state.step == 3:
            raise KeyboardInterrupt
        return step_without_encoder(state, *args)

    monkeypatch.setattr(train, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    monkeypatch.setattr(train, "train_step", step_without_encoder)
    train.main(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1)))
    assert "continuing" in capsys.readouterr().out
    assert losses(folder / "stored") == from_pictures and len(from_pictures[0]) == 4


def test_features_in_16_bits_change_losses_by_their_rounding(folder, stored, from_pictures):
    """bfloat16 rounds a feature by up to 1 / 512 of it; losses were off by up to 6e-5 of them on 2026-11-30."""
    train.main(config_of(folder, run_dir=str(folder / "rounded"), data__features=stored["bfloat16"]))
    steps, held_out = losses(folder / "rounded")
    for (loss, _norm, tokens), (expected, _, expected_tokens) in zip(steps, from_pictures[0], strict=True):
        assert tokens == expected_tokens and abs(loss - expected) < 3e-4 * expected
    assert 0 < abs(held_out - from_pictures[1]) < 3e-4 * held_out


def test_shards_are_the_same_after_a_kill(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Shard, "is_full", lambda self: len(self.cuts) >= 12)
    config, whole, killed = config_of(folder), tmp_path / "whole", tmp_path / "killed"
    store(FeaturesConfig(whole), config)
    add = Shard.add

    def die(self, cut):
        if (killed / "00001.safetensors").exists():
            raise KeyboardInterrupt
        add(self, cut)

    monkeypatch.setattr(Shard, "add", die)
    with pytest.raises(KeyboardInterrupt):
        store(FeaturesConfig(killed), config)
    with pytest.raises(UserError, match=r"has no index.json: write it first"):
        Features(killed, MODEL)
    with pytest.raises(UserError, match=r"was begun with other settings .*dtype: 'bfloat16' against 'float32'"):
        store(FeaturesConfig(killed, "float32"), config)
    monkeypatch.setattr(Shard, "add", add)
    store(FeaturesConfig(killed), config)
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) >= 4 and sorted(path.name for path in killed.iterdir()) == sorted([*files, "index.json"])
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)
    counts = [json.loads((path / "index.json").read_text()) | {"seconds": 0} for path in (whole, killed)]
    assert counts[0] == counts[1]
    with pytest.raises(UserError, match="has features already"):
        store(FeaturesConfig(killed), config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim__freeze": ("^decoder",)}, r"vision\.\S+ learns: freeze it"),
        ({"model__tiling__max_tiles": 2}, r"another preprocessing .*model\.tiling\.max_tiles: 4 against 2"),
        ({"data__features": "nowhere"}, "data.features = nowhere has no index.json: write it first"),
        ({"data__too_long": "shrink"}, "data.too_long = shrink must be skip"),
    ],
)
def test_what_features_do_not_fit_is_refused(folder, stored, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train.main(
            config_of(folder, **({"run_dir": str(tmp_path), "data__features": stored["float32"]} | changes)).validate()
        )


def test_features_of_another_encoder_are_refused(folder, stored, tmp_path, cutting):
    torch.manual_seed(1)
    save_model(tmp_path / "model", VLM(MODEL), cutting)
    with pytest.raises(UserError, match="are of an encoder with other weights than the run's"):
        train.main(
            config_of(
                folder, init__model=str(tmp_path / "model"), run_dir=str(tmp_path), data__features=stored["float32"]
            )
        )


def test_a_record_without_features_ends_the_run(folder, stored, tmp_path):
    """It is no broken record, of which there may be some."""
    with open(folder / "mine.jsonl") as lines, open(tmp_path / "more.jsonl", "w") as more:
        more.write(lines.read())
        texts = [{"user": "?", "assistant": "new"}]
        more.write(json.dumps({"images": [base64.b64encode(png(1000)).decode()], "texts": texts}) + "\n")
    config = config_of(
        folder, run_dir=str(tmp_path), data__features=stored["float32"], data__sources=(str(tmp_path / "more.jsonl"),)
    )
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=50))
    with pytest.raises(UserError, match=f"sample {len(SHOWN) + 1}: image 0 is not among the .* pictures"):
        train.main(config)


def test_a_video_is_no_picture_that_was_forgotten(folder, stored, cutting):
    """It is a record that cannot be used, and is counted; to write features again would not help."""
    process = make_process(cutting, config_of(folder, data__features=stored["float32"]).data)
    file = io.BytesIO()
    noise(0, 32).save(file, "GIF")
    with pytest.raises(UserError, match=r"video 0 has no place in data\.features") as raised:
        process({"video": file.getvalue(), "question": "what?", "answer": "this"})
    assert not isinstance(raised.value, Missing)


def test_the_sources_are_read_as_in_the_run(folder, tmp_path, monkeypatch):
    """Mixed by temperature, of which a stream has to tell its size, and shards where data.shard_cache has them."""
    given = []
    opened = features.open_source
    monkeypatch.setattr(features, "open_source", lambda spec, **how: given.append(how["shards"]) or opened(spec, **how))
    mine = str(folder / "mine.jsonl")
    write_shards(opened(mine), tmp_path / "shards", num=3)
    sources, changes = (mine, str(tmp_path / "shards")), {"data__temperature": 2.0, "data__shard_cache": str(tmp_path)}
    said = store(FeaturesConfig(tmp_path / "out"), config_of(folder, data__sources=sources, **changes))
    assert f"in {len(SHOWN) + 1 + 3} records" in said
    assert [shards.cache.folder for shards in given] == [str(tmp_path)] * 2


def test_objectives_that_read_pictures_are_refused(folder):
    config = dataclasses.replace(config_of(folder, data__features="x"), objective="distill")
    with pytest.raises(UserError, match="serves objective = next_token alone: distill reads the pictures"):
        config.validate()


def test_batches_of_features_need_no_encoder(folder, stored, cutting):
    """Neither one of text alone on a rank that must use the projector, nor in the count of operations."""
    config = config_of(folder, data__features=stored["float32"])
    model, process = (
        VLM(MODEL),
        make_process(cutting, config.data),
    )
    texts = [{"user": "what?", "assistant": "this"}]
    seen, text = process({"images": [png(5)], "texts": texts}), process({"images": [], "texts": texts})
    assert seen.tiles.ndim == 3 and text.tiles.shape == (0, 16, 32)
    pixels = Document(**vars(seen) | {"tiles": torch.zeros(len(seen.tiles), 3, 16, 16, dtype=torch.uint8)})
    trains = {"projector": True, "decoder": True}
    saved = count_flops(MODEL, make_batch([pixels]), trains) - count_flops(MODEL, make_batch([seen]), trains)
    assert saved == 2 * len(seen.tiles) * sum(count_encoder(MODEL.vision)) > 0
    model.vision = None
    assert model(make_batch([seen, text])).isfinite().all()
    model.always_sees = True
    model(make_batch([text])).sum().backward()
    (padding,) = fill_up([], dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=1)))
    model(padding).sum().backward()
    assert next(model.projector.parameters()).grad is not None
    half = dataclasses.replace(seen, tiles=seen.tiles.bfloat16())
    assert len({fingerprint(x) for x in (seen, half, dataclasses.replace(half, tiles=half.tiles + 1))}) == 3


def test_the_command_takes_the_arguments_of_a_run(folder, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(features, "store", lambda *configs: given.extend(configs) or "wrote it")
    features.main(["out", "small", "--dtype", "float32", "--data.sources", str(folder / "mine.jsonl"), "--seed", "3"])
    assert given[0] == FeaturesConfig(features.Path("out"), "float32") and given[1].seed == 3
    assert given[1].data.sources == (str(folder / "mine.jsonl"),) and capsys.readouterr().out == "wrote it\n"
    with pytest.raises(UserError, match="--shard-mb 0 must be at least 1"):
        features.main(["out", "small", "--shard-mb", "0"])


def test_a_picture_with_more_pixels_than_the_run_takes_is_named(folder, stored, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"more than data\.max_pixels = 10"):
        Features(folder / "float32", MODEL).find(png(5))
